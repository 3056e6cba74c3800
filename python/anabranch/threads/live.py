"""Threads that see one another while they write: in which turn each token was computed, and what its row saw then.

All threads of a prompt that see others, or are seen, advance together. A *turn* is one forward in which each of them
computes what it has written since the last; so what a row sees follows from turns alone, not from pages, chunks or the
prompts beside it.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from anabranch.records.result import Sight

if TYPE_CHECKING:
    from anabranch.threads.state import AnyThread


@dataclass(frozen=True)
class View:
    """What a thread sees beside its own context, from its own token number `begin` on; see `Thread.see`."""

    begin: int
    others: tuple[Any, ...]  # records of threads
    lined_up: bool
    same_step: str

    def recorded(self) -> Sight:
        """As a result tells it."""
        return Sight(self.begin, tuple(other.id for other in self.others), self.lined_up, self.same_step)


class Turns:
    """A thread's own tokens by the turn in which they were, or are to be, computed. Turn 0: before it was live."""

    def __init__(self, since: int = 0) -> None:
        self.since = since  # entries that the thread's log had when it became live
        self.views: list[View] = []
        self._turns: list[int] = []  # rising
        self._ends: list[int] = []  # own tokens up to and with that turn
        self.clock = 0  # the thread's, at its last turn

    @property
    def assigned(self) -> int:
        """So many of its own tokens have a turn."""
        return self._ends[-1] if self._ends else 0

    def assign(self, turn: int, count: int) -> None:
        """Its next `count` tokens are computed in `turn`."""
        if count and self._turns and self._turns[-1] == turn:
            self._ends[-1] += count
        elif count:
            self._turns.append(turn)
            self._ends.append(self.assigned + count)

    def cut(self, length: int) -> None:
        """Forget own tokens from number `length` on."""
        while self._ends and self._ends[-1] > length:
            if len(self._ends) > 1 and self._ends[-2] >= length:
                self._ends.pop()
                self._turns.pop()
            else:
                self._ends[-1] = length
                break
        if self._ends and self._ends[-1] == 0:
            self._ends.pop()
            self._turns.pop()
        while len(self.views) > 1 and self.views[-2].begin >= length:
            del self.views[-2]
        if self.views and self.views[-1].begin > length:  # what it writes next sees what it would have seen
            self.views[-1] = replace(self.views[-1], begin=length)

    def until(self, turn: int) -> int:
        """Own tokens of turns up to and with `turn`."""
        at = bisect_right(self._turns, turn)
        return self._ends[at - 1] if at else 0

    def of(self, number: int) -> int:
        """The turn of own token `number`."""
        return self._turns[bisect_right(self._ends, number)]

    def view_at(self, number: int) -> View | None:
        """What own token `number` sees."""
        return next((view for view in reversed(self.views) if view.begin <= number), None)

    def pairs(self) -> tuple[tuple[int, int], ...]:
        """(turn, tokens) in order."""
        begins = chain((0,), self._ends)
        return tuple((turn, end - begin) for turn, begin, end in zip(self._turns, begins, self._ends, strict=False))


def sees_same_turn(view: View, thread: AnyThread, other: AnyThread) -> bool:
    """Whether a row of `thread` sees what `other` computes in the same turn."""
    return view.same_step == "all" or (view.same_step == "before" and other.path < thread.path)


def visible(view: View, thread: AnyThread, other: AnyThread, turn: int) -> int:
    """How many of `other`'s own tokens a row of `thread` in `turn` sees."""
    return other.turns.until(turn if sees_same_turn(view, thread, other) else turn - 1)


def shared(thread: AnyThread, other: AnyThread) -> int:
    """How many of `other`'s own tokens are in the thread's own context, which begins with them: an ancestor's."""
    below = thread
    while below.parent is not None and below.role == "fork":
        if below.parent is other:
            return len(below.prefix) - len(other.prefix)
        below = below.parent
    return 0
