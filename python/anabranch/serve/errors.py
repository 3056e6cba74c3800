"""Errors in OpenAI's shape."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from anabranch.errors import DeadlineExceeded, QueueFull, RankLost, RemoteError

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class Problem(BaseModel):
    message: str
    type: str
    param: str | None
    code: int


class Failure(BaseModel):
    """The body of every error."""

    error: Problem


#: for the OpenAPI document
RESPONSES: dict[int | str, dict[str, Any]] = {"4XX": {"model": Failure}, "5XX": {"model": Failure}}


class Refused(Exception):
    """A request that gets an error for an answer."""

    def __init__(self, status: int, message: str, param: str | None = None, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.retry_after = status, message, param, retry_after


def body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    message, param = _encodable(message), None if param is None else _encodable(param)
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def _encodable(text: str) -> str:
    """A client's own words may hold halves of surrogate pairs."""
    return text.encode("utf-8", "backslashreplace").decode()


def refused(error: Exception) -> Refused:
    """What a client is told of an exception."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, QueueFull):
        return Refused(429, str(error), retry_after=1)
    if isinstance(error, (DeadlineExceeded, TimeoutError)):
        return Refused(408, str(error) or "timeout: it passed before the answer was complete", "timeout")
    if isinstance(error, RemoteError):
        return Refused(502, str(error))
    if isinstance(error, RankLost):
        return Refused(503, str(error))
    if isinstance(error, (ValueError, TypeError)):
        return Refused(400, str(error))
    return Refused(500, f"{type(error).__name__}: {error}")


def response(error: Refused) -> JSONResponse:
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return JSONResponse(body(error.status, error.message, error.param), error.status, headers)


def install(app: FastAPI) -> None:
    """Have every error of `app` read alike."""

    @app.exception_handler(Refused)
    async def _refused(_: Request, error: Refused) -> JSONResponse:
        return response(error)

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        what = str(first["msg"]).removeprefix("Value error, ")
        what = f"{where}: {what}" if where else what
        return response(Refused(400, what, where or None))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(body(error.status_code, message), error.status_code, error.headers)

    async def _failed(_: Request, error: Exception) -> JSONResponse:
        return response(refused(error))

    # Those that are told to clients by a status of their own; any other is raised again behind its answer, and logged.
    for kind in (ValueError, TypeError, QueueFull, RankLost, RemoteError, TimeoutError, Exception):
        app.add_exception_handler(kind, _failed)
