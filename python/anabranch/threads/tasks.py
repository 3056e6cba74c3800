"""Runs the generators of one prompt's strategy: resumes each when what it yielded is done."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from inspect import isgenerator
from typing import Any

from anabranch.strategies.api.awaitable import Awaitable, Combined, First, Gathered, ThreadGone
from anabranch.strategies.api.thread import Thread


class Task(Awaitable):
    """A running generator; done, with what it returned, when it is exhausted. ``now`` is its Lamport clock."""

    def __init__(self, generator: Generator[Any, Any, Any], now: int):
        super().__init__()
        self.generator, self.now = generator, now
        self.waiting_for: Any = None
        self.racing = False  # it waits for the first of several
        self.beside = False  # started by another task


class Tasks:
    """All generators of one prompt; `drained`: what to wait for where a thread is yielded."""

    def __init__(self, name: str, drained: Callable[[Thread], Awaitable]) -> None:
        self.name, self._drained = name, drained
        self.current: Task | None = None
        self.turn = 0  # how often a generator was resumed
        self._ready: deque[tuple[Task, Awaitable | None]] = deque()
        self._all: list[Task] = []

    @property
    def due(self) -> bool:
        """Whether some generator can go on, so that what it asks for next is not known yet."""
        return bool(self._ready)

    def start(self, generator: Any, now: int) -> Task:
        if not isgenerator(generator):
            raise TypeError(
                f"{self.name}: start() takes a generator (call the function that has the yield), got {generator!r}"
            )
        task = Task(generator, now)
        task.beside = self.current is not None
        self._all.append(task)
        self._ready.append((task, None))
        return task

    def run_ready(self) -> bool:
        """Resume whatever can go on, until nothing can; whether anything did."""
        moved = bool(self._ready)
        while self._ready:
            task, waited = self._ready.popleft()
            self._advance(task, waited)
        return moved

    def _advance(self, task: Task, waited: Awaitable | None) -> None:
        self.turn += 1
        value = None
        if waited is not None:
            value, task.now = waited.value, max(task.now, waited.clock)
        outer, self.current = self.current, task
        try:
            yielded = task.generator.send(value)
            try:
                target = self._awaitable(yielded, task)
            except TypeError as error:
                yielded = task.generator.throw(error)  # so that the traceback shows the strategy's own line
                target = self._awaitable(yielded, task)
        except StopIteration as stop:
            task.resolve(stop.value, task.now)
            return
        except ThreadGone:
            if not task.beside:
                raise
            task.resolve(None, task.now)  # its thread was taken away
            return
        finally:
            self.current = outer
        task.waiting_for, task.racing = yielded, isinstance(target, First)
        target.when_done(lambda: self._ready.append((task, target)))

    def _awaitable(self, item: Any, task: Task) -> Awaitable:
        if isinstance(item, Awaitable):
            return item
        if isinstance(item, Thread):
            return self._drained(item)
        if isinstance(item, (list, tuple)):
            return Gathered([self._awaitable(i, task) for i in item])
        if isinstance(item, Combined):
            return item.kind([self._awaitable(i, task) for i in item.items])
        if isgenerator(item):
            return self.start(item, task.now)
        raise TypeError(
            f"{self.name} yielded {item!r}; yield what decode(), insert(), join(), start(), gather() or first() "
            "returned, a thread, a generator, or a list of these"
        )

    @property
    def racing(self) -> bool:
        """Whether it matters to some generator which of several is done first."""
        return any(task.racing and not task.done for task in self._all)

    def describe_wait(self) -> str:
        return "; ".join(repr(t.waiting_for) for t in self._all if not t.done) or "nothing"

    def close(self) -> None:
        """End all generators where they stand (their ``finally`` blocks run)."""
        for task in self._all:
            task.generator.close()
