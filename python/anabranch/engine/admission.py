"""A limit on how many threads of an engine decode at a time: the others wait for their turn, and no token changes."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

from anabranch.engine.request import Request
from anabranch.engine.thread_kv import EngineThread
from anabranch.strategies.api.ops import Op


class DecodeLimit:
    """At most `limit` decodings at a time. One that has begun keeps its turn to its end, or until its prompt gives the
    turn to another thread; then the next thread in line gets it: of the earliest request, children before their parent.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._held: dict[Op, EngineThread] = {}  # the Decodes under way
        self._waiting: dict[Op, EngineThread] = {}

    def admit(self, threads: Iterable[EngineThread]) -> list[EngineThread]:
        """Those of `threads` (each begins its queue with a decode) that may go on now."""
        given = list(threads)
        threads = [t for t in given if t.live is None]  # threads that see one another advance together
        offered = {t.queue[0] for t in threads}
        over = [(op, thread) for op, thread in self._held.items() if op.done]
        # One under way is offered no more when its sequential prompt goes on with an earlier thread: that thread would
        # wait for a turn which nobody uses.
        self._held = {op: thread for op, thread in self._held.items() if op in offered}
        # Who waited for a turn waited for the tokens of the thread that held it (a Lamport clock counts one prompt's).
        freed: list[tuple[Request, int]] = [(thread.request, op.clock) for op, thread in over]
        line = [t for t in threads if t.queue[0] not in self._held]
        line.sort(key=lambda t: (t.request.order, (*t.path, inf)))
        for thread in line[: max(0, self.limit - len(self._held))]:
            op = thread.queue[0]
            self._held[op] = thread
            if op in self._waiting:
                del self._waiting[op]
                mine = [clock for request, clock in freed if request is thread.request]
                if mine:
                    thread.reach(min(mine))
                    freed.remove((thread.request, min(mine)))
        self._waiting = {t.queue[0]: t for t in line if t.queue[0] not in self._held}
        return [t for t in given if t.live is not None or t.queue[0] in self._held]
