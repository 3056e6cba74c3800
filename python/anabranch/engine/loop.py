"""The loop: one packed forward a step for all runnable threads of all prompts, prefilling and decoding mixed."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from typing import Any

import torch

from ..errors import OutOfPages
from ..hf import tree_mask
from ..strategies.ops import Decode, Join
from ..strategies.protocol import Thread
from . import events
from .live import Feed, Live
from .request import Request
from .result import Result, build_result
from .sampling import token_stats


@dataclass
class Clock:
    """Seconds by phase, and what the cache held at most, over one run (all its prompts)."""

    prefill: float = 0.0
    decode: float = 0.0
    plan: float = 0.0  # choosing rows, reserving pages, building the step
    strategy: float = 0.0  # strategies, forks, joins, the queues
    sampling: float = 0.0
    steps: int = 0
    rows: int = 0
    preemptions: int = 0
    pages_peak: int = 0
    tokens_logical_peak: int = 0
    tokens_physical_peak: int = 0
    pages_copied_before: int = 0


class Run:
    """One call of generate() or stream(): drives its requests to their end, and releases everything on any way out."""

    def __init__(self, engine: Any, requests: list[Request], buffer: deque[events.Event]):
        self.engine, self.requests, self.buffer = engine, requests, buffer
        self.cache = engine.cache
        self.active = list(requests)
        self.results: list[Result | None] = [None] * len(requests)
        self.clock = Clock(pages_copied_before=self.cache.usage().pages_copied)
        self.aborted = False
        self._needed: set[int] = set()  # ids of the Lives that the first op of some queue needs in the cache
        self._busy_in: int | None = None  # id of the Python thread that is inside the loop right now
        self._ended = threading.Event()

    # ---------------------------------------------------------------------------------------- life

    def drive(self) -> Iterator[events.Event]:
        model = self.engine.model
        was_training = model.training
        self._busy_in = threading.get_ident()
        try:
            if was_training:
                model.eval()
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
            if was_training:
                model.train()
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
        result = build_result(self.engine, request, self.clock)
        request.release()
        self.results[request.index] = result
        if request.emit:
            request.emit(events.Finish(request.index, result))

    def _advance(self) -> None:
        begin = time.perf_counter()
        for request in list(self.active):
            request.advance()
            if request.over:
                self.clock.strategy += time.perf_counter() - begin
                self._finish(request, "finished")
                begin = time.perf_counter()
        self.clock.strategy += time.perf_counter() - begin

    def _step(self) -> None:
        if not (ready := self._ready()):
            self._forward()
            ready = self._ready()
        if ready:
            self._sample(ready)

    def _ready(self) -> list[Thread]:
        """Threads that can be given a token without another forward."""
        threads = (t for request in self.active for t in self._may_decode(request))
        return [t for t in threads if t._live.has_scores and not t._live.pending]

    # ---------------------------------------------------------------------------------------- who wants what

    @staticmethod
    def _may_decode(request: Request) -> list[Thread]:
        """Threads whose queue begins with a decode; for a sequential strategy only the first, children first."""
        threads = [t for t in request.queued if t._ops and isinstance(t._ops[0], Decode) and t._live.born]
        if request.sequential and threads:
            return [min(threads, key=lambda t: (*t.path, inf))]
        return threads

    def _wanted(self, request: Request) -> list[Live]:
        """Threads that must be brought into the cache now, parents before their forks."""
        wanted: dict[Thread, None] = {}
        decoding = self._may_decode(request)
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
        if not wanted and not any(t._live.has_scores and not t._live.pending for t in decoding):
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
        step, entries = self._reserve(entries, wanted)
        if step is None:
            self.clock.plan += time.perf_counter() - begin
            return
        device = self.cache.device
        ids = torch.tensor([t for _, f, n in entries for t in f.token_ids[f.done : f.done + n]], device=device)
        # Only threads whose last token is now in need the head. Lengths already include this step.
        keep = [
            i
            for i, (live, f, n) in enumerate(entries)
            if f.branch is live.branch and f.branch.length == live.thread.length
        ]
        head = {entry: row for row, entry in enumerate(keep)}
        last = step.last_rows[torch.tensor(keep or [0], device=device)]
        options = {} if self.engine.backend == "auto" else {"tree_backend": self.engine.backend}
        forward = time.perf_counter()
        with torch.inference_mode(), self.engine.linear:
            logits = self.engine.model(
                input_ids=ids[None],
                position_ids=step.position_ids[None],
                tree_step=step,
                use_cache=False,
                attention_mask=tree_mask(step),
                logits_to_keep=last,
                **options,
            ).logits[0]
            self._check(logits, keep, entries)
        done = time.perf_counter()
        clock, rows = self.clock, sum(n for _, _, n in entries)
        prefill = sum(n for _, _, n in entries if n > 1)
        clock.steps += 1
        clock.rows += rows
        clock.prefill += (done - forward) * prefill / rows
        clock.decode += (done - forward) * (rows - prefill) / rows
        for i, (live, feed, n) in enumerate(entries):
            live.thread._host.longest_context = max(live.thread._host.longest_context, feed.branch.length)
            live.last_step = clock.steps
            feed.done += n
            live.settle()
            if i in head:
                live.scores, live.scores_at = (logits, head[i]), live.thread.length
        usage = self.cache.usage()
        clock.pages_peak = max(clock.pages_peak, usage.pages_total - usage.pages_free)
        clock.tokens_logical_peak = max(clock.tokens_logical_peak, usage.tokens_logical)
        clock.tokens_physical_peak = max(clock.tokens_physical_peak, usage.tokens_physical)
        clock.plan += forward - begin + time.perf_counter() - done

    def _choose(self, wanted: list[Live]) -> list[tuple[Live, Feed, int]]:
        """Rows of the next step: every thread that goes on by a token, then longer runs in order, in chunks."""
        room = self.engine.max_rows
        free = self.cache.usage().pages_free
        size = self.cache.page_size
        running = sum(live.branch is not None for live in wanted)
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
                live.open(self.cache)
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
        while True:
            positions = {
                feed.branch: torch.arange(feed.position + feed.done, feed.position + feed.done + count)
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
                self.clock.preemptions += 1
                entries = [e for e in entries if e[0] is not victim]
            elif len(entries) > 1:
                entries = [e for e in entries if e[0] is not youngest]
            elif older := [w for w in wanted if w.branch is not None and w.age() < oldest.age()]:
                first = min(older, key=Live.age)  # it had no turn in this step, but it is the one to go on
                entries = [(first, first.next_feed(), min(first.next_feed().left, self.engine.max_rows))]
            else:
                total, size = self.cache.num_pages, self.cache.page_size
                raise ValueError(
                    f"num_pages={total} (of {size} tokens) is too small for prompt {oldest.age()[0]}: thread "
                    f"{oldest.thread.id} needs {oldest.thread.length} tokens beside those that cannot leave now; "
                    "make the engine with a larger num_pages, "
                    f"or use a shorter prompt, fewer threads or a smaller max_new_tokens ({shortage})"
                )

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
                if any(child._live.branch is not None for _, kids in thread._forks for child in kids):
                    continue
                key = (idle, *live.age())
                if best_key is None or key > best_key:
                    best, best_key = live, key
        return best

    def _check(self, logits: torch.Tensor, keep: list[int], entries: list[tuple[Live, Feed, int]]) -> None:
        bad = torch.isnan(logits.amax(-1))  # amax hands a NaN on, and reads the scores once
        if not bool(bad.any()):
            return
        row = int(bad.nonzero()[0, 0])
        live, feed, _ = entries[keep[row] if keep else 0]
        raise ValueError(
            f"{type(self.engine.model).__name__} returned NaN scores in step {self.clock.steps + 1} for "
            f"prompt {live.age()[0]}, thread {live.thread.id}, position {feed.branch.position - 1}; "
            "check the weights for NaN or infinite values, "
            "or load the model in a wider dtype (float16 overflows where bfloat16 does not)"
        )

    # ---------------------------------------------------------------------------------------- sampling

    def _sample(self, ready: list[Thread]) -> None:
        begin = time.perf_counter()
        groups: dict[Any, list[Thread]] = {}
        together: dict[Any, int] = {}
        for thread in ready:
            groups.setdefault(thread._ops[0]._sampler, []).append(thread)
        for sampler, threads in groups.items():
            with torch.inference_mode():
                logits = _rows([t._live.scores for t in threads]).float()
                contexts = [lambda t=t: [*t._prefix, *t._own] for t in threads]
                tokens = sampler.choose(
                    logits,
                    contexts,
                    [t.length for t in threads],
                    [t._host.trunk._prompt_length for t in threads],
                    [t._live.stream for t in threads],
                )
                asked = [i for i, t in enumerate(threads) if t._ops[0].topk is not None]
                if asked:
                    raw = logits if len(asked) == len(threads) else logits[asked]
                    stats = token_stats(raw, [tokens[i] for i in asked], [threads[i]._ops[0].topk for i in asked])
                    for i, stat in zip(asked, stats, strict=True):
                        threads[i]._ops[0].stats.append(stat)
            for thread, token in zip(threads, tokens, strict=True):
                request: Any = thread._host
                together[request] = together.get(request, 0) + 1
                request.max_concurrency = max(request.max_concurrency, together[request])
                thread._live.scores = None
                request.took(thread._ops[0], token)
        self.clock.sampling += time.perf_counter() - begin


def _rows(scores: list[Any]) -> torch.Tensor:
    """The score rows of several threads, [threads, vocabulary]; no copy where they are a step's own, in order."""
    tensor = scores[0][0]
    rows = [row for _, row in scores]
    if all(t is tensor for t, _ in scores):
        return tensor if rows == list(range(tensor.shape[0])) else tensor[torch.tensor(rows, device=tensor.device)]
    return torch.stack([t[row] for t, row in scores])
