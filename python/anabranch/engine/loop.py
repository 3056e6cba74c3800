"""The loop: one packed forward a step for all runnable threads of all prompts, prefilling and decoding mixed."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from math import inf
from typing import Any

import torch

from anabranch.engine import logits as scores
from anabranch.engine.admission import Slots
from anabranch.engine.costs import Peaks, share
from anabranch.engine.request import Request
from anabranch.engine.results import build_result
from anabranch.engine.thread_state import Feed, Live
from anabranch.errors import OutOfPages
from anabranch.hf.probe import own_precision
from anabranch.records import events
from anabranch.records.result import Result
from anabranch.runner.eager import forward
from anabranch.runner.modes import evaluating
from anabranch.strategies.api.ops import Decode, Join
from anabranch.strategies.api.thread import Thread


class Run:
    """One call of generate() or stream(): drives its requests to their end, and releases everything on any way out."""

    def __init__(self, engine: Any, requests: list[Request], buffer: deque[events.Event]):
        self.engine, self.requests, self.buffer = engine, requests, buffer
        self.cache = engine.cache
        self.active = list(requests)
        self.results: list[Result | None] = [None] * len(requests)
        self.peaks = Peaks(self.cache)
        self.steps = 0
        self.aborted = False
        self._slots = None if engine.max_threads is None else Slots(engine.max_threads)
        self._decoding: dict[Request, dict[Thread, None]] = {}  # who may be given a token in this step
        self._queueing: set[Request] = set()  # requests of which some thread waits for a slot
        self._needed: set[int] = set()  # ids of the Lives that the first op of some queue needs in the cache
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
                    request.kill(thread, "killed")
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

    def _finish(self, request: Request, fate: str) -> None:
        for thread in request.threads[1:]:
            request.kill(thread, "discarded")
        request.finished, request.trunk.fate = True, fate
        self.active.remove(request)
        request.tell_rest(request.trunk)
        result = build_result(self.engine, request, self.peaks)
        request.release()
        self.results[request.index] = result
        if request.emit:
            request.emit(events.Finish(request.index, result))

    def _advance(self) -> None:
        for request in list(self.active):
            begin = time.perf_counter()
            request.advance()
            request.spent.seconds["strategy"] += time.perf_counter() - begin
            if request.over:
                self._finish(request, "finished")

    def _step(self) -> None:
        begin = time.perf_counter()
        self._admit()
        share(time.perf_counter() - begin, "plan", [(request.spent, 1) for request in self.active])
        if not (ready := self._ready()):
            self._forward()
            ready = self._ready()
        if ready:
            self._sample(ready)

    # ---------------------------------------------------------------------------------------- who wants what

    def _admit(self) -> None:
        """Settle which threads may be given a token in this step."""
        self._decoding = {request: dict.fromkeys(self._may_decode(request)) for request in self.active}
        self._queueing.clear()
        if self._slots is not None:
            admitted = set(self._slots.admit(t for threads in self._decoding.values() for t in threads))
            for request, threads in self._decoding.items():
                self._decoding[request] = {t: None for t in threads if t in admitted}
                if len(self._decoding[request]) < len(threads):
                    self._queueing.add(request)

    @staticmethod
    def _may_decode(request: Request) -> list[Thread]:
        """Threads whose queue begins with a decode; for a sequential strategy only the first that has anything to do,
        children before their parent."""
        threads = [t for t in request.queued if t._ops and t._live.born]
        if request.sequential:
            # A fork that still waits for its thread's last token keeps the turn: its children come next, not whoever
            # happens to be ready. So the order, and with it who a budget stops, does not depend on pages or chunks.
            threads = [t for t in threads if not (isinstance(op := t._ops[0], Join) and any(k._ops for k in op.kids))]
            threads = sorted(threads, key=lambda t: (*t.path, inf))[:1]
        return [t for t in threads if isinstance(t._ops[0], Decode)]

    def _ready(self) -> list[Thread]:
        """Threads that can be given a token without another forward."""
        threads = (t for decoding in self._decoding.values() for t in decoding)
        return [t for t in threads if t._live.has_scores and not t._live.pending]

    def _wanted(self, request: Request) -> list[Live]:
        """Threads that must be brought into the cache now, parents before their forks."""
        wanted: dict[Thread, None] = {}
        decoding = self._decoding[request]
        for thread in list(request.queued):
            op = thread._ops[0] if thread._ops else None
            if op is None or not thread._live.born or (isinstance(op, Decode) and thread not in decoding):
                continue
            if isinstance(op, Join) and any(kid._ops for kid in op.kids):
                continue
            for need in request.needs(op):
                self._needed.add(id(need._live))
                if not need._live.in_cache:
                    chain = [need]
                    while chain[-1]._live.branch is None and not chain[-1]._live.may_open:
                        chain.append(chain[-1].parent)  # type: ignore[arg-type]
                    wanted.update(dict.fromkeys(reversed(chain)))
        waiting = request in self._queueing or any(t._live.has_scores and not t._live.pending for t in decoding)
        if not wanted and not waiting:
            raise RuntimeError(
                f"{type(request.strategy).__name__}: nothing is left to do, but run() still waits for "
                f"{request.tasks.describe_wait()}; "
                "was the thread it waits for killed, or does a join wait for a child that waits for its parent?"
            )
        return [t._live for t in wanted]

    # ---------------------------------------------------------------------------------------- one forward

    def _forward(self) -> None:
        begin = time.perf_counter()
        self._needed.clear()
        wanted = [live for request in self.active for live in self._wanted(request)]
        entries = self._choose(wanted)
        for live, feed, _ in entries:
            live.thread._host.check_position(live.thread, feed.position + len(feed.token_ids) - 1)
        step, entries = self._reserve(entries, wanted)
        # Work of several prompts is shared out by its rows.
        parts = [(live.thread._host.spent, n) for live, _, n in entries]
        if step is None:
            share(time.perf_counter() - begin, "plan", parts or [(live.thread._host.spent, 1) for live in wanted])
            return
        ids = [t for _, f, n in entries for t in f.token_ids[f.done : f.done + n]]
        heads = scores.heads(entries)
        launched = time.perf_counter()
        with torch.inference_mode(), own_precision(self.cache.device), self.engine.linear:
            logits = self._scores(ids, step, [head.row for head in heads])
            # remove_invalid_values=True, a processor of Transformers, deals with such scores.
            if not self.requests[0].samplers.base.config.remove_invalid_values:
                scores.refuse_invalid(logits, heads, entries, type(self.engine.model).__name__, self.steps + 1)
        done = time.perf_counter()
        self.steps += 1
        for clock, n in parts:
            clock.seconds["prefill" if n > 1 else "decode"] += (done - launched) * n / step.num_rows
            clock.rows += n
        for clock in dict.fromkeys(clock for clock, _ in parts):
            clock.steps += 1
        for live, feed, n in entries:
            live.thread._host.longest_context = max(live.thread._host.longest_context, feed.branch.length)
            live.last_step = self.steps
            feed.done += n
            live.settle()
        for at, head in enumerate(heads):
            if head.nth == head.live.thread.length - 1:
                head.live.scores, head.live.scores_at = (logits, at), head.live.thread.length
        scores.record(logits, heads)
        self.peaks.look()
        share(launched - begin + time.perf_counter() - done, "plan", parts)

    def _scores(self, ids: list[int], step: Any, rows: list[int]) -> torch.Tensor:
        """The model's scores for some rows of a step, in order, [rows, vocabulary]."""
        engine, device = self.engine, self.cache.device
        if engine.graphs is not None and rows == list(range(len(step.branches))) and len(rows) == step.num_rows:
            # A replay writes over the scores of the one before. It has rows for the same branches and no other, so all
            # who held those have gone on by a token; whoever forks or ends changes the topology, and with it the graph.
            return engine.graphs(ids, step)
        keep = torch.tensor(rows or [0], device=device)
        return forward(engine.model, torch.tensor(ids, device=device), step, engine.backend, keep)

    def _choose(self, wanted: list[Live]) -> list[tuple[Live, Feed, int]]:
        """Rows of the next step: every thread that goes on by a token, then longer runs in order, in chunks."""
        room = self.engine.max_rows
        free = self.cache.usage().pages_free
        size = self.cache.page_size
        running = sum(live.branch is not None for live in wanted)
        coming = {id(live) for live in wanted}
        entries: list[tuple[Live, Feed, int]] = []
        # Longest unserved first: more threads than rows take turns.
        for live in sorted(wanted, key=lambda w: (w.pending > 1, w.last_step if w.pending <= 1 else 0)):
            if room <= 0:
                break
            if live.branch is None:
                # One that is not in the cache enters when it fits beside those that are, and leaves each a page to
                # grow; else they would push one another out in turns. Alone it may always try.
                if entries and live.pending // size + 2 + running > free:
                    continue
                if not live.may_open:
                    continue  # its parent comes first
                donor = live.donor(least=size)
                if donor is not None and donor[0].branch.length < donor[1]:
                    if id(donor[0]) in coming:
                        continue  # what they have in common is being computed
                    donor = None
                live.open(self.cache, donor)
                if live.in_cache:
                    continue
                free -= live.pending // size + 1
                running += 1
            feed = live.next_feed()
            count = min(feed.left, room)
            entries.append((live, feed, count))
            room -= count
        return entries

    def _reserve(
        self, entries: list[tuple[Live, Feed, int]], wanted: list[Live]
    ) -> tuple[Any, list[tuple[Live, Feed, int]]]:
        """Reserve the rows in the cache; in a page shortage make room: what is idle goes first, then the youngest."""
        if not entries:
            return None, entries  # only branches had to be opened
        stuck: list[Live] = []  # those that cannot go on though all that may leave has left
        while True:
            positions = {
                feed.branch: torch.arange(feed.position + feed.done, feed.position + feed.done + count, device="cpu")
                for _, feed, count in entries
                if feed.branch.position != feed.position + feed.done
            }
            try:
                return self.cache.step({feed.branch: count for _, feed, count in entries}, positions or None), entries
            except OutOfPages as error:
                shortage = error
            # The oldest always gets on, at the expense of the younger; so the loop does.
            oldest, youngest = (pick((live for live, _, _ in entries), key=Live.age) for pick in (min, max))
            victim = self._victim(oldest)
            if victim is not None:
                victim.release(self.cache)
                victim.thread._host.spent.preemptions += 1
                entries = [e for e in entries if e[0] is not victim]
                continue
            if len(entries) > 1:
                entries = [e for e in entries if e[0] is not youngest]
                continue
            # One that had no turn in this step may be older; one that cannot leave will give its pages back at its end.
            # (Any other would be pushed out again in the next step, and so on for ever.)
            stuck.append(oldest)
            others = [w for w in wanted if w.branch is not None and (w.pinned or w.age() < stuck[0].age())]
            others = [w for w in others if w not in stuck and not w.in_cache]
            if not others and (leaving := self._giving_way(stuck)) is not None:
                leaving.release(self.cache)
                leaving.thread._host.spent.preemptions += 1
                others = [w for w in stuck if w.pinned]
                stuck = [w for w in stuck if not w.pinned]
            if others:
                other = min(others, key=Live.age)
                feed = other.next_feed()
                entries = [(other, feed, min(feed.left, self.engine.max_rows))]
                continue
            live, total, size = stuck[0], self.cache.num_pages, self.cache.page_size
            raise ValueError(
                f"num_pages={total} (of {size} tokens) is too small for prompt {live.age()[0]}: thread "
                f"{live.thread.id} needs {live.thread.length} tokens beside those that cannot leave now; "
                "make the engine with a larger num_pages, "
                f"or use a shorter prompt, fewer threads or a smaller max_new_tokens ({shortage})"
            )

    def _giving_way(self, stuck: list[Live]) -> Live | None:
        """When nothing moves: the youngest of `stuck` that can leave, to let one on that cannot."""
        if not any(live.pinned for live in stuck):
            return None
        may = [live for live in stuck if live.branch is not None and not live.pinned and not _built_on(live.thread)]
        return max(may, key=Live.age, default=None)

    def _victim(self, oldest: Live) -> Live | None:
        """Whose pages to take for `oldest`: a thread that nothing waits for, else the youngest of those younger than
        it; never one that another thread in the cache is built on."""
        best: Live | None = None
        best_key: tuple[bool, int, int] | None = None
        for request in self.active:
            for thread in request.threads:
                live = thread._live
                idle = id(live) not in self._needed
                if live.branch is None or live is oldest or live.pinned or not (idle or live.age() > oldest.age()):
                    continue
                if _built_on(thread):
                    continue
                key = (idle, *live.age())
                if best_key is None or key > best_key:
                    best, best_key = live, key
        return best

    # ---------------------------------------------------------------------------------------- sampling

    def _sample(self, ready: list[Thread]) -> None:
        begin = time.perf_counter()
        ready = scores.within_budget(ready)
        groups: dict[Any, list[Thread]] = {}
        together: dict[Request, int] = {}
        for thread in ready:
            groups.setdefault(thread._ops[0]._sampler, []).append(thread)
        for sampler, sampled in groups.items():
            threads = [t for t in sampled if t.alive]  # an until() of the groups before may have killed some
            if not threads:
                continue
            with torch.inference_mode(), own_precision(self.cache.device):
                logits = scores.rows([t._live.scores for t in threads]).float()
                contexts = [lambda t=t: [*t._prefix, *t._own] for t in threads]
                tokens = sampler.choose(
                    logits,
                    contexts,
                    [t.length for t in threads],
                    [_counted_from(t) for t in threads],
                    [t._live.stream for t in threads],
                    lambda i, threads=threads: _place(threads[i]),  # type: ignore[misc]
                )
                logprobs = scores.stats(logits, threads, tokens)
            for i, (thread, token) in enumerate(zip(threads, tokens, strict=True)):
                if not thread.alive:
                    continue
                request: Any = thread._host
                together[request] = together.get(request, 0) + 1
                request.max_concurrency = max(request.max_concurrency, together[request])
                thread._live.scores = None
                request.took(thread._ops[0], token, logprobs.get(i) if request.logprobs else None)
        share(time.perf_counter() - begin, "sampling", [(r.spent, n) for r, n in together.items()])


def _counted_from(thread: Thread) -> int:
    """Length of the prompt that ``min_new_tokens`` and its like count from: the one that begins the thread's context.

    A spawned thread has its own; a fork goes on with its parent's context, and so behind its parent's prompt.
    """
    while thread.role == "fork":
        assert thread.parent is not None
        thread = thread.parent
    return thread._prompt_length


def _place(thread: Thread) -> str:
    host: Any = thread._host
    return f"prompt {host.index}, thread {thread.id}, position {thread._position}"


def _built_on(thread: Thread) -> bool:
    """Whether a child of it is in the cache."""
    return any(child._live.branch is not None for _, kids in thread._forks for child in kids)
