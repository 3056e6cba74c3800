"""What a prompt has cost so far, in time and work."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from anabranch.records.metrics import PHASES


@dataclass(eq=False)
class Costs:
    """One prompt's seconds by phase, steps, rows, pre-emptions and drafts."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    steps: int = 0
    rows: int = 0
    preemptions: int = 0
    drafted: int = 0  # tokens guessed and verified
    accepted: int = 0  # of these, those that were chosen


def share(seconds: float, phase: str, among: Iterable[tuple[Costs, int]]) -> None:
    """Count `seconds` that several prompts spent together, for each by its weight (its rows, its threads)."""
    parts = list(among)
    whole = sum(weight for _, weight in parts)
    for costs, weight in parts:
        costs.seconds[phase] += seconds * weight / whole
