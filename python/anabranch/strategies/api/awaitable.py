"""What a strategy can ``yield``, and how to wait for several of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any


class ThreadGone(ValueError):
    """Something was asked of a thread that was joined, discarded or killed.

    A program that runs beside the strategy (`Thread.start`) may let it pass: it then just ends, with None.
    """


class Awaitable:
    """Something to ``yield``: it is done at some point, then has a value.

    ``clock`` is the length in tokens of the longest chain of work it depended on (a Lamport clock): the critical path
    of an answer is the clock at its end, whatever the strategy did.
    """

    def __init__(self) -> None:
        self.done = False
        self.value: Any = None
        self.clock = 0
        self._callbacks: list[Callable[[], None]] = []

    def resolve(self, value: Any, clock: int) -> None:
        """Make it done, once: whoever waits for it goes on with `value`, no earlier than `clock`."""
        if self.done:
            return
        self.done, self.value, self.clock = True, value, clock
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def when_done(self, callback: Callable[[], None]) -> None:
        """Call `callback` when it is done; at once if it is already."""
        if self.done:
            callback()
        else:
            self._callbacks.append(callback)


class Gathered(Awaitable):
    """Done when all of `items` are, with their values."""

    def __init__(self, items: Sequence[Awaitable]):
        super().__init__()
        self.items, self.missing = list(items), len(items)
        if not items:
            self.resolve([], 0)
        for item in self.items:
            item.when_done(self._one_done)

    def _one_done(self) -> None:
        self.missing -= 1
        if self.missing == 0:
            self.resolve([i.value for i in self.items], max(i.clock for i in self.items))


class First(Awaitable):
    """Done when the first of `items` is, with its index and value."""

    def __init__(self, items: Sequence[Awaitable]):
        super().__init__()
        if not items:
            raise ValueError("first(): nothing to wait for; pass at least one decode, thread or task")
        for index, item in enumerate(items):
            item.when_done(partial(self._one_done, index, item))

    def _one_done(self, index: int, item: Awaitable) -> None:
        self.resolve((index, item.value), item.clock)


@dataclass(frozen=True)
class Combined:
    """`gather` and `first` before the loop has turned generators among their items into running tasks."""

    kind: Callable[[Sequence[Awaitable]], Awaitable]
    items: tuple[Any, ...]


def gather(*items: Any) -> Any:
    """Wait for all of `items` (what ``decode``, ``insert``, ``start`` … returned, threads, generators); their values,
    in order.

    Yielding a list or tuple means the same.
    """
    return Combined(Gathered, items)


def first(*items: Any) -> Any:
    """Wait until one of `items` is done; evaluates to ``(its index, its value)``. The others go on."""
    return Combined(First, items)
