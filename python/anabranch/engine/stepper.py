"""One step of the loop: a packed forward for all that want one, and a token for each thread whose scores are there."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from anabranch.backends.threads import torch_on_one
from anabranch.engine import logits as next_logits
from anabranch.engine.call import Call
from anabranch.engine.drafting import Drafting
from anabranch.engine.request import Request
from anabranch.engine.sampling import Sampler
from anabranch.engine.scheduler import RequestFailed, Scheduler
from anabranch.engine.thread_kv import EngineThread
from anabranch.hf.probe import own_precision
from anabranch.kv.step import Branch
from anabranch.runner.hidden import head_inputs
from anabranch.runner.linear import serves
from anabranch.threads.costs import share
from anabranch.threads.ops import record_token

if TYPE_CHECKING:
    from anabranch.engine.loop import Loop


class Touching:
    """What happens inside concerns one request: what it raises fails that request."""

    def __init__(self, loop: Loop, request: Request):
        self.loop, self.request = loop, request

    def __enter__(self) -> None:
        self.loop.touched = self.request

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if error is not None and not isinstance(error, Exception):
            return False  # `Loop.step` sees to it
        self.loop.touched = None
        if error is not None:
            self.loop.fail(self.request, error)
        return True


class Stepper:
    """Does the steps of a loop. What only one request is to blame for fails its call, and no other."""

    def __init__(self, loop: Loop, engine: Any, scheduler: Scheduler):
        self.loop, self.engine, self.scheduler = loop, engine, scheduler
        self.cache = engine.cache
        self.drafting = Drafting(engine, scheduler)

    # ---------------------------------------------------------------------------------------- one forward

    def step(self) -> None:
        """One forward for whoever is there, or none where scores wait for a token to be chosen; then a token each."""
        try:
            begin = time.perf_counter()
            self.scheduler.admit()
            share(time.perf_counter() - begin, "plan", [(request.spent, 1) for request in self.loop.active])
            if not (ready := self.drafting.level(self.scheduler.ready())):
                self._forward()
                ready = self.scheduler.ready()
        except RequestFailed as failed:
            self.loop.fail(failed.request, failed.error)
            return
        if ready:
            self.sample(ready)

    def _forward(self) -> None:
        if self.engine.compiled.to_record:
            with torch.inference_mode(), own_precision(self.cache.device):
                self.engine.compiled.record_usual(self.engine.model, self.scheduler.max_rows)
        begin = time.perf_counter()
        wanted = self.scheduler.all_wanted()
        entries = self.scheduler.choose(wanted)
        for kv, chunk, _ in entries:
            try:
                kv.thread.request.check_position(kv.thread, chunk.last_position)
            except ValueError as error:
                raise RequestFailed(kv.thread.request, error) from None
        lengths = {chunk.branch: chunk.branch.length for _, chunk, _ in entries}
        lengths.update((kv.branch, kv.branch.length) for kv in wanted if kv.branch is not None)
        try:
            step, entries = self.drafting.reserve(entries) or self.scheduler.reserve(entries, wanted)
            # Work of several requests is shared out by its rows.
            parts = [(kv.thread.request.spent, n) for kv, _, n in entries]
            if step is None:
                share(time.perf_counter() - begin, "plan", parts or [(kv.thread.request.spent, 1) for kv in wanted])
                return
            ids = [t for _, f, n in entries for t in f.token_ids[f.done : f.done + n]]
            heads = next_logits.heads(entries)
            guessed = self.drafting.heads(entries, len(heads))
            launched = time.perf_counter()
            segments = self.engine.segments
            with torch.inference_mode(), own_precision(self.cache.device), segments.adding(entries):
                logits = self._logits(ids, step, [*heads, *guessed], hooked=segments.used(entries))
                own = logits[: len(heads) or 1]
                invalid = next_logits.invalid(own, heads, entries, type(self.engine.model).__name__)
            done = time.perf_counter()
        except BaseException as error:
            self.drafting.end_step()
            self._take_back(lengths)
            if isinstance(error, Exception) and not isinstance(error, RequestFailed):
                # A forward that fails fails for all who have rows in it.
                for request in dict.fromkeys(kv.thread.request for kv, _, _ in entries):
                    self.loop.fail(request, error)
                return
            raise
        for (costs, n), (_, chunk, _) in zip(parts, entries, strict=True):
            costs.seconds["prefill" if n - chunk.drafted > 1 else "decode"] += (done - launched) * n / step.num_rows
            costs.rows += n
        for costs in dict.fromkeys(costs for costs, _ in parts):
            costs.steps += 1
        self.scheduler.steps += 1
        for kv, chunk, n in entries:
            length = chunk.branch.length - chunk.drafted
            kv.thread.request.longest_context = max(kv.thread.request.longest_context, length)
            kv.last_step = self.scheduler.steps
            chunk.done += n
            if chunk.branch is kv.branch and length > kv.reached:
                kv.reached = length
                self.scheduler.gains += 1
            if not kv.rebuilding and n - chunk.drafted <= 1:
                continue  # one more token of a thread that is there: nothing to settle or to share
            with Touching(self.loop, kv.thread.request):
                kv.settle()
                if kv.in_cache and n - chunk.drafted > 1 and kv.thread.role != "fork":
                    kv.share(self.cache)
        for request in dict.fromkeys(kv.thread.request for kv, _, _ in entries):
            request.let_go()
        for at, head in enumerate(heads):
            if head.nth == head.kv.thread.length - 1:
                head.kv.logits, head.kv.logits_at = (logits, at), head.kv.thread.length
        next_logits.record(logits, heads)
        self.drafting.keep(logits)
        usage = self.cache.usage()
        for call in dict.fromkeys(self.loop.calls[request] for request in self.loop.active):
            call.peaks.look(usage)
        for request, problem in invalid.items():
            self.loop.fail(request, problem)
        share(launched - begin + time.perf_counter() - done, "plan", parts)

    def _take_back(self, lengths: dict[Branch, int]) -> None:
        """Forget rows that were reserved and not computed; what the next step reserves is again the same."""
        for branch, length in lengths.items():
            if branch.alive and branch.length > length:
                self.cache.truncate(branch, length)

    def _logits(self, ids: list[int], step: Any, heads: list[next_logits.Head], hooked: bool) -> torch.Tensor:
        """The model's scores for some rows of a step, in order, [rows, vocabulary].

        hooked: hooks of the engine's own are at work, which neither a captured nor a compiled graph calls.
        """
        engine, device = self.engine, self.cache.device
        graphs = None if hooked else engine.graphs
        rows = [head.row for head in heads]
        if any(head.kv.wants_hidden for head in heads):  # a graph would not call the hook
            keep = torch.tensor(rows, device=device)
            with head_inputs(engine.model) as found:
                scores: torch.Tensor = engine.compiled.eager(engine.model, torch.tensor(ids, device=device), step, keep)
            next_logits.note_hidden(found, heads, type(engine.model).__name__)
            return scores
        if graphs is not None and rows == list(range(len(step.branches))) and len(rows) == step.num_rows:
            with torch_on_one(serves(engine.linear, step.num_rows)), engine.linear:
                replayed: torch.Tensor = graphs(ids, step)
            # The next replay writes over them, and a thread that pauses holds its own until it goes on.
            return replayed.clone()
        keep = torch.tensor(rows or [0], device=device)
        run = engine.compiled.eager if hooked else engine.compiled
        computed: torch.Tensor = run(engine.model, torch.tensor(ids, device=device), step, keep)
        return computed

    # ---------------------------------------------------------------------------------------- sampling

    def sample(self, ready: list[EngineThread]) -> None:
        """Give each of these threads its next token."""
        begin = time.perf_counter()
        self.scheduler.gains += 1
        ready = next_logits.within_budget(ready)
        groups: dict[Sampler, list[EngineThread]] = {}
        together: dict[Request, int] = {}
        for thread in ready:
            groups.setdefault(thread.running.sampler, []).append(thread)
        for sampler, sampled in groups.items():
            # An until() of the groups before may have killed some, or failed.
            threads = [t for t in sampled if t.alive and t.request in self.loop.calls]
            for thread, token, logprob in self._chosen(sampler, threads):
                if not thread.alive or thread.request not in self.loop.calls:
                    continue
                request = thread.request
                together[request] = together.get(request, 0) + 1
                request.max_concurrency = max(request.max_concurrency, together[request])
                thread.kv.logits, thread.running.drawn = None, None
                with Touching(self.loop, request):
                    record_token(request, thread, token, logprob if request.logprobs else None)
                    self.drafting.follow(thread, token)
        share(time.perf_counter() - begin, "sampling", [(r.spent, n) for r, n in together.items()])

    def _chosen(self, sampler: Sampler, threads: list[EngineThread]) -> list[tuple[EngineThread, int, float | None]]:
        """A token for each thread. Where that raises, each call by itself, and only those that raise again fail."""
        if not threads:
            return []
        try:
            return self._choose(sampler, threads)
        except Exception as error:
            calls: dict[Call, list[EngineThread]] = {}
            for thread in threads:
                calls.setdefault(self.loop.calls[thread.request], []).append(thread)
            if len(calls) == 1:
                self.loop.fail(threads[0].request, error)
                return []
        return [found for part in calls.values() for found in self._chosen(sampler, part)]

    def _choose(self, sampler: Sampler, threads: list[EngineThread]) -> list[tuple[EngineThread, int, float | None]]:
        on_cpu = self.cache.device.type == "cpu"
        with torch.inference_mode(), own_precision(self.cache.device), torch_on_one(sampler.by_kernels and on_cpu):
            logits = next_logits.rows([t.kv.logits for t in threads if t.kv.logits is not None])
            contexts = [lambda t=t: [*t.prefix, *t.own] for t in threads]
            tokens = sampler.choose(
                logits,
                contexts,
                [t.length for t in threads],
                [t.counted_from for t in threads],
                [_Draw(t) for t in threads],  # type: ignore[misc]
                lambda i: _place(threads[i]),
            )
            logprobs = next_logits.stats(logits, threads, tokens)
        return [(thread, token, logprobs.get(i)) for i, (thread, token) in enumerate(zip(threads, tokens, strict=True))]


class _Draw:
    """A thread's random stream, as far as its next token: drawn once, however often that token has to be chosen."""

    def __init__(self, thread: EngineThread):
        self._thread = thread

    def random(self) -> float:
        running = self._thread.running
        if running.drawn is None:
            running.drawn = self._thread.stream.random()
        return running.drawn


def _place(thread: EngineThread) -> str:
    host = thread.request
    return f"prompt {host.index}, thread {thread.id}, position {thread.position}"
