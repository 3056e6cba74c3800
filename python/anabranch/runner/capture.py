"""How a decode step is captured as a CUDA graph."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor


class Capture(Protocol):
    """How a forward becomes something that can be replayed. `CudaCapture` is the real one."""

    def watch(self) -> AbstractContextManager[list[str]]:
        """Look on while a forward runs as usual; the list then names all that a capture could not follow."""

    def __call__(self, forward: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """``(replay, scores)``: `forward` is called once and computes nothing yet; each replay() then does all of it
        over, on the same memory, and leaves what it returned in `scores`."""


class CudaCapture:
    """Captures with `torch.cuda.CUDAGraph`; all graphs of one CudaCapture share one memory pool, one after another."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None
        self._last: Any = None  # keeps the pool alive until the next graph has it

    @contextlib.contextmanager
    def watch(self) -> Iterator[list[str]]:
        found: list[str] = []
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield found
            finally:
                torch.cuda.set_sync_debug_mode(before)
        for w in seen:
            text = str(w.message)
            if "synchronizing CUDA operation" in text:
                found.append(f"{w.filename}, line {w.lineno}, waits for the device")
            elif "Synchronization debug mode" not in text:
                warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)

    def __call__(self, forward: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        # Not torch.cuda.graph: it collects garbage and empties the allocator's cache, for 100 ms and more each time.
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        graph = torch.cuda.CUDAGraph()
        pool = None if self._last is None else self._last.pool()
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                scores = forward()
            except BaseException:
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        current.wait_stream(self._stream)
        self._last = graph
        return graph.replay, scores
