"""`Handle`: a request that the engine works on, in the hands of whoever made it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from anabranch._check import told
from anabranch.engine.call import Call
from anabranch.records.events import Event
from anabranch.records.result import Result

if TYPE_CHECKING:
    from anabranch.engine.loop import Loop

__all__ = ["Handle"]


class Handle:
    """What `Engine.add` returns. Every method may be called from any Python thread.

    Someone has to step the engine: `Engine.step`, an `AsyncEngine`'s thread, another thread's `generate`; where nobody
    does, `result` and `events` do it themselves, for all requests that are there. A handle that is dropped does not end
    its request: `abort` does.

    >>> handles = [engine.add(prompt, max_new_tokens=64) for prompt in prompts]
    >>> [handle.result().text for handle in handles]
    """

    def __init__(self, loop: Loop, call: Call):
        self._loop, self._call = loop, call

    @property
    def done(self) -> bool:
        """Whether it has come to its end: answered, failed, aborted or too late."""
        return self._call.ended

    def result(self, timeout: float | None = None) -> Result:
        """Its `Result`; waits for it, at most `timeout` seconds (None: as long as it takes).

        After `abort` this is what there was so far, with fate "killed". Raises what the request failed with: an
        exception of its strategy, a logits processor or an ``until``; ValueError where it cannot fit in the cache;
        `DeadlineExceeded`. Raises TimeoutError when `timeout` is over; the request then goes on.
        """
        end = None if timeout is None else time.monotonic() + _seconds(timeout)
        if not self._loop.wait(self._call, lambda: self._call.ended, end):
            raise TimeoutError(f"result: no answer within timeout={timeout} seconds; the request goes on")
        return self._call.outcome()[0]

    @property
    def so_far(self) -> Sequence[Event]:
        """Its events until now, the first on; grows as long as it is not done. Does not wait."""
        return self._call.events

    def events(self) -> Iterator[Event]:
        """All its events, from the first on, as they happen; the last is `Finish`. Raises what the request failed
        with."""
        call, at = self._call, 0
        while not call.ended or at < len(call.events):
            self._loop.wait(call, partial(self._moved, at))
            new = call.events[at:]
            yield from new
            at += len(new)
        call.outcome()

    def _moved(self, at: int) -> bool:
        return self._call.ended or len(self._call.events) > at

    def __iter__(self) -> Iterator[Event]:
        return self.events()

    def abort(self) -> None:
        """End it and free its pages, whatever it is doing; when this returns it has ended. (Called inside a step, by a
        strategy or a logits processor, it ends behind that step.)"""
        self._loop.abort([self._call])

    def __repr__(self) -> str:
        call = self._call
        state = "running" if not call.ended else "done" if call.error is None else f"failed: {call.error!r}"
        return f"<Handle of {type(call.requests[0].strategy).__name__}, {state}>"


def _seconds(timeout: float) -> float:
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout >= 0:
        raise ValueError(f"timeout={told(timeout)}; pass seconds ≥ 0, or None to wait as long as it takes")
    return timeout
