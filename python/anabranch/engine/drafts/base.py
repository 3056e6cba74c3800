"""What guesses tokens: a `Proposer`, and what it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from anabranch.engine.request import Request
    from anabranch.engine.thread_kv import EngineThread

Path = Sequence[int]


@dataclass(frozen=True, eq=False)
class Ask:
    """A guess is wanted of what `thread` is given next: up to `width` paths of up to `length` tokens.

    lengths: tokens of each path, at most; what a proposer gives beyond them is left out.
    """

    thread: EngineThread
    lengths: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens of the longest path, at most."""
        return max(self.lengths)

    @property
    def width(self) -> int:
        """Paths, at most."""
        return len(self.lengths)

    @property
    def request(self) -> Request:
        return self.thread.request

    @property
    def context(self) -> tuple[int, ...]:
        """All of the thread's tokens so far."""
        return self.thread.context


class Proposer(Protocol):
    """Guesses what threads will be given next. It may guess anything: only speed depends on it.

    One serves all requests of a loop whose `DraftTree` names the same draft.
    """

    def propose(self, asks: Sequence[Ask]) -> Sequence[Sequence[Path]]:
        """For each of `asks` its paths, the likeliest first; none where it has no idea. Token ids outside the
        vocabulary, and tokens beyond the length asked for, are left out."""

    def close(self) -> None:
        """Give back what it holds; it is asked nothing more."""
