"""``anabranch demo --web``: the tree as it grows, in a browser."""

from __future__ import annotations

import os
import socket
import sys
import webbrowser
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from anabranch.cli.common import USAGE, Mistake, load_model
from anabranch.viz.console import consoles

if TYPE_CHECKING:
    from anabranch.serve.demo import Shown

HOST = "127.0.0.1"


def run(model: str, dtype: str, port: int, shown: Callable[[Any], Sequence[Shown]]) -> None:
    """Serve the live page until Ctrl-C. port: 0 takes a free one. shown: the problems, for the model's tokenizer."""
    try:
        import uvicorn

        from anabranch.serve.demo import create_demo
        from anabranch.serve.run import Running
    except ImportError as error:
        raise Mistake(f"--web needs {error.name}; pip install 'anabranch[serve]'", USAGE) from None
    with _listening(port) as listener:
        out, err = consoles()
        with err.status("loading the model …"):
            import anabranch as ab

            weights, tokenizer, _ = load_model(model, dtype)
            engine = ab.AsyncEngine(weights, tokenizer)
        app = create_demo(engine, shown(tokenizer), lambda message: err.print(message, style="red", markup=False))
        url = f"http://{HOST}:{listener.getsockname()[1]}/"
        out.print(f"{model} at {url} · each time the page is opened, it runs · Ctrl-C ends it", highlight=False)
        if _has_browser():
            webbrowser.open(url)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=1
        )
        Running(config).run(sockets=[listener])


def _listening(port: int) -> socket.socket:
    """On this machine alone: nobody else reaches the page."""
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise Mistake(f"--port {port}: {error.strerror or error}; pass another --port, or 0", USAGE) from None
    return listener


def _has_browser() -> bool:
    """Whether there is a screen to open one on; in a terminal a text browser would take the terminal over."""
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
