"""A packed training row as plain lists: its segments, their positions, and which earlier segments each of them sees."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


class Rows:
    """A packed row in the making: segments one behind another, each with the earlier segments that it sees."""

    def __init__(self) -> None:
        self.ids: list[Sequence[int]] = []
        self.sees: list[list[int]] = []
        self.first: list[int] = []  # positions
        self.written: list[Sequence[bool]] = []
        self.learnt: list[Sequence[bool]] = []
        self.threads: list[int] = []
        self.kv_segments: list[int] = []
        self.recorded: dict[int, Sequence[float]] = {}  # of some segments
        self.follows: dict[int, int] = {}  # of segments that do not go on from the last one that they see: from which

    def add(
        self,
        ids: Sequence[int],
        sees: Sequence[int],
        position: int,
        written: bool | Sequence[bool],
        learnt: bool | Sequence[bool] | None = None,
        thread: int = 0,
        kv_segment: int = 0,
    ) -> int:
        """A segment; its index. `written` and `learnt` (default: as written) hold for all of it, or one a token."""
        every = [written] * len(ids) if isinstance(written, bool) else written
        self.ids.append(ids)
        self.sees.append(list(sees))
        self.first.append(position)
        self.written.append(every)
        self.learnt.append(every if learnt is None else [learnt] * len(ids) if isinstance(learnt, bool) else learnt)
        self.threads.append(thread)
        self.kv_segments.append(kv_segment)
        return len(self.ids) - 1

    def end(self, segment: int) -> int:
        """One past a segment's last position."""
        return self.first[segment] + len(self.ids[segment])

    def sizes(self) -> list[int]:
        """Tokens of each segment."""
        return [len(ids) for ids in self.ids]

    def positions(self) -> list[int]:
        """The logical position of every token of the row."""
        spans = (range(first, first + size) for first, size in zip(self.first, self.sizes(), strict=True))
        return list(itertools.chain.from_iterable(spans))
