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
    is discarded. `Thread.malformed` counts model output that broke the strategy's format.
    """

    needs: Sequence[str] = ()  # what it asks of a host besides tokens in and out ("concat joins", "entropy"): see docs
    sequential = False  # True: the loop runs one thread of a prompt at a time (see `Sequential`)

    def run(self, trunk: Thread) -> Generator[Any, Any, Any]:
        raise NotImplementedError(f"{type(self).__name__} must define run(self, trunk)")
