"""`AsyncEngine`: an engine on a thread of its own, for asyncio."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

from anabranch.engine.call import Call
from anabranch.engine.engine import Engine
from anabranch.kv.cache import TreeCache
from anabranch.records.events import Event
from anabranch.strategies import Strategy
from anabranch.text.prompts import Prompt

__all__ = ["AsyncEngine"]


class AsyncEngine:
    """An `Engine` whose steps run on a thread of their own; requests are awaited, from any tasks and event loops.

    Takes `Engine`'s arguments. ``engine.engine`` is the `Engine` itself, which other Python threads may use as well,
    ``engine.cache`` its cache. A task that is cancelled, and a stream that is left, end their requests. Leaving the
    ``async with`` block (or `close`) ends all requests, with what there was so far, and frees every page.

    >>> async with ab.AsyncEngine(model, tokenizer) as engine:
    ...     answers = await asyncio.gather(*(engine.generate(p, max_new_tokens=64) for p in prompts))
    ...     async for event in engine.stream("Is the sea salty?", strategy=ab.SelfConsistency(4)):
    ...         print(event)
    """

    def __init__(self, model: Any, tokenizer: Any = None, **options: Any):
        self.engine = Engine(model, tokenizer, **options)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._door = threading.Lock()  # of what comes in, and of the end

    @property
    def cache(self) -> TreeCache:
        return self.engine.cache

    # ---------------------------------------------------------------------------------------- public

    async def generate(
        self,
        prompt: Prompt | list[Prompt],
        strategy: Strategy | None = None,
        generation_config: Any = None,
        seed: int | list[int] = 0,
        max_new_tokens: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Answer one prompt (→ `Result`) or many (→ a list), as `Engine.generate`; with ``priority=`` and
        ``deadline=`` as `Engine.add`, which also says what is raised, `QueueFull` among it.

        Cancelling the task ends the request; its pages are free with the next step.
        """
        call, many = await self._submit(prompt, strategy, generation_config, seed, max_new_tokens, kwargs, False)
        news = _News(call, self._leave)
        try:
            while not call.ended:
                await news.wait()
        finally:
            self._leave(call)
        results = call.outcome()
        return results if many else results[0]

    async def stream(
        self,
        prompt: Prompt | list[Prompt],
        strategy: Strategy | None = None,
        generation_config: Any = None,
        seed: int | list[int] = 0,
        max_new_tokens: int | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[Event]:
        """The events of a request as they happen, as `Engine.stream`; leaving the loop ends the request."""
        call, _ = await self._submit(prompt, strategy, generation_config, seed, max_new_tokens, kwargs, True)
        news = _News(call, self._leave)
        try:
            while not call.ended:
                await news.wait()
                for event in call.take():
                    yield event
            for event in call.take():
                yield event
        finally:
            self._leave(call)
        call.outcome()

    async def abort(self) -> None:
        """End everything that is running or waiting; who awaits it gets what there was so far."""
        await asyncio.to_thread(self.engine.abort)

    async def close(self) -> None:
        """End everything, free every page and stop the thread. Closing twice does nothing."""
        await asyncio.to_thread(self._close)

    async def __aenter__(self) -> AsyncEngine:
        self._start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await asyncio.shield(self.close())  # a cancelled task closes as well

    # ---------------------------------------------------------------------------------------- inside

    async def _submit(
        self, prompt: Any, strategy: Any, config: Any, seed: Any, limit: Any, kwargs: dict[str, Any], listened: bool
    ) -> tuple[Call, bool]:
        self._start()
        # Templates and tokenising take a while: not on the event loop. A task cancelled meanwhile has added nothing.
        call, many = await asyncio.to_thread(
            self.engine.prepare.call, prompt, strategy, config, seed, limit, kwargs, listened
        )
        with self._door:
            if self._stop.is_set():
                raise _closed()
            self.engine.loop.submit(call, limited=True)
        return call, many

    def _leave(self, call: Call) -> None:
        """Nobody wants the answer any more; does not wait for the step that is under way."""
        call.listener = None
        if not call.ended:
            self.engine.loop.abort([call], drop=True, wait=False)

    def _start(self) -> None:
        with self._door:
            if self._stop.is_set():
                raise _closed()
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self.engine.serve, args=(self._stop,), name="anabranch engine", daemon=True
                )
                self._thread.start()

    def _close(self) -> None:
        with self._door:  # from here on nothing comes in
            self._stop.set()
        self.engine.abort()
        if self._thread is not None:
            self._thread.join()
        self.engine.close()


class _News:
    """Wakes a task of an event loop when a call has something new."""

    def __init__(self, call: Call, leave: Callable[[Call], None]):
        self._call, self._leave = call, leave
        self._loop, self._new = asyncio.get_running_loop(), asyncio.Event()
        self._new.set()  # it may have gone on already
        call.listener = self._tell

    def _tell(self) -> None:
        """From the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._new.set)
        except RuntimeError:  # the event loop is closed, and nobody there any more
            self._leave(self._call)

    async def wait(self) -> None:
        await self._new.wait()
        self._new.clear()


def _closed() -> RuntimeError:
    return RuntimeError("this AsyncEngine is closed; make a new one")
