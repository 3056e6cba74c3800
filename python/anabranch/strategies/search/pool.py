"""A fixed pool of threads: who is no longer needed becomes a copy of who is."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from typing import Any

from anabranch.strategies.api.thread import Thread


class Pool:
    """Forks of one thread, which waits where it forked them. A search moves them about; the tree stays flat."""

    def __init__(self, trunk: Thread, count: int):
        self.trunk, self.begin = trunk, trunk.length
        self.threads = trunk.fork(count)

    def copies(self, sources: Sequence[Thread], kept: Iterable[Thread] = ()) -> Generator[Any, Any, list[Thread]]:
        """One thread for each of `sources`, standing where that stands: itself the first time it is named, another one
        every time after. Threads neither named nor in `kept` are free for it; those left over give up their pages."""
        busy = {*sources, *kept}
        free = [t for t in self.threads if t not in busy]
        found: list[Thread] = []
        for source in sources:
            if source in found:
                if not free:
                    free = self.trunk.fork(1)
                    self.threads += free
                taken = free.pop(0)
                taken.become(source)
                found.append(taken)
            else:
                found.append(source)
        for thread in free:
            if thread.length > self.begin:
                thread.truncate(self.begin)
        yield found  # before any of them goes on
        return found

    def settle(self, winner: Thread) -> Generator[Any, Any, None]:
        """The pool is over: the trunk becomes `winner`."""
        if losers := [t for t in self.threads if t is not winner and t.alive]:
            self.trunk.join(losers, "discard")
        yield self.trunk.join(winner)


def answer_of(thread: Thread) -> Any:
    """What a thread wrote: its text, or its token ids where there is no tokenizer."""
    return thread.token_ids if thread.text is None else thread.text
