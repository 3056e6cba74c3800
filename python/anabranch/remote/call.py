"""The loop of one call: strategies run here, decodes on the server; its answers are taken in order of arrival."""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from anabranch.records import events
from anabranch.records.result import Result
from anabranch.remote.request import RemoteRequest
from anabranch.threads.results import build_result

if TYPE_CHECKING:
    from anabranch.remote.engine import RemoteEngine


class RemoteCall:
    """Some prompts on their way; `buffer` holds events that nobody was handed yet."""

    def __init__(self, engine: RemoteEngine, requests: list[RemoteRequest], buffer: deque[events.Event]):
        self.engine, self.requests, self.buffer = engine, requests, buffer
        self.active = list(requests)
        self.results: list[Result | None] = [None] * len(requests)
        self.aborted = False
        self._messages: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        for request in requests:
            request.listen(self._messages.put)

    def drive(self) -> Iterator[events.Event]:
        try:
            for request in self.active:
                request.started = time.perf_counter()
                request.start_strategy()
            while self.active and not self.aborted:
                self._advance()
                while self.buffer:
                    yield self.buffer.popleft()
                if self.active and not self.aborted:
                    self._wait()
            for request in list(self.active):  # aborted: what there is so far
                for thread in request.threads[1:]:
                    request.end(thread, "killed")
                self._finish(request, "killed")
            while self.buffer:
                yield self.buffer.popleft()
        finally:
            for request in self.requests:
                request.release()

    def abort(self) -> None:
        """End it, from any Python thread."""
        self.aborted = True
        self._messages.put(lambda: None)

    def _advance(self) -> None:
        for request in list(self.active):
            begin = time.perf_counter()
            request.advance()
            request.begin_decodes()
            request.spent.seconds["strategy"] += time.perf_counter() - begin
            if request.over and not request.draining:
                self._finish(request, "finished")
            elif not request.underway:
                raise RuntimeError(
                    f"{type(request.strategy).__name__} waits for what nothing will bring: "
                    f"{request.tasks.describe_wait()}"
                )

    def _wait(self) -> None:
        """Take what the server has answered: at least one message, and all that are there."""
        begin = time.perf_counter()
        message = self._messages.get()
        waited = time.perf_counter() - begin
        for request in self.active:
            request.spent.seconds["decode"] += waited / len(self.active)
        while True:
            message()
            try:
                message = self._messages.get_nowait()
            except queue.Empty:
                return

    def _finish(self, request: RemoteRequest, fate: str) -> None:
        for thread in request.threads[1:]:
            request.end(thread, "discarded")
        request.finished, request.trunk.fate = True, fate
        self.active.remove(request)
        request.narrator.tell_rest(request.trunk)
        result = build_result(request, self._info(request), {"cached_tokens": request.cached_tokens})
        request.release()
        self.results[request.index] = result
        if request.narrator.emit:
            request.narrator.emit(events.Finish(request.index, result))

    def _info(self, request: RemoteRequest) -> dict[str, Any]:
        server = self.engine.server
        config = {k: v for k, v in request.config.to_diff_dict().items() if k != "transformers_version"}
        return {
            "model": server.model,
            "server": f"{server.dialect.name} {server.version or ''}".strip(),
            "config": config,
        }
