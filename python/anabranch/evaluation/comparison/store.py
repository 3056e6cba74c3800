"""Results in one SQLite file: a row for each problem that was answered, written before the next one begins.

A run that is killed at any moment loses the problem it was at and nothing else; the same command goes on from there. A
row's key says all that decides an answer, so nothing is counted twice.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, NamedTuple

__all__ = ["SCHEMA_VERSION", "Key", "Row", "Store"]

APPLICATION, SCHEMA_VERSION = 0x414E4243, 1  # "ANBC": how SQLite files tell whose they are
TABLES = """
CREATE TABLE runs (id INTEGER PRIMARY KEY, began TEXT NOT NULL, facts TEXT NOT NULL);
CREATE TABLE results (
  model TEXT NOT NULL, strategy TEXT NOT NULL, task TEXT NOT NULL, seed INTEGER NOT NULL, problem INTEGER NOT NULL,
  settings TEXT NOT NULL, prompt_sha256 TEXT NOT NULL, run INTEGER NOT NULL REFERENCES runs (id), ended TEXT NOT NULL,
  expected TEXT NOT NULL, text TEXT, score REAL, error TEXT, malformed INTEGER, metrics TEXT,
  PRIMARY KEY (model, strategy, task, seed, problem, settings)
);
"""


class Key(NamedTuple):
    """What one result is of. ``strategy``: with its options; ``settings``: JSON of what else decides the answer."""

    model: str
    strategy: str
    task: str
    seed: int
    problem: int
    settings: str


@dataclass(frozen=True)
class Row:
    """One result. ``score``: None where the verifier raised; ``metrics``: None where nothing was generated."""

    key: Key
    prompt_sha256: str
    expected: str
    text: str | None = None
    score: float | None = None
    error: str | None = None
    malformed: bool = False
    metrics: dict[str, Any] | None = field(default=None)

    @property
    def right(self) -> bool:
        return self.score is not None and self.score > 0.99


class Store:
    """A result store; ``with Store(path) as store``. path: None keeps it in memory.

    Raises:
        ValueError: the file is no result store, or one of another version.
        OSError: it cannot be opened or written.
    """

    def __init__(self, path: str | os.PathLike[str] | None):
        self.path = None if path is None else os.fspath(path)
        self._run: int | None = None
        with self._told("opened"):
            self._db = sqlite3.connect(self.path or ":memory:", timeout=30, isolation_level=None)
            try:
                self._prepare()
            except BaseException:
                self._db.close()
                raise

    def _prepare(self) -> None:
        tables = {name for (name,) in self._db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        ((application,),) = self._db.execute("PRAGMA application_id")
        ((version,),) = self._db.execute("PRAGMA user_version")
        if tables and application != APPLICATION:
            raise ValueError(f"store {self.path!r}: a database of something else; name another file")
        if tables and version != SCHEMA_VERSION:
            raise ValueError(
                f"store {self.path!r}: its schema is version {version}, this anabranch reads {SCHEMA_VERSION}; name "
                "another file, or use the anabranch that wrote it"
            )
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        if not tables:
            script = f"PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {SCHEMA_VERSION}; {TABLES}"
            self._db.executescript(f"BEGIN; {script} COMMIT;")

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what was added is there already."""
        self._db.close()

    def begin(self, facts: dict[str, Any]) -> None:
        """A run begins; `facts`: all that is needed to repeat it."""
        with self._told("written"):
            cursor = self._db.execute("INSERT INTO runs (began, facts) VALUES (?, ?)", (_now(), json.dumps(facts)))
            self._run = cursor.lastrowid

    def add(self, row: Row) -> None:
        """Keep a result; one that is there already stays as it is."""
        if self._run is None:
            raise ValueError("store: begin(facts) comes before add")
        metrics = None if row.metrics is None else json.dumps(row.metrics)
        values = (
            *row.key, row.prompt_sha256, self._run, _now(), row.expected, _clean(row.text), row.score,
            _clean(row.error), int(row.malformed), metrics,
        )  # fmt: skip
        with self._told("written"):
            self._db.execute(f"INSERT OR IGNORE INTO results VALUES ({', '.join('?' * len(values))})", values)

    def prompts(self) -> dict[Key, str]:
        """The hash of the prompt of every result that is there."""
        with self._told("read"):
            rows = self._db.execute(
                "SELECT model, strategy, task, seed, problem, settings, prompt_sha256 FROM results"
            ).fetchall()
        return {Key(*row[:6]): row[6] for row in rows}

    def rows(self) -> list[Row]:
        """All results, in the order of their keys."""
        with self._told("read"):
            found = self._db.execute(
                "SELECT model, strategy, task, seed, problem, settings, prompt_sha256, expected, text, score, error, "
                "malformed, metrics FROM results ORDER BY 1, 3, 2, 4, 5, 6"
            ).fetchall()
        return [
            Row(Key(*r[:6]), r[6], r[7], r[8], r[9], r[10], bool(r[11]), None if r[12] is None else json.loads(r[12]))
            for r in found
        ]

    def runs(self) -> list[dict[str, Any]]:
        """The facts of every run, with when it began."""
        with self._told("read"):
            return [
                {"id": number, "began": began, **json.loads(facts)}
                for number, began, facts in self._db.execute("SELECT id, began, facts FROM runs ORDER BY id")
            ]

    def forget_errors(self) -> int:
        """Drop the results that are errors, so that they are tried again; how many."""
        with self._told("written"):
            return self._db.execute("DELETE FROM results WHERE error IS NOT NULL").rowcount

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """SQLite's errors in words; every result that was added before is safe."""
        try:
            yield
        except sqlite3.OperationalError as error:
            raise OSError(f"store {self.path!r} cannot be {what} ({error}); what it holds is safe") from None
        except sqlite3.DatabaseError as error:
            raise ValueError(f"store {self.path!r}: no result store ({error}); name another file") from None


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _clean(text: str | None) -> str | None:
    """SQLite keeps UTF-8, which has no lone surrogates."""
    return None if text is None else text.encode("utf-8", "replace").decode()
