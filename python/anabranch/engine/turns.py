"""Who may touch the requests and the cache: one Python thread at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """A lock for steps, and for what may only happen between two of them (an abort, a look at the cache).

    Whoever waits to come in between two steps gets in before the next step begins, however many threads want to step.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()  # on an RLock: a generator collected in here may come in again
        self._owner: int | None = None
        self._visitors = 0  # threads that wait to come in between two steps

    @property
    def mine(self) -> bool:
        """Whether the caller is inside a step, or between two, already."""
        return self._owner == threading.get_ident()

    @contextmanager
    def step(self) -> Iterator[None]:
        """For the length of a step."""
        with self._changed:
            while self._owner is not None or self._visitors:
                self._changed.wait()
            self._owner = threading.get_ident()
        try:
            yield
        finally:
            self._leave()

    @contextmanager
    def between(self) -> Iterator[None]:
        """Between two steps; waits for the end of one that is under way. Within one's own turn it is no turn of its
        own."""
        if self.mine:
            yield
            return
        with self._changed:
            self._visitors += 1
            try:
                while self._owner is not None:
                    self._changed.wait()
                self._owner = threading.get_ident()
            finally:
                self._visitors -= 1
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        with self._changed:
            self._owner = None
            self._changed.notify_all()
