"""What an engine is doing, and what its prefix cache has saved. Pure data."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EngineStats"]


@dataclass(frozen=True)
class EngineStats:
    """A moment of an engine (`Engine.stats`).

    waiting, running: requests that have not begun, and that have. steps: forwards so far.
    prefix_lookups: contexts that were begun with the prefix cache at hand, prefix_hits: those of which some was found.
    prefix_tokens: tokens of these contexts; cached_tokens: those whose keys and values were found, and not computed.
    pages_kept: pages that could still be found; they count as free.
    """

    waiting: int
    running: int
    steps: int
    prefix_lookups: int = 0
    prefix_hits: int = 0
    prefix_tokens: int = 0
    cached_tokens: int = 0
    pages_kept: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of tokens that were found (0 where none was looked for)."""
        return self.cached_tokens / self.prefix_tokens if self.prefix_tokens else 0.0
