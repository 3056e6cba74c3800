"""The loop: one packed forward a step for all runnable threads of all requests, prefilling and decoding mixed.

It outlives a call: requests join and leave between any two steps. What goes wrong with one of them (in its strategy, a
logits processor, an ``until``) ends its own call and no other.
"""

from __future__ import annotations

import threading
import time
from bisect import insort
from collections.abc import Callable, Iterable
from itertools import count
from typing import Any

import torch

from anabranch import hf
from anabranch.backends.threads import torch_on_one
from anabranch.engine import logits as next_logits
from anabranch.engine.call import Call
from anabranch.engine.drafting import Drafting
from anabranch.engine.request import Request
from anabranch.engine.sampling import Sampler
from anabranch.engine.scheduler import RequestFailed, Scheduler
from anabranch.engine.thread_kv import EngineThread
from anabranch.engine.turns import Turns
from anabranch.errors import DeadlineExceeded, QueueFull
from anabranch.hf.probe import own_precision
from anabranch.kv.step import Branch
from anabranch.records import events
from anabranch.runner.hidden import head_inputs
from anabranch.runner.linear import serves
from anabranch.runner.modes import Evaluation
from anabranch.threads.costs import share
from anabranch.threads.ops import record_token
from anabranch.threads.results import build_result

# A request of priority p goes before those that came up to p times so many requests earlier. So whatever comes later,
# only finitely many go before one that waits: nobody starves (see scheduler.py).
HEAD_START = 100


class Loop:
    """The requests of an engine, and what carries them on. Methods without an underscore may be called from any Python
    thread; the others run inside a turn (see `Turns`)."""

    def __init__(self, engine: Any):
        self.engine, self.cache = engine, engine.cache
        self.active: list[Request] = []  # those that have begun, by their order
        self.waiting: list[Request] = []  # those that have not, likewise
        self.scheduler = Scheduler(self.cache, self.active)
        self.drafting = Drafting(engine, self.scheduler)
        self.turns = Turns()
        self.work = threading.Event()  # set when there may be something to do
        self._calls: dict[Request, Call] = {}
        self._arrivals = count()
        self._door = threading.RLock()  # of `waiting`, which others add to during a step
        self._driving = threading.Lock()  # held by the thread that steps until its own call is done
        self._sleepers: set[threading.Event] = set()  # of threads that wait while another one drives
        self._to_end = False  # whether some call was aborted or has a deadline
        self.touched: Request | None = None  # whose strategy or processors are running
        self._evaluation = Evaluation()
        self._settled = True  # whether all that could happen without a forward has happened behind the last one

    # ---------------------------------------------------------------------------------------- coming and going

    def submit(self, call: Call, limited: bool = False) -> None:
        """Take a call's requests in; they begin with the next step that has room. limited: `max_queue` holds."""
        most = self.engine.max_queue
        with self._door:
            if limited and most is not None and len(self.waiting) + len(call.requests) > most:
                raise QueueFull(
                    f"{len(self.waiting)} requests wait to begin, and the engine takes max_queue={most}; try again "
                    "when some have begun, or make the engine with a larger max_queue"
                )
            for request in call.requests:
                number = next(self._arrivals)
                request.order = (number - call.priority * HEAD_START, number)
                request.started = time.perf_counter()
                self._calls[request] = call
                insort(self.waiting, request, key=lambda r: r.order)
        self._evaluation.look_again()
        self._to_end = self._to_end or call.deadline is not None
        self.work.set()

    def abort(self, calls: Iterable[Call], drop: bool = False, wait: bool = True) -> None:
        """End calls, with what there was so far; at once, or behind the step that is under way.

        drop: nobody wants what there was. wait: return when they have ended (not inside a step: there is no waiting).
        """
        for call in calls:
            call.aborted, call.dropped = True, call.dropped or drop
        self._to_end = True
        self.work.set()
        if wait and not self.turns.mine:
            with self.turns.between():
                self._end_what_is_over()

    def abort_all(self) -> None:
        with self._door:
            calls = list(dict.fromkeys(self._calls.values()))
        self.abort(calls)

    def wait(self, call: Call, ready: Callable[[], bool], until: float | None = None) -> bool:
        """Return True as soon as ``ready()``, False at `until` (monotonic clock). Where no other thread drives the
        loop, this one does."""
        if ready():
            return True
        if self.turns.mine:
            raise RuntimeError(
                "waiting for a request inside a step (in a strategy, a logits processor or an until) would never end; "
                "use engine.generate() there, which works through its own prompts alone"
            )
        sleeper = threading.Event()
        call.sleep(sleeper)
        self._sleepers.add(sleeper)
        try:
            while not ready():
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    return False
                if self._driving.acquire(blocking=False):
                    try:
                        while not ready() and (until is None or time.monotonic() < until):
                            self.step()
                    finally:
                        self._driving.release()
                else:
                    sleeper.wait(left)
                    sleeper.clear()
            return True
        finally:
            call.wake(sleeper)
            self._sleepers.discard(sleeper)
            if not self._driving.locked():  # somebody else has to go on with it
                for other in list(self._sleepers)[:1]:
                    other.set()

    @property
    def busy(self) -> bool:
        """Whether anything is left to do."""
        return bool(self.active or self.waiting)

    # ---------------------------------------------------------------------------------------- a step

    def step(self) -> bool:
        """One packed forward for whoever is there; whether anything is left to do."""
        with self.turns.step(), self._evaluation.of(self.engine.model):
            try:
                self._end_what_is_over()
                settled, self._settled = self._settled, False
                new = self._take_up()
                self._settle(new if settled else self.active)
                self._end_what_is_over()
                if self.active:
                    self._step()
                    self._settle(self.active)
                self._settled = True
                self._end_what_is_over()
            except BaseException as error:  # Ctrl-C: who was being touched may be in any state, all others are whole
                if self.touched is not None:
                    self.fail(self.touched, error)
                raise
            finally:
                self.touched = None
                if not self.active:
                    self.drafting.close()
                    if self.engine.graphs is not None:
                        self.engine.graphs.drop()  # the model may change before the next call
        for call in dict.fromkeys(self._calls.get(request) for request in list(self.active)):
            if call is not None:
                call.tell()
        return self.busy

    def _take_up(self) -> list[Request]:
        """Begin with waiting requests, in order, as far as they fit; none passes one that waits for room."""
        self.scheduler.limits(self.engine.max_rows, self.engine.max_threads)
        begun: list[Request] = []
        while True:
            with self._door:
                if not self.waiting or (self.active and not self.scheduler.has_room(self.waiting[0])):
                    return begun
                request = self.waiting.pop(0)
                insort(self.active, request, key=lambda r: r.order)
            if not begun:
                self.scheduler.rope_rules = hf.describe(self.engine.model).rope_rules
            begun.append(request)
            with _Touching(self, request):
                request.start_strategy()

    def _settle(self, requests: Iterable[Request]) -> None:
        """Let strategies and queues go on until nothing moves; hand over what is answered."""
        for request in list(requests):
            if request not in self._calls:
                continue
            begin = time.perf_counter()
            with _Touching(self, request):
                request.advance()
                request.spent.seconds["strategy"] += time.perf_counter() - begin
                if request.over:
                    self._finish(request, "finished")

    def _finish(self, request: Request, fate: str) -> None:
        self._conclude(request, fate)
        self._remove(request)

    def _conclude(self, request: Request, fate: str) -> None:
        """Its answer, as it stands."""
        call = self._calls[request]
        for thread in request.threads[1:]:
            request.end(thread, "discarded" if fate == "finished" else "killed")
        request.finished, request.trunk.fate = True, fate
        request.narrator.tell_rest(request.trunk)
        result = build_result(request, self._info(request), call.peaks.as_metrics())
        request.release()
        call.results[request.index] = result
        if request.narrator.emit:
            request.narrator.emit(events.Finish(request.index, result))

    def _info(self, request: Request) -> dict[str, Any]:
        model = self.engine.model
        return {
            "model": getattr(model.config, "_name_or_path", "") or type(model).__name__,
            "config": dict(request.samplers.settings),
        }

    # ---------------------------------------------------------------------------------------- other ends

    def _end_what_is_over(self) -> None:
        """End calls that were aborted, or are too late."""
        if not self._to_end:
            return
        with self._door:
            calls = dict.fromkeys(self._calls.values())
        self._to_end = any(call.deadline is not None for call in calls)
        now = time.monotonic()
        for call in calls:
            late = call.deadline is not None and now >= call.deadline
            if call.dropped:
                for request in list(call.left):
                    self._drop(request)
            elif call.aborted or late:
                for request in list(call.left):
                    with _Touching(self, request):
                        self._conclude(request, "killed")
                if not call.aborted and call.error is None:
                    call.error = DeadlineExceeded(
                        "deadline: it passed before the answer was complete; give more time, a smaller "
                        "max_new_tokens or a higher priority (the error's results hold what there was so far)",
                        call.outcome(),
                    )
                for request in list(call.left):
                    self._remove(request)

    def fail(self, request: Request, error: BaseException) -> None:
        """End a request's call with an error."""
        call = self._calls.get(request)
        if call is None:
            return  # it has ended meanwhile
        if not isinstance(error, Exception):
            error = RuntimeError(f"interrupted by {type(error).__name__} in the middle of a step")
        call.error = call.error or error
        for other in list(call.left):
            self._drop(other)

    def _drop(self, request: Request) -> None:
        try:
            request.release()
        except Exception as error:  # its strategy has something to say to being ended: all pages are free by then
            call = self._calls[request]
            call.error = call.error or error
        self._remove(request)

    def _remove(self, request: Request) -> None:
        with self._door:
            call = self._calls.pop(request)
            for those in (self.active, self.waiting):
                if request in those:
                    those.remove(request)
        del call.left[request]
        if call.ended:
            call.tell()

    # ---------------------------------------------------------------------------------------- one forward

    def _step(self) -> None:
        try:
            begin = time.perf_counter()
            self.scheduler.admit()
            share(time.perf_counter() - begin, "plan", [(request.spent, 1) for request in self.active])
            if not (ready := self.drafting.level(self.scheduler.ready())):
                self._forward()
                ready = self.scheduler.ready()
        except RequestFailed as failed:
            self.fail(failed.request, failed.error)
            return
        if ready:
            self._sample(ready)

    def _forward(self) -> None:
        begin = time.perf_counter()
        wanted = self.scheduler.all_wanted()
        entries = self.scheduler.choose(wanted)
        for kv, chunk, _ in entries:
            try:
                kv.thread.request.check_position(kv.thread, chunk.position + len(chunk.token_ids) - 1)
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
                    self.fail(request, error)
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
            with _Touching(self, kv.thread.request):
                kv.settle()
        for at, head in enumerate(heads):
            if head.nth == head.kv.thread.length - 1:
                head.kv.logits, head.kv.logits_at = (logits, at), head.kv.thread.length
        next_logits.record(logits, heads)
        self.drafting.keep(logits)
        usage = self.cache.usage()
        for call in dict.fromkeys(self._calls[request] for request in self.active):
            call.peaks.look(usage)
        for request, problem in invalid.items():
            self.fail(request, problem)
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
            # A replay writes over the scores of the one before. It has rows for the same branches and no other, so all
            # who held those have gone on by a token; whoever forks or ends changes the topology, and with it the graph.
            with torch_on_one(serves(engine.linear, step.num_rows)), engine.linear:
                replayed: torch.Tensor = graphs(ids, step)
            return replayed
        keep = torch.tensor(rows or [0], device=device)
        run = engine.compiled.eager if hooked else engine.compiled
        computed: torch.Tensor = run(engine.model, torch.tensor(ids, device=device), step, keep)
        return computed

    # ---------------------------------------------------------------------------------------- sampling

    def _sample(self, ready: list[EngineThread]) -> None:
        begin = time.perf_counter()
        ready = next_logits.within_budget(ready)
        groups: dict[Sampler, list[EngineThread]] = {}
        together: dict[Request, int] = {}
        for thread in ready:
            groups.setdefault(thread.running.sampler, []).append(thread)
        for sampler, sampled in groups.items():
            # An until() of the groups before may have killed some, or failed.
            threads = [t for t in sampled if t.alive and t.request in self._calls]
            for thread, token, logprob in self._chosen(sampler, threads):
                if not thread.alive or thread.request not in self._calls:
                    continue
                request = thread.request
                together[request] = together.get(request, 0) + 1
                request.max_concurrency = max(request.max_concurrency, together[request])
                thread.kv.logits, thread.running.drawn = None, None
                with _Touching(self, request):
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
                calls.setdefault(self._calls[thread.request], []).append(thread)
            if len(calls) == 1:
                self.fail(threads[0].request, error)
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


class _Touching:
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
