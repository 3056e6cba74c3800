"""What runs now, for whoever watches: events of all requests, as JSON, to every page that is open."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from importlib.resources import files
from typing import Any

from anabranch.records import events


def page() -> str:
    """The page that shows them, HTML."""
    return (files("anabranch.serve") / "page.html").read_text(encoding="utf-8")


_KEPT = 4096  # events that a slow page may be behind; then it misses some


class EventFeed:
    """Hands events to watchers; costs nothing while there are none."""

    def __init__(self) -> None:
        self._watchers: set[asyncio.Queue[str]] = set()
        self._closed = False

    def tell(self, request: str, event: events.Event) -> None:
        if not self._watchers:
            return
        found = _plain(event)
        if found is None:
            return
        line = json.dumps({"request": request, **found})
        for watcher in self._watchers:
            if not watcher.full():
                watcher.put_nowait(line)

    def close(self) -> None:
        """No more events: whoever watches is let go, so that a server's end need not wait for open pages."""
        self._closed = True
        for watcher in self._watchers:
            if not watcher.full():
                watcher.put_nowait("")

    async def watch(self) -> AsyncIterator[str]:
        """Server-sent events until the watcher leaves."""
        mine: asyncio.Queue[str] = asyncio.Queue(_KEPT)
        self._watchers.add(mine)
        try:
            yield ": watching\n\n"
            while not self._closed:
                try:
                    line = await asyncio.wait_for(mine.get(), 15)
                except asyncio.TimeoutError:
                    yield ": still here\n\n"
                    continue
                if line:
                    yield f"data: {line}\n\n"
        finally:
            self._watchers.discard(mine)


def _plain(event: events.Event) -> dict[str, Any] | None:
    if isinstance(event, events.Token):
        return {"do": "token", "prompt": event.prompt, "thread": event.thread, "text": event.text or "",
                "count": len(event.token_ids), "inserted": event.inserted}  # fmt: skip
    if isinstance(event, events.Fork):
        return {"do": "fork", "prompt": event.prompt, "thread": event.thread, "children": event.children}
    if isinstance(event, events.Join):
        return {"do": "join", "prompt": event.prompt, "thread": event.thread, "children": event.children,
                "mode": event.mode}  # fmt: skip
    if isinstance(event, events.Become):
        return {"do": "become", "prompt": event.prompt, "thread": event.thread, "source": event.source}
    if isinstance(event, events.Discard):
        return {"do": "discard", "prompt": event.prompt, "thread": event.thread, "reason": event.reason}
    if isinstance(event, events.Finish):
        return {"do": "finish", "prompt": event.prompt}
    return None
