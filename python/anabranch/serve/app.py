"""The server's routes."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response, Security
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.security import HTTPBearer

import anabranch
from anabranch.records import events
from anabranch.records.result import Result
from anabranch.serve import errors
from anabranch.serve.answers import Follower, finish_reason, logprobs_of, text_of, usage
from anabranch.serve.asked import Asked, asked
from anabranch.serve.errors import Refused
from anabranch.serve.guard import Guard
from anabranch.serve.live import EventFeed
from anabranch.serve.live import page as live_page
from anabranch.serve.metrics import Metrics
from anabranch.serve.protocol import Chat, Completion, Tokenize
from anabranch.serve.settings import Settings
from anabranch.text.prompts import Text, check_characters

log = logging.getLogger("anabranch.serve")
T = TypeVar("T")


class Server:
    """One engine behind HTTP. engine: an `AsyncEngine`, or an `Upstream`."""

    def __init__(self, engine: Any, settings: Settings):
        self.engine, self.settings = engine, settings
        self.metrics, self.live = Metrics(), EventFeed()
        self.under_way = self.threads = 0  # prompts, and their threads
        self.open = False
        self.born = int(time.time())

    # ---------------------------------------------------------------------------------------- one request

    async def run(self, name: str, question: Asked, record: dict[str, Any]) -> AsyncIterator[events.Event]:
        """The events of a request; counts, measures and tells whoever watches."""
        copies = question.copies
        if self.under_way + len(copies) > self.settings.max_requests:
            raise Refused(429, f"{self.under_way} prompts are under way, and this server takes "
                               f"{self.settings.max_requests}; try again later", retry_after=1)  # fmt: skip
        self.under_way += len(copies)
        self.metrics.running.set(self.under_way)
        begin = time.perf_counter()
        last: dict[tuple[int, str], float] = {}
        threads = len(copies)
        self.threads += threads
        try:
            async for event in self.engine.stream(copies, strategy=question.strategy, **question.options):
                now = time.perf_counter()
                self.live.tell(name, event)
                change = _more_threads(event)
                threads, self.threads = threads + change, self.threads + change
                if isinstance(event, events.Token) and not event.inserted and event.token_ids:
                    if not last:
                        record["ttft"] = now - begin
                        self.metrics.first.observe(now - begin)
                    key = (event.prompt, event.thread)
                    if key in last:
                        self.metrics.between.observe(now - last[key])
                    last[key] = now
                elif isinstance(event, events.Finish):
                    self.metrics.answered(event.result, finish_reason(event.result, False))
                    self.metrics.whole.observe(now - begin)
                yield event
        finally:
            self.under_way -= len(copies)
            self.threads -= threads
            self.metrics.running.set(self.under_way)

    async def whole(self, request: Request, name: str, question: Asked, record: dict[str, Any]) -> list[Result]:
        """All answers of a request; a client that goes away ends it."""

        async def collect() -> list[Result]:
            found: dict[int, Result] = {}
            async for event in self.run(name, question, record):
                if isinstance(event, events.Finish):
                    found[event.prompt] = event.result
            return [found[i] for i in sorted(found)]

        return await _while_there(request, collect(), record)

    # ---------------------------------------------------------------------------------------- shapes of answers

    def choice(self, i: int, result: Result, request: Completion | Chat, question: Asked) -> dict[str, Any]:
        text, stopped = text_of(result, question.stops)
        shape: dict[str, Any] = {"index": i, "finish_reason": finish_reason(result, stopped)}
        if isinstance(request, Completion):
            if request.echo:
                text = self.prompt_text(question.copies[i], result.prompt_token_ids) + text
            shape["text"] = text
        else:
            shape["message"] = {"role": "assistant", "content": text}
        shape["logprobs"] = self.logprobs(request, result)
        if request.return_token_ids:
            shape["token_ids"] = list(result.token_ids)
            shape["prompt_token_ids"] = list(result.prompt_token_ids)
        if result.malformed:
            shape["malformed"] = list(result.malformed)
        return shape

    def logprobs(self, request: Completion | Chat, result: Result) -> dict[str, Any] | None:
        """Those of an answer, if they were asked for, in the shape of either kind of request."""
        if request.logprobs is None or request.logprobs is False:
            return None
        ids, values = logprobs_of(result.tree)
        tokens = [self.piece(t) for t in ids]
        if isinstance(request, Completion):
            top = [{t: v} for t, v in zip(tokens, values, strict=True)] if request.logprobs else None
            return {"tokens": tokens, "token_logprobs": values, "top_logprobs": top}
        return {"content": [_entry(t, v, request.top_logprobs) for t, v in zip(tokens, values, strict=True)]}

    def piece(self, token: int) -> str:
        return str(self.engine.engine.tokenizer.decode([token])) if self.engine.engine.tokenizer else ""

    def prompt_text(self, prompt: Any, token_ids: Sequence[int]) -> str:
        return prompt if isinstance(prompt, str) else str(self.engine.engine.tokenizer.decode(list(token_ids)))

    def head(self, name: str, request: Completion | Chat, chunk: bool = False) -> dict[str, Any]:
        kind = "text_completion" if isinstance(request, Completion) else f"chat.completion{'.chunk' * chunk}"
        return {"id": name, "object": kind, "created": int(time.time()), "model": self.settings.model_name}

    async def pieces(
        self, name: str, request: Completion | Chat, question: Asked, record: dict[str, Any]
    ) -> AsyncGenerator[str, None]:
        """A request's answer as server-sent events."""
        options = request.stream_options
        every = options is not None and options.threads
        followers = [Follower(question.stops) for _ in question.copies]
        results: list[Result] = []

        def chunk(i: int, text: str, thread: str | None = None, **more: Any) -> str:
            shape: dict[str, Any] = {"index": i, "finish_reason": None, "logprobs": None, **more}
            if isinstance(request, Completion):
                shape["text"] = text
            else:
                shape["delta"] = {"content": text} if text or not more else {}
            if thread is not None:
                shape["thread"] = thread
            return _sse({**self.head(name, request, True), "choices": [shape]})

        def begin() -> list[str]:
            """What stands in front of each answer."""
            if isinstance(request, Completion):
                copies = enumerate(question.copies) if request.echo else ()
                return [chunk(i, self.prompt_text(prompt, prompt), "0") for i, prompt in copies]
            role = {"delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            head = self.head(name, request, True)
            return [_sse({**head, "choices": [{"index": i, **role}]}) for i in range(len(followers))]

        begun = False
        try:
            async for event in self.run(name, question, record):
                if not begun:  # not before: what the engine refuses gets a status of its own
                    begun = True
                    for piece in begin():
                        yield piece
                follower = followers[event.prompt]
                if isinstance(event, events.Finish):
                    results.append(event.result)
                    if rest := follower.finish(event.result):
                        yield chunk(event.prompt, rest, "0")
                    _, stopped = text_of(event.result, question.stops)
                    more: dict[str, Any] = {"finish_reason": finish_reason(event.result, stopped)}
                    more["logprobs"] = self.logprobs(request, event.result)
                    if follower.rewritten:  # what was told is no longer what the answer says
                        more["rewritten"] = text_of(event.result, question.stops)[0]
                    if request.return_token_ids:
                        more["token_ids"] = list(event.result.token_ids)
                    yield chunk(event.prompt, "", "0", **more)
                    continue
                if text := follower.take(event):
                    yield chunk(event.prompt, text, "0")
                if every and isinstance(event, events.Token) and event.thread != "0" and event.text:
                    yield chunk(event.prompt, event.text, event.thread)
            counts = usage(results, len(question.prompts))
            record |= counts
            if options is not None and options.include_usage:
                yield _sse({**self.head(name, request, True), "choices": [], "usage": counts})
            record["status"] = 200
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            record["gone"] = True
            raise
        except Exception as error:
            found = errors.refused(error)
            record["status"], record["error"] = found.status, found.message
            self.metrics.failed.labels(str(found.status)).inc()
            yield _sse(errors.body(found.status, found.message, found.param))
        finally:
            _log(record)

    async def streamed(self, http: Request, pieces: AsyncGenerator[str, None], record: dict[str, Any]) -> Response:
        """The response that tells `pieces`. An error in front of the first one gets its own status."""
        try:
            first = await _while_there(http, anext(pieces), record)
        except Refused as gone:
            return errors.response(gone)
        if first.startswith('data: {"error"'):
            found = json.loads(first[len("data: ") :])["error"]
            await pieces.aclose()
            headers = {"Retry-After": "1"} if found["code"] == 429 else {}
            return JSONResponse({"error": found}, found["code"], headers)
        return StreamingResponse(_chained(first, pieces), media_type="text/event-stream")

    async def answer(self, http: Request, request: Completion | Chat) -> Response:
        name = ("cmpl-" if isinstance(request, Completion) else "chatcmpl-") + uuid.uuid4().hex
        record: dict[str, Any] = {
            "id": name, "path": http.url.path, "strategy": request.strategy, "stream": request.stream,
            "user": request.user, "begin": time.perf_counter(),
        }  # fmt: skip
        try:
            if not self.open:
                raise Refused(503, "this server is shutting down")
            question = asked(request, self.settings)
            if not request.stream:
                results = await self.whole(http, name, question, record)
        except Exception as error:
            found_error = errors.refused(error)
            if found_error.status == 500:
                log.exception("a request failed")
            record["status"], record["error"] = found_error.status, found_error.message
            self.metrics.failed.labels(str(found_error.status)).inc()
            _log(record)
            return errors.response(found_error)
        if request.stream:
            return await self.streamed(http, self.pieces(name, request, question, record), record)
        counts = usage(results, len(question.prompts))
        record |= {**counts, "status": 200}
        _log(record)
        choices = [self.choice(i, result, request, question) for i, result in enumerate(results)]
        return JSONResponse({**self.head(name, request), "choices": choices, "usage": counts})


def create_app(engine: Any, settings: Settings) -> FastAPI:
    """The server of an engine, as an ASGI application.

    engine: an `AsyncEngine`, or an `anabranch.serve.upstream.Upstream`; opened and closed with the application.

    >>> app = create_app(ab.AsyncEngine(model, tokenizer), Settings("my-model", api_keys=("secret",)))
    """
    server = Server(engine, settings)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        async with engine:
            server.open = True
            try:
                yield
            finally:
                server.open = False

    app = FastAPI(title="anabranch", version=anabranch.__version__, lifespan=life)
    app.state.server, app.state.live = server, server.live
    app.add_middleware(Guard, settings=settings)
    errors.install(app)

    # Documents what `Guard` asks for.
    keyed: Any = {"dependencies": [Security(HTTPBearer(auto_error=False))] if settings.api_keys else []}
    answered: Any = {"responses": {**errors.RESPONSES, 200: {"content": {"text/event-stream": {}}}}, **keyed}

    @app.post("/v1/completions", **answered)
    async def completions(http: Request, request: Completion) -> Response:
        return await server.answer(http, request)

    @app.post("/v1/chat/completions", **answered)
    async def chats(http: Request, request: Chat) -> Response:
        return await server.answer(http, request)

    @app.get("/v1/models", responses=errors.RESPONSES, **keyed)
    async def models() -> Any:
        entry = {"id": settings.model_name, "object": "model", "created": server.born, "owned_by": "anabranch"}
        return {"object": "list", "data": [entry]}

    @app.post("/tokenize", responses=errors.RESPONSES, **keyed)
    async def tokenize(request: Tokenize) -> Any:
        if request.model not in (None, settings.model_name):
            raise Refused(404, f"model {request.model!r} is not served here", "model")
        inner = engine.engine
        text = Text(inner.tokenizer, inner.vocab_size)
        if request.messages is not None:
            ids = text.prompt_ids([m.plain() for m in request.messages], template={})
        else:
            assert request.prompt is not None
            check_characters(request.prompt, "prompt")
            ids = list(inner.tokenizer(request.prompt, add_special_tokens=request.add_special_tokens)["input_ids"])
        return {"tokens": ids, "count": len(ids)}

    @app.get("/health", responses={503: {"content": {"application/json": {}}}})
    async def health() -> Response:
        lost = getattr(server.engine.engine, "lost", None)
        status = "closing" if not server.open else "ok" if lost is None else f"dead: {lost}"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    @app.get("/version")
    async def version() -> Any:
        return {"version": anabranch.__version__}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        _look(server)
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/live", response_class=StreamingResponse, **answered)
    async def live() -> Response:
        return StreamingResponse(server.live.watch(), media_type="text/event-stream")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> str:
        return live_page()

    return app


def _look(server: Server) -> None:
    """Gauges of what the engine holds now; a server behind this one keeps its own."""
    server.metrics.threads.set(server.threads)
    cache = getattr(server.engine, "cache", None)
    if cache is not None:
        held, stats = cache.usage(), server.engine.engine.stats()
        server.metrics.cache.set((held.pages_total - held.pages_free) / held.pages_total)
        server.metrics.pages_copied.set(held.pages_copied)
        server.metrics.waiting.set(stats.waiting)


def _more_threads(event: events.Event) -> int:
    """By how many an event changes the threads under way."""
    if isinstance(event, events.Fork):
        return len(event.children)
    if isinstance(event, events.Join):
        return -len(event.children)
    return -1 if isinstance(event, (events.Discard, events.Finish)) else 0


async def _while_there(request: Request, work: Awaitable[T], record: dict[str, Any]) -> T:
    """What `work` comes to; a client that goes away ends it, with `Refused`."""

    async def waited() -> T:
        return await work

    doing, gone = asyncio.create_task(waited()), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait((doing, gone), return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            record["gone"] = True
            raise Refused(499, "the client went away")
        return doing.result()
    finally:
        for task in (doing, gone):
            task.cancel()
        await asyncio.gather(doing, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    """Return when the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _chained(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    yield first
    async for piece in rest:
        yield piece


def _sse(what: Any) -> str:
    # In ASCII: many clients take U+0085, U+2028 and the like in a text for ends of lines.
    return f"data: {json.dumps(what)}\n\n"


def _entry(token: str, logprob: float, top: int | None) -> dict[str, Any]:
    entry = {"token": token, "logprob": logprob, "bytes": list(token.encode())}
    return {**entry, "top_logprobs": [entry] if top else []}


def _log(record: dict[str, Any]) -> None:
    record["seconds"] = round(time.perf_counter() - record.pop("begin"), 4)
    if "ttft" in record:
        record["ttft"] = round(record["ttft"], 4)
    log.info(json.dumps({k: v for k, v in record.items() if v is not None}))
