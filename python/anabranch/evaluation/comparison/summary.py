"""Results as a table: what each strategy reached on each task with each model, and at what price."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from anabranch.evaluation.comparison.store import Key, Row
from anabranch.evaluation.evaluate import wilson

__all__ = ["ALL", "Cell", "cells"]

ALL = "all tasks"


@dataclass(frozen=True)
class Cell:
    """One model, task and strategy (`ALL`: all tasks together).

    ``problems``: results; ``errors``: those that could not be judged, which count as neither right nor wrong.
    Tokens and seconds are means of a problem; contexts and pages the largest of any; ``overhead`` is the share of a
    step's time that goes into deciding; ``trigger_rate`` the share of answers that forked, ``malformed_rate`` of those
    that broke the format.
    """

    model: str
    task: str
    strategy: str
    problems: int
    errors: int
    right: int
    accuracy: float | None
    accuracy_95: tuple[float, float]
    total_tokens: float
    critical_path_tokens: float
    wall_seconds: float
    longest_context: int
    pages_peak: int
    overhead: float
    trigger_rate: float
    malformed_rate: float
    first_error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain dict, ready for JSON."""
        return asdict(self)


def cells(rows: Iterable[Row], keys: Collection[Key] | None = None) -> list[Cell]:
    """One cell for each model, task and strategy, then one for each model and strategy over all tasks.

    keys: only these results.
    """
    wanted = None if keys is None else set(keys)
    groups: dict[tuple[str, str, str], list[Row]] = {}
    totals: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if wanted is None or row.key in wanted:
            groups.setdefault((row.key.model, row.key.task, row.key.strategy), []).append(row)
            totals.setdefault((row.key.model, ALL, row.key.strategy), []).append(row)
    return [_cell(*name, some) for name, some in (*groups.items(), *totals.items())]


def _cell(model: str, task: str, strategy: str, rows: list[Row]) -> Cell:
    judged = [row for row in rows if row.score is not None]
    right = sum(row.right for row in judged)
    metrics = [row.metrics for row in rows if row.metrics is not None]

    def mean(name: str) -> float:
        return sum(m[name] for m in metrics) / len(metrics) if metrics else 0.0

    seconds = sum(sum(m["seconds"].values()) for m in metrics)
    return Cell(
        model, task, strategy, len(rows), len(rows) - len(judged), right,
        right / len(judged) if judged else None, wilson(right, len(judged)),
        mean("total_tokens"), mean("critical_path_tokens"), mean("wall_seconds"),
        max((m["longest_context"] for m in metrics), default=0), max((m["pages_peak"] for m in metrics), default=0),
        sum(m["overhead_seconds"] for m in metrics) / seconds if seconds else 0.0,
        mean("trigger_rate"), sum(row.malformed for row in rows) / len(metrics) if metrics else 0.0,
        next((row.error for row in rows if row.error is not None), None),
    )  # fmt: skip
