"""``anabranch serve``: an OpenAI-compatible server over an engine, or in front of another server."""

from __future__ import annotations

import os
import signal
import socket
import threading
from dataclasses import dataclass
from typing import Any

from anabranch.cli import processes
from anabranch.cli.common import USAGE, Mistake, load_model, load_tokenizer
from anabranch.viz.console import consoles

COMPILE: dict[str, bool | str] = {"auto": "auto", "now": True, "never": False}


@dataclass(frozen=True)
class Options:
    """What the command line asked for."""

    model: str
    host: str
    port: int
    api_keys: tuple[str, ...]
    name: str | None
    upstream: str | None
    upstream_key: str | None
    strategies: tuple[str, ...]
    max_requests: int
    max_tokens: int | None
    max_body: int
    num_pages: int | None
    page_size: int
    backend: str
    dtype: str
    grace: int
    tp: int = 1
    compile: str = "auto"  # a key of COMPILE


def run(options: Options) -> None:
    """The whole command."""
    try:
        from anabranch.serve import Settings
        from anabranch.serve.run import run as serve
    except ImportError as error:
        raise Mistake(f"serving needs {error.name}; pip install 'anabranch[serve]'", USAGE) from None
    from anabranch.strategies import registry

    try:
        for name in options.strategies:
            registry.find(name)
    except ValueError as error:
        raise Mistake(f"--strategy: {error}", USAGE) from None
    if options.tp > 1:
        if options.upstream is not None:
            raise Mistake("--tp: with --upstream the model runs elsewhere; leave one of them out", USAGE)
        if options.compile == "now":
            raise Mistake("--compile now: steps of several processes run as they are; leave it or --tp out", USAGE)
        processes.check(options.tp)
        if not processes.started():
            _check_free(options.host, options.port)
            processes.start(options.model, options.tp)
        if processes.rank() != 0:
            _follow(options)
            return
    _check_free(options.host, options.port)
    keys = options.api_keys or tuple(filter(None, os.environ.get("ANABRANCH_API_KEY", "").split(",")))
    _, err = consoles()
    engine = _engine(options, err)
    settings = Settings(
        options.name or options.model, keys, options.max_body, options.max_requests, options.max_tokens,
        strategies=tuple(registry.describe(n).name for n in options.strategies) or None,
    )  # fmt: skip
    where = f"http://{options.host}:{options.port}"
    err.print(f"serving {settings.model_name} at {where}/v1 · what runs shows at {where}/ · Ctrl-C ends it")
    if not keys and options.host not in ("127.0.0.1", "localhost", "::1"):
        err.print(
            "no API key is set: everybody who reaches this address may use it; pass --api-key KEY", style="yellow"
        )
    serve(engine, settings, options.host, options.port, options.grace)


def _engine(options: Options, err: Any) -> Any:
    """An engine of one's own, or the one behind --upstream."""
    import anabranch as ab

    if options.upstream is not None:
        from anabranch.serve.upstream import Upstream

        return Upstream(ab.RemoteEngine(options.upstream, load_tokenizer(options.model), options.upstream_key))
    with err.status("loading the model …"):
        model, tokenizer, _ = load_model(options.model, options.dtype, options.tp)
        engine = ab.AsyncEngine(model, tokenizer, compile=COMPILE[options.compile], **_sizes(options))
    inner = engine.engine
    threading.Thread(target=_populate, args=(inner.cache, err), name="populate", daemon=True).start()
    if options.compile == "now":
        with err.status("compiling the forward …"):
            inner.generate([0, 0], do_sample=False, min_new_tokens=8, max_new_tokens=8)
        err.print(f"steps are {'compiled' if inner.compiled else 'eager'}: {inner.compiled.reason}", markup=False)
    return engine


def _populate(cache: Any, err: Any) -> None:
    """Have the cache's memory handed out; say it where there is too little."""
    try:
        cache.populate()
    except MemoryError as error:
        err.print(f"{error}; the server ends where it needs more than there is", style="yellow", markup=False)


def _sizes(options: Options) -> dict[str, Any]:
    return {"num_pages": options.num_pages, "page_size": options.page_size, "backend": options.backend}


def _follow(options: Options) -> None:
    """Every process but the one that serves."""
    import anabranch as ab

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # answers under way are to end first: rank 0 says when
    model, _, _ = load_model(options.model, options.dtype, options.tp)
    ab.Engine(model, **_sizes(options)).follow()


def _check_free(host: str, port: int) -> None:
    """A port in use is told before the model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise Mistake(f"--host {host} --port {port}: {error.strerror or error}; pass another --port", USAGE) from None
