"""HTTP to a server: one asyncio loop in a thread of its own, retries with back-off, and server-sent events."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import Future
from typing import Any

import httpx

from anabranch.errors import RemoteError

RETRIED = (429, 502, 503, 504)  # busy, or not there yet


class Loop:
    """An asyncio loop on a daemon thread, so that a caller needs none and may have one."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="anabranch-remote", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        """Begin `work`; cancelling the future closes its connection, which ends the work on the server."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def close(self) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(timeout=5)
            self.loop.close()


class Connection:
    """A server's address, with what every request to it needs.

    timeout: seconds without a byte after which a request is given up. retries: how often a request is tried again
    after a connection error or one of the statuses 429, 502, 503 and 504, with waits that double from `backoff`
    seconds (or as ``Retry-After`` says).
    """

    def __init__(
        self,
        url: str,
        api_key: str | None,
        *,
        timeout: float,
        retries: int,
        backoff: float = 0.25,
        transport: Any = None,
    ):
        self.url, self.retries, self.backoff = url.rstrip("/"), retries, backoff
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(timeout, connect=min(timeout, 10.0), pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            transport=transport,
        )

    @property
    def root(self) -> str:
        """The server's address without the API's version: where /health, /version and the like are."""
        return self.url.removesuffix("/v1")

    async def close(self) -> None:
        await self._client.aclose()

    async def get(self, url: str) -> Any:
        """The JSON at `url`; None where the server has no such page."""
        response = await self._tried("GET", url, None)
        if response.status_code in (404, 405, 501):
            return None
        self._refuse(response.status_code, response.text, url)
        try:
            return response.json()
        except ValueError:
            return None

    async def post(self, url: str, payload: Any) -> Any:
        """The JSON answer to `payload`; None where the server has no such page."""
        response = await self._tried("POST", url, payload)
        if response.status_code in (404, 405, 501):
            return None
        self._refuse(response.status_code, response.text, url)
        return _parsed(response.text, url)

    async def _tried(self, method: str, url: str, payload: Any) -> httpx.Response:
        for attempt in range(self.retries + 1):
            try:
                response = await self._client.request(method, url, json=payload)
            except httpx.TransportError as error:
                await self._wait(attempt, url, error, None)
                continue
            if response.status_code not in RETRIED or attempt == self.retries:
                return response
            await self._wait(attempt, url, None, response.headers.get("retry-after"))
        raise AssertionError("unreachable")

    async def events(self, url: str, payload: Any) -> AsyncIterator[dict[str, Any]]:
        """The server-sent events of one request, as dicts.

        Retries until the first of them; raises ConnectionError when the connection breaks after it: whoever reads
        knows what had come, and can ask for the rest.
        """
        for attempt in range(self.retries + 1):
            begun = False
            try:
                async with self._client.stream("POST", url, json=payload) as response:
                    if response.status_code in RETRIED and attempt < self.retries:
                        await self._wait(attempt, url, None, response.headers.get("retry-after"))
                        continue
                    if response.status_code != 200:
                        await response.aread()
                        self._refuse(response.status_code, response.text, url)
                    done = False
                    async for line in _lines(response):
                        if not line.startswith("data:"):
                            continue
                        data = line[len("data:") :].strip()
                        if data == "[DONE]":
                            done = True
                            break
                        event = _parsed(data, url)
                        if "error" in event:
                            raise RemoteError(f"{url}: the server reports {_message(event)}")
                        begun = True
                        yield event
                    if not done and not begun:
                        raise httpx.RemoteProtocolError("the answer ended before it began")
                    return
            except httpx.TransportError as error:
                if begun:
                    raise ConnectionError(f"{url}: {_named(error)}") from error
                await self._wait(attempt, url, error, None)

    async def _wait(self, attempt: int, url: str, error: Exception | None, retry_after: str | None) -> None:
        if attempt >= self.retries:
            assert error is not None
            what = "timed out" if isinstance(error, httpx.TimeoutException) else "cannot be reached"
            raise RemoteError(
                f"{url}: the server {what} after {attempt + 1} attempts ({_named(error)}); check that it runs and the "
                "address, or pass a longer timeout= or more retries="
            ) from error
        seconds = self.backoff * 2**attempt * random.uniform(0.75, 1.25)
        if retry_after is not None and retry_after.replace(".", "", 1).isdigit():
            seconds = max(seconds, float(retry_after))
        await asyncio.sleep(min(seconds, 30.0))

    def _refuse(self, status: int, text: str, url: str) -> None:
        if status < 400:
            return
        try:
            message = _message(json.loads(text))
        except ValueError:
            message = text.strip()[:300] or "no explanation"
        if status in (401, 403):
            raise RemoteError(f"{url}: the server refuses the API key ({status}: {message}); pass api_key=")
        raise RemoteError(f"{url}: the server answers {status}: {message}")


async def _lines(response: httpx.Response) -> AsyncIterator[str]:
    """Lines of server-sent events, which end where the format says: httpx would split at a U+2028 in a text as well."""
    rest = b""
    async for piece in response.aiter_bytes():
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            yield line.decode("utf-8", "replace")
    yield rest.decode("utf-8", "replace")


def _parsed(text: str, url: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise RemoteError(f"{url}: the server sends no JSON: {text[:200]!r}") from error
    if not isinstance(found, dict):
        raise RemoteError(f"{url}: the server sends {text[:200]!r} where an object is expected")
    return found


def _message(event: Any) -> str:
    """What an error object says, in OpenAI's shape or in another."""
    found = event.get("error", event) if isinstance(event, dict) else event
    if isinstance(found, dict):
        found = found.get("message", found.get("detail", found))
    return str(found)[:500]


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
