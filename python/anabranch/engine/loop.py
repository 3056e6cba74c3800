"""The loop: one packed forward a step for all runnable threads of all prompts, prefilling and decoding mixed."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch

from anabranch.engine import logits as next_logits
from anabranch.engine.drafting import Drafting
from anabranch.engine.peaks import Peaks
from anabranch.engine.request import Request
from anabranch.engine.scheduler import Scheduler
from anabranch.engine.thread_kv import EngineThread
from anabranch.hf.probe import own_precision
from anabranch.records import events
from anabranch.records.result import Result
from anabranch.runner.eager import forward
from anabranch.runner.modes import evaluating
from anabranch.threads.costs import share
from anabranch.threads.ops import record_token
from anabranch.threads.results import build_result


class Call:
    """One call of generate() or stream(): drives its requests to their end, and releases everything on any way out."""

    def __init__(self, engine: Any, requests: list[Request], buffer: deque[events.Event]):
        self.engine, self.requests, self.buffer = engine, requests, buffer
        self.cache = engine.cache
        self.active = list(requests)
        self.results: list[Result | None] = [None] * len(requests)
        self.peaks = Peaks(self.cache)
        self.steps = 0
        self.aborted = False
        self.scheduler = Scheduler(self.cache, self.active, engine.max_rows, engine.max_threads)
        self.drafting = Drafting(engine, self.scheduler)
        self._busy_in: int | None = None  # id of the Python thread that is inside the loop right now
        self._ended = threading.Event()

    # ---------------------------------------------------------------------------------------- life

    def drive(self) -> Iterator[events.Event]:
        with evaluating(self.engine.model):
            yield from self._drive()

    def _drive(self) -> Iterator[events.Event]:
        self._busy_in = threading.get_ident()
        try:
            for request in self.active:
                request.start_strategy()
            while self.active and not self.aborted:
                self._advance()
                if self.buffer:
                    yield from self._hand_out()
                if self.active and not self.aborted:
                    self._step()
            for request in list(self.active):  # aborted: what there is so far
                for thread in request.threads[1:]:
                    request.end(thread, "killed")
                self._finish(request, "killed")
            yield from self._hand_out()
        finally:
            self.release()
            if self.engine.graphs is not None:
                self.engine.graphs.drop()  # the model may change before the next call
            self._busy_in = None
            self._ended.set()

    def _hand_out(self) -> Iterator[events.Event]:
        while self.buffer:
            event = self.buffer.popleft()
            self._busy_in = None
            yield event
            self._busy_in = threading.get_ident()

    def abort(self) -> None:
        """End it: at once if it is suspended (a stream between two events) or runs in another Python thread."""
        self.aborted = True
        if self._busy_in is None:
            self.release()
        elif self._busy_in != threading.get_ident():
            self._ended.wait()

    def release(self) -> None:
        for request in self.requests:
            request.release()
        self.drafting.close()

    def _finish(self, request: Request, fate: str) -> None:
        for thread in request.threads[1:]:
            request.end(thread, "discarded")
        request.finished, request.trunk.fate = True, fate
        self.active.remove(request)
        request.narrator.tell_rest(request.trunk)
        result = build_result(request, self._info(request), self.peaks.as_metrics())
        request.release()
        self.results[request.index] = result
        if request.narrator.emit:
            request.narrator.emit(events.Finish(request.index, result))

    def _info(self, request: Request) -> dict[str, Any]:
        model = self.engine.model
        return {
            "model": getattr(model.config, "_name_or_path", "") or type(model).__name__,
            "config": dict(request.samplers.settings),
        }

    def _advance(self) -> None:
        for request in list(self.active):
            begin = time.perf_counter()
            request.advance()
            request.spent.seconds["strategy"] += time.perf_counter() - begin
            if request.over:
                self._finish(request, "finished")

    def _step(self) -> None:
        begin = time.perf_counter()
        self.scheduler.admit()
        share(time.perf_counter() - begin, "plan", [(request.spent, 1) for request in self.active])
        if not (ready := self.drafting.level(self.scheduler.ready())):
            self._forward()
            ready = self.scheduler.ready()
        if ready:
            self._sample(ready)

    # ---------------------------------------------------------------------------------------- who wants what

    # ---------------------------------------------------------------------------------------- one forward

    def _forward(self) -> None:
        begin = time.perf_counter()
        wanted = self.scheduler.all_wanted()
        entries = self.scheduler.choose(wanted)
        for kv, chunk, _ in entries:
            kv.thread.request.check_position(kv.thread, chunk.position + len(chunk.token_ids) - 1)
        step, entries = self.drafting.reserve(entries) or self.scheduler.reserve(entries, wanted)
        # Work of several prompts is shared out by its rows.
        parts = [(kv.thread.request.spent, n) for kv, _, n in entries]
        if step is None:
            share(time.perf_counter() - begin, "plan", parts or [(kv.thread.request.spent, 1) for kv in wanted])
            return
        ids = [t for _, f, n in entries for t in f.token_ids[f.done : f.done + n]]
        heads = next_logits.heads(entries)
        guessed = self.drafting.heads(entries, len(heads))
        launched = time.perf_counter()
        with torch.inference_mode(), own_precision(self.cache.device), self.engine.linear:
            logits = self._logits(ids, step, [head.row for head in (*heads, *guessed)])
            # remove_invalid_values=True, a processor of Transformers, deals with such next_logits.
            if not self.requests[0].samplers.base.config.remove_invalid_values:
                next_logits.refuse_invalid(
                    logits[: len(heads) or 1], heads, entries, type(self.engine.model).__name__, self.steps + 1
                )
        done = time.perf_counter()
        self.steps += 1
        for (costs, n), (_, chunk, _) in zip(parts, entries, strict=True):
            costs.seconds["prefill" if n - chunk.drafted > 1 else "decode"] += (done - launched) * n / step.num_rows
            costs.rows += n
        for costs in dict.fromkeys(costs for costs, _ in parts):
            costs.steps += 1
        for kv, chunk, n in entries:
            length = chunk.branch.length - chunk.drafted
            kv.thread.request.longest_context = max(kv.thread.request.longest_context, length)
            kv.last_step = self.steps
            chunk.done += n
            kv.settle()
        for at, head in enumerate(heads):
            if head.nth == head.kv.thread.length - 1:
                head.kv.logits, head.kv.logits_at = (logits, at), head.kv.thread.length
        next_logits.record(logits, heads)
        self.drafting.keep(logits)
        self.peaks.look()
        share(launched - begin + time.perf_counter() - done, "plan", parts)

    def _logits(self, ids: list[int], step: Any, rows: list[int]) -> torch.Tensor:
        """The model's scores for some rows of a step, in order, [rows, vocabulary]."""
        engine, device = self.engine, self.cache.device
        if engine.graphs is not None and rows == list(range(len(step.branches))) and len(rows) == step.num_rows:
            # A replay writes over the scores of the one before. It has rows for the same branches and no other, so all
            # who held those have gone on by a token; whoever forks or ends changes the topology, and with it the graph.
            logits: torch.Tensor = engine.graphs(ids, step)
            return logits
        keep = torch.tensor(rows or [0], device=device)
        return forward(engine.model, torch.tensor(ids, device=device), step, engine.backend, keep)

    # ---------------------------------------------------------------------------------------- sampling

    def _sample(self, ready: list[EngineThread]) -> None:
        begin = time.perf_counter()
        ready = next_logits.within_budget(ready)
        groups: dict[Any, list[EngineThread]] = {}
        together: dict[Request, int] = {}
        for thread in ready:
            groups.setdefault(thread.running.sampler, []).append(thread)
        for sampler, sampled in groups.items():
            threads = [t for t in sampled if t.alive]  # an until() of the groups before may have killed some
            if not threads:
                continue
            with torch.inference_mode(), own_precision(self.cache.device):
                logits = next_logits.rows([t.kv.logits for t in threads if t.kv.logits is not None]).float()
                contexts = [lambda t=t: [*t.prefix, *t.own] for t in threads]
                tokens = sampler.choose(
                    logits,
                    contexts,
                    [t.length for t in threads],
                    [t.counted_from for t in threads],
                    [t.stream for t in threads],
                    lambda i, threads=threads: _place(threads[i]),
                )
                logprobs = next_logits.stats(logits, threads, tokens)
            for i, (thread, token) in enumerate(zip(threads, tokens, strict=True)):
                if not thread.alive:
                    continue
                request = thread.request
                together[request] = together.get(request, 0) + 1
                request.max_concurrency = max(request.max_concurrency, together[request])
                thread.kv.logits = None
                record_token(request, thread, token, logprobs.get(i) if request.logprobs else None)
                self.drafting.follow(thread, token)
        share(time.perf_counter() - begin, "sampling", [(r.spent, n) for r, n in together.items()])


def _place(thread: EngineThread) -> str:
    host = thread.request
    return f"prompt {host.index}, thread {thread.id}, position {thread.position}"
