"""Who gets in, and with how much: API keys and the size of a body, before anything is read or parsed."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.exceptions import HTTPException

from anabranch.serve import errors
from anabranch.serve.settings import Settings

_GUARDED = ("/v1", "/tokenize", "/live")
Asgi = Callable[[Any, Any, Any], Awaitable[None]]


class _TooLarge(HTTPException):
    """In the middle of a body; whoever reads it lets this class of exceptions through."""


class Guard:
    """ASGI middleware: 401 without a key, 413 for a body over the limit (declared, or as it comes)."""

    def __init__(self, app: Asgi, settings: Settings):
        self.app, self.settings = app, settings
        self._keys = [key.encode() for key in settings.api_keys]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        if self._keys and _guarded(scope["path"]) and not self._known(headers.get(b"authorization", b"")):
            return await errors.response(errors.Refused(401, "no such API key; send Authorization: Bearer KEY"))(
                scope, receive, send
            )
        most = self.settings.max_body
        message = f"the body is larger than this server takes ({most} bytes)"
        declared = headers.get(b"content-length", b"0")
        if not declared.isdigit() or len(declared) > 18 or int(declared) > most:
            return await errors.response(errors.Refused(413, message))(scope, receive, send)
        seen = 0
        begun = False

        async def counted() -> Any:
            nonlocal seen
            event = await receive()
            if event["type"] == "http.request":
                seen += len(event.get("body", b""))
                if seen > most:
                    raise _TooLarge(413, message)
            return event

        async def noted(event: Any) -> None:
            nonlocal begun
            begun = True
            await send(event)

        try:
            await self.app(scope, counted, noted)
        except _TooLarge:
            if not begun:
                await errors.response(errors.Refused(413, message))(scope, receive, send)

    def _known(self, header: bytes) -> bool:
        kind, _, key = header.partition(b" ")
        # Every key is compared, each in the same time whatever it shares with the one sent.
        found = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        return kind.lower() == b"bearer" and any(found)


def _guarded(path: str) -> bool:
    return any(path == prefix or path.startswith(f"{prefix}/") for prefix in _GUARDED)
