"""A remote engine behind the interface of `AsyncEngine`: the same server in front of a cluster."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

from anabranch.errors import DeadlineExceeded
from anabranch.records.events import Event
from anabranch.remote import RemoteEngine

_END = object()


class Upstream:
    """Runs each request of a `RemoteEngine` on a thread of its own, where its strategy waits for the server."""

    def __init__(self, engine: RemoteEngine):
        self.engine = engine

    async def __aenter__(self) -> Upstream:
        await asyncio.to_thread(lambda: self.engine.server)  # a server that is not there is told at once
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.engine.close)

    async def stream(self, prompt: Any, *, deadline: float | None = None, **options: Any) -> AsyncIterator[Event]:
        """The events of a request; leaving the loop ends it on the server."""
        if options.pop("priority", 0):
            raise ValueError("priority: the server behind this one has none; leave it out")
        loop = asyncio.get_running_loop()
        told: asyncio.Queue[Any] = asyncio.Queue()
        left = threading.Event()

        def put(item: Any) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(told.put_nowait, item)

        events = await asyncio.to_thread(self.engine.stream, prompt, **options)

        def run() -> None:
            try:
                for event in events:
                    if left.is_set():
                        return
                    put(event)
                put(_END)
            except BaseException as error:
                put(error)
            finally:
                events.close()  # type: ignore[attr-defined]

        threading.Thread(target=run, name="anabranch upstream", daemon=True).start()
        end = None if deadline is None else loop.time() + deadline
        try:
            while True:
                left_for = None if end is None else max(0.0, end - loop.time())
                try:
                    item = await asyncio.wait_for(told.get(), left_for)
                except asyncio.TimeoutError:
                    raise DeadlineExceeded("timeout: it passed before the answer was complete") from None
                if item is _END:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            left.set()
