"""The results file: one JSON with a section for each kind of benchmark, written after every measurement."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .environment import describe, load_average

SCHEMA = 1


class Store:
    """Results in memory and, when a path is given, on disk.

    An existing file is extended: entries with the same key are replaced, others kept. Every entry carries the commit
    and the load average of its moment, so a file may be made in several runs.
    """

    def __init__(self, path: Path | None = None, clock: str = "wall") -> None:
        self.path = path
        self.machine = {**describe(), "clock": clock}
        self.data: dict[str, Any] = {"schema": SCHEMA, "machine": self.machine}
        if path is not None and path.exists():
            old = json.loads(path.read_text())
            if old.get("schema") != SCHEMA:
                raise ValueError(f"{path}: schema {old.get('schema')!r}, expected {SCHEMA}; choose another file")
            for name in ("cpu", "cores", "threads", "clock"):
                if old["machine"].get(name) != self.machine[name]:
                    raise ValueError(
                        f"{path}: measured on another machine or otherwise ({name} {old['machine'].get(name)!r}, here "
                        f"{self.machine[name]!r}); choose another file"
                    )
            self.data = {**old, "machine": self.machine}

    def put(self, section: str, key: tuple[str, ...], entry: dict[str, Any]) -> None:
        """Add `entry` to a section; `key` names the fields that make it unique."""
        entry = {**entry, "commit": self.machine["commit"], "date": self.machine["date"], "load": load_average()}
        same = [k for k in self.data.get(section, []) if all(k.get(f) == entry.get(f) for f in key)]
        entries = [e for e in self.data.get(section, []) if e not in same]
        self.data[section] = [*entries, entry]
        self.save()

    def set(self, name: str, value: Any) -> None:
        self.data[name] = value
        self.save()

    def save(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.data, indent=1, ensure_ascii=False) + "\n")
        os.replace(temporary, self.path)


def load(path: Path) -> dict[str, Any]:
    """A results file, checked for its schema."""
    data = json.loads(path.read_text())
    if data.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema {data.get('schema')!r}, expected {SCHEMA}")
    return data
