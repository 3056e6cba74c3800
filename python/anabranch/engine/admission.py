"""A limit on how many threads of a call decode at a time: the others wait for their turn, and no token changes."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from typing import Any

from anabranch.strategies.api.thread import Thread


class Slots:
    """At most `limit` decodings at a time. One that has begun keeps its slot to its end, or until its prompt gives the
    turn to another thread; then the next thread in line gets it: of the earliest prompt, children before their parent.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._held: dict[Any, None] = {}  # the Decodes under way
        self._waiting: dict[Any, None] = {}

    def admit(self, threads: Iterable[Thread]) -> list[Thread]:
        """Those of `threads` (each begins its queue with a decode) that may go on now."""
        threads = list(threads)
        offered = {t._ops[0] for t in threads}
        over = [op for op in self._held if op.done]
        # One under way is offered no more when its sequential prompt goes on with an earlier thread: that thread would
        # wait for a slot which nobody uses.
        self._held = {op: None for op in self._held if op in offered}
        # Who waited for a slot waited for the tokens of the thread that held it (a Lamport clock counts one prompt's).
        freed = [(op.thread._host, op.clock) for op in over]
        line = [t for t in threads if t._ops[0] not in self._held]
        line.sort(key=lambda t: (t._host.index, (*t.path, inf)))
        for thread in line[: max(0, self.limit - len(self._held))]:
            op = thread._ops[0]
            self._held[op] = None
            if op in self._waiting:
                del self._waiting[op]
                mine = [clock for host, clock in freed if host is thread._host]
                if mine:
                    thread._depth = max(thread._depth, min(mine))
                    freed.remove((thread._host, min(mine)))
        self._waiting = {t._ops[0]: None for t in line if t._ops[0] not in self._held}
        return [t for t in threads if t._ops[0] in self._held]
