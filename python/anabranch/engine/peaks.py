"""What a call's cache held at most."""

from __future__ import annotations

from typing import Any

from anabranch.kv.cache import TreeCache, Usage


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
