"""The base class of all strategies."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anabranch.strategies.api.thread import Thread


class Strategy:
    """Base class of all strategies: subclass it as a frozen dataclass and write ``run``.

    ``run(trunk)`` is a generator (see the module docstring). What it returns becomes ``result.answers``. The answer is
    finished when run() has returned and the trunk has done all that was queued on it; what other threads are at by then
    is discarded (with ``drains``, once they have done all that was queued on them). `Thread.malformed` counts model
    output that broke the strategy's format.

    >>> class Twice(ab.Strategy):
    ...     def run(self, trunk):
    ...         children = trunk.fork(2)
    ...         yield [child.decode(8) for child in children]
    ...         return [child.text for child in children]
    >>> engine.generate(prompt, strategy=Twice()).answers
    """

    needs: Sequence[str] = ()  # what it asks of a host besides tokens in and out ("concat joins", "entropy"): see docs
    sequential = False  # True: the loop runs one thread of a prompt at a time (see `Sequential`)
    # True: threads that nobody waits for any more finish, too, before the answer is handed out. How far they got would
    # else depend on the schedule, and so on what else runs.
    drains = False
    # Segments (0 … n − 1) of which the model adds vectors to K and V, where a strategy forks into them
    # (``thread.fork(…, segments=…)``): the engine must have as many (``Engine(segment_vectors=…)``). 0: none.
    kv_segments = 0

    def run(self, trunk: Thread) -> Generator[Any, Any, Any]:
        raise NotImplementedError(f"{type(self).__name__} must define run(self, trunk)")
