"""What a prompt has cost so far, in time and work, and what the call's cache held at most."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from anabranch.kv.cache import TreeCache, Usage
from anabranch.records.metrics import PHASES


@dataclass(eq=False)
class Costs:
    """One prompt's seconds by phase, steps, rows, pre-emptions and tokens that it found computed."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    steps: int = 0
    rows: int = 0
    preemptions: int = 0
    cached_tokens: int = 0


def share(seconds: float, phase: str, among: Iterable[tuple[Costs, int]]) -> None:
    """Count `seconds` that several prompts spent together, for each by its weight (its rows, its threads)."""
    parts = list(among)
    whole = sum(weight for _, weight in parts)
    for costs, weight in parts:
        costs.seconds[phase] += seconds * weight / whole


class Peaks:
    """The fullest a cache was during one call."""

    def __init__(self, cache: TreeCache):
        self._cache = cache
        self._copied_before = cache.usage().pages_copied
        self.pages = self.logical = self.physical = 0
        self.physical_then = 0  # when `logical` was reached

    def look(self, usage: Usage) -> None:
        """After a step."""
        self.pages = max(self.pages, usage.pages_total - usage.pages_free)
        self.physical = max(self.physical, usage.tokens_physical)
        if usage.tokens_logical > self.logical:
            self.logical, self.physical_then = usage.tokens_logical, usage.tokens_physical

    def as_metrics(self) -> dict[str, Any]:
        """By the names of `Metrics`."""
        return {
            "pages_copied": self._cache.usage().pages_copied - self._copied_before,
            "pages_peak": self.pages,
            "tokens_logical_peak": self.logical,
            "tokens_physical_peak": self.physical,
            "tokens_physical_then": self.physical_then,
            "sharing": self.logical / self.physical_then if self.physical_then else 1.0,
        }
