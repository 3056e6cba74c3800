"""Prompt lookup: what followed something like a thread's last tokens before, in its own context."""

from __future__ import annotations

from collections.abc import Sequence

from anabranch.engine.drafts.base import Ask
from anabranch.engine.drafts.history import Histories, Place
from anabranch.engine.thread_kv import EngineThread

# Tokens of a path beside the first, at most. A step computes it anew from the thread's last token on, so longer ones
# cost more rows than they are worth.
BESIDE = 2


class NGramDrafts:
    """Guesses that a thread goes on as it, or what it continues, did behind something like its last tokens."""

    def __init__(self) -> None:
        self._histories = Histories()

    def propose(self, asks: Sequence[Ask]) -> list[list[list[int]]]:
        return [self._paths(ask) for ask in asks]

    def _paths(self, ask: Ask) -> list[list[int]]:
        paths: dict[int, list[int]] = {}  # by first token
        for place in self._histories.of(ask.request).behind(ask.thread):
            length = min(BESIDE, ask.length) if paths else ask.length
            path = place.thread.own[place.end : min(place.end + length, self.visible(ask.thread, place))]
            if path:
                paths.setdefault(path[0], path)
                if len(paths) == ask.width:
                    break
        return list(paths.values())

    def visible(self, thread: EngineThread, place: Place) -> int:
        """How many of the own tokens of a place's thread may be guesses for `thread`: those that it sees."""
        above, end = thread, 0
        while above is not place.thread:
            if above.role != "fork" or above.parent is None:
                return 0
            end = len(above.prefix)
            above = above.parent
        return len(above.own) if above is thread else max(0, end - len(above.prefix))

    def close(self) -> None:
        self._histories.clear()
