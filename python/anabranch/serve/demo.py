"""``anabranch demo --web``: the server's live page alone, over an engine that answers the demo's own problems."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import HTMLResponse, StreamingResponse

from anabranch.serve.live import EventFeed
from anabranch.serve.live import page as live_page


@dataclass(frozen=True)
class Shown:
    """One problem. title: what its box on the page is called. options: of ``AsyncEngine.stream``."""

    title: str
    prompt: Any
    options: dict[str, Any] = field(default_factory=dict)


class Show:
    """Answers the problems whenever somebody comes to watch and nothing is under way."""

    def __init__(self, engine: Any, shown: Sequence[Shown], failed: Callable[[str], None]):
        self.engine, self.shown, self.failed = engine, shown, failed
        self.live = EventFeed()
        self._round = 0
        self._task: asyncio.Task[None] | None = None

    async def watch(self) -> AsyncIterator[str]:
        """Server-sent events for one page; the problems begin once it hears of what happens."""
        async with aclosing(self.live.watch()) as lines:  # type: ignore[type-var]
            yield await anext(lines)
            if self._task is None or self._task.done():
                self._task = asyncio.create_task(self._run())
            async for line in lines:
                yield line

    async def close(self) -> None:
        """End what is under way."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        self._round += 1
        for one in self.shown:
            title = one.title if self._round == 1 else f"{one.title} · run {self._round}"
            try:
                async for event in self.engine.stream(one.prompt, **one.options):
                    self.live.tell(title, event)
            except Exception as error:
                self.failed(f"{one.title}: {error}")


def create_demo(engine: Any, shown: Sequence[Shown], failed: Callable[[str], None] = lambda message: None) -> FastAPI:
    """The page at ``/`` and its feed at ``/live``, as an ASGI application; no other route.

    engine: an `AsyncEngine`, opened and closed with the application. failed: told of a problem that could not be
    answered; the others go on.
    """
    show = Show(engine, shown, failed)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        async with engine:
            try:
                yield
            finally:
                await show.close()

    app = FastAPI(title="anabranch demo", lifespan=life, openapi_url=None)
    app.state.live = show.live

    @app.get("/live")
    async def live() -> Response:
        return StreamingResponse(show.watch(), media_type="text/event-stream")

    @app.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return live_page()

    return app
