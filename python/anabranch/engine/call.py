"""The prompts of one call, from `generate`, `stream` or `add` to their answers."""

from __future__ import annotations

import threading
from collections.abc import Callable

from anabranch.engine.peaks import Peaks
from anabranch.engine.request import Request
from anabranch.kv.cache import TreeCache
from anabranch.records.events import Event
from anabranch.records.result import Result


class Call:
    """Requests that were made together: their answers are handed over together, and an error of one ends them all.

    deadline: on ``time.monotonic``'s clock. What is told of the requests (`emit`) stays in `events` until it is taken.
    """

    def __init__(self, cache: TreeCache, priority: int = 0, deadline: float | None = None):
        self.cache, self.priority, self.deadline = cache, priority, deadline
        self.requests: list[Request] = []
        self.results: list[Result | None] = []
        self.left: dict[Request, None] = {}  # those that have not come to their end
        self.error: BaseException | None = None
        self.peaks = Peaks(cache)
        self.events: list[Event] = []
        self.aborted = False  # to be ended before the next step; `dropped`: and nobody wants what there is so far
        self.dropped = False
        self.listener: Callable[[], None] | None = None  # called, from any thread, when there is something new
        self._news = False
        self._sleepers: set[threading.Event] = set()

    def holds(self, requests: list[Request]) -> None:
        """Settle whose call it is; before it goes to the loop."""
        self.requests, self.results, self.left = requests, [None] * len(requests), dict.fromkeys(requests)
        self.peaks = Peaks(self.cache)

    @property
    def ended(self) -> bool:
        return not self.left

    def outcome(self) -> list[Result]:
        """The answers, once it has ended; raises what it failed with."""
        if self.error is not None:
            raise self.error
        return [result for result in self.results if result is not None]

    # ---------------------------------------------------------------------------------------- who listens

    def emit(self, event: Event) -> None:
        self.events.append(event)
        self._news = True

    def take(self) -> list[Event]:
        """What was told since the last time."""
        taken = self.events[:]
        del self.events[: len(taken)]
        return taken

    def tell(self) -> None:
        """Wake whoever waits, if there is anything new."""
        if not (self._news or self.ended):
            return
        self._news = False
        for sleeper in list(self._sleepers):
            sleeper.set()
        if self.listener is not None:
            self.listener()

    def sleep(self, sleeper: threading.Event) -> None:
        """Have `sleeper` set whenever there is something new."""
        self._sleepers.add(sleeper)

    def wake(self, sleeper: threading.Event) -> None:
        self._sleepers.discard(sleeper)
