"""What searches over thoughts share: every state goes on in several ways, the best of all of them are kept."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from anabranch.strategies.api.ops import Ended, TokenStats
from anabranch.strategies.api.thread import Thread
from anabranch.strategies.search.pool import Pool
from anabranch.strategies.search.scoring import Scored


@dataclass
class State:
    """A text so far: its thread, its score, whether it has come to its end, and what its tokens were like."""

    thread: Thread
    score: float = 0.0
    over: bool = False
    stats: tuple[TokenStats, ...] = ()
    judged: bool = False

    def scored(self) -> Scored:
        """All that it holds since the search began."""
        return Scored(self.thread.text, self.thread.token_ids, self.thread.prompt, self.stats)


def grow(
    pool: Pool, states: Sequence[State], ways: int, think: Callable[[Thread], Any]
) -> Generator[Any, Any, list[State]]:
    """Each state that is not over goes on in `ways` ways by what `think` decodes; those that are over stay."""
    going = [state for state in states if not state.over]
    over = [state for state in states if state.over]
    sources = [state for state in going for _ in range(ways)]
    threads = yield from pool.copies([s.thread for s in sources], [s.thread for s in over])
    ends: list[Ended] = yield [think(thread) for thread in threads]
    grown = [
        State(thread, source.score, end.reason in ("eos", "budget") or thread.room <= 0, source.stats + end.stats)
        for thread, source, end in zip(threads, sources, ends, strict=True)
    ]
    return [*over, *grown]


def best_of(states: Sequence[State], keep: int) -> list[State]:
    """The `keep` best, best first; the earlier among equals."""
    return sorted(states, key=lambda state: -state.score)[:keep]
