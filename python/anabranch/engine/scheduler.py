"""Which threads go on in a step, and who leaves the cache where pages are short.

Nobody starves: in a shortage the oldest thread always gets on, at the expense of the younger (`Scheduler.reserve`), so
the oldest prompt reaches its end, and then the next is the oldest. Rows go to whoever went longest without
(`Scheduler.choose`).
"""

from __future__ import annotations

import torch

from anabranch.engine.admission import DecodeLimit
from anabranch.engine.ops import engine_op
from anabranch.engine.request import Request
from anabranch.engine.thread_kv import EngineThread, PrefillChunk, ThreadKV
from anabranch.errors import OutOfPages
from anabranch.kv.cache import TreeCache
from anabranch.kv.step import Step


class Scheduler:
    """Selects the rows of each step of one call; `active`: its requests under way, a list that the loop changes."""

    def __init__(self, cache: TreeCache, active: list[Request], max_rows: int, max_threads: int | None):
        self.cache, self.active, self.max_rows = cache, active, max_rows
        self._limit = None if max_threads is None else DecodeLimit(max_threads)
        self.decoding: dict[Request, dict[EngineThread, None]] = {}  # who may be given a token in this step
        self._queueing: set[Request] = set()  # requests of which some thread waits for its turn to decode
        self._needed: set[int] = set()  # ids of the ThreadKVs that the first op of some queue needs in the cache

    def admit(self) -> None:
        """Settle which threads may be given a token in this step."""
        self.decoding = {request: dict.fromkeys(request.decodable()) for request in self.active}
        self._queueing.clear()
        if self._limit is not None:
            admitted = set(self._limit.admit(t for threads in self.decoding.values() for t in threads))
            for request, threads in self.decoding.items():
                self.decoding[request] = {t: None for t in threads if t in admitted}
                if len(self.decoding[request]) < len(threads):
                    self._queueing.add(request)

    def ready(self) -> list[EngineThread]:
        """Threads that can be given a token without another forward."""
        threads = (t for decoding in self.decoding.values() for t in decoding)
        return [t for t in threads if t.kv.ready]

    def all_wanted(self) -> list[ThreadKV]:
        """Threads of all prompts that must be brought into the cache now."""
        self._needed.clear()
        return [kv for request in self.active for kv in self.wanted(request)]

    def wanted(self, request: Request) -> list[ThreadKV]:
        """Threads that must be brought into the cache now, parents before their forks."""
        wanted: dict[EngineThread, None] = {}
        decoding = self.decoding[request]
        for thread in list(request.queued):
            op = thread.queue[0] if thread.queue else None
            if op is None or not thread.born or (engine_op(op).decodes and thread not in decoding):
                continue
            if engine_op(op).waits_for_children(request, op):
                continue
            for need in engine_op(op).needs(request, thread, op):
                self._needed.add(id(need.kv))
                if not need.kv.in_cache:
                    chain = [need]
                    while chain[-1].kv.branch is None and not chain[-1].kv.may_open:
                        chain.append(chain[-1].parent)
                    wanted.update(dict.fromkeys(reversed(chain)))
        waiting = request in self._queueing or any(t.kv.ready for t in decoding)
        if not wanted and not waiting:
            raise RuntimeError(
                f"{type(request.strategy).__name__}: nothing is left to do, but run() still waits for "
                f"{request.tasks.describe_wait()}; "
                "was the thread it waits for killed, or does a join wait for a child that waits for its parent?"
            )
        return [t.kv for t in wanted]

    def choose(self, wanted: list[ThreadKV]) -> list[tuple[ThreadKV, PrefillChunk, int]]:
        """Rows of the next step: every thread that goes on by a token, then longer runs in order, in chunks."""
        room = self.max_rows
        free = self.cache.usage().pages_free
        size = self.cache.page_size
        running = sum(kv.branch is not None for kv in wanted)
        coming = {id(kv) for kv in wanted}
        entries: list[tuple[ThreadKV, PrefillChunk, int]] = []
        # Longest unserved first: more threads than rows take turns.
        for kv in sorted(wanted, key=lambda w: (w.pending > 1, w.last_step if w.pending <= 1 else 0)):
            if room <= 0:
                break
            if kv.branch is None:
                # One that is not in the cache enters when it fits beside those that are, and leaves each a page to
                # grow; else they would push one another out in turns. Alone it may always try.
                if entries and kv.pending // size + 2 + running > free:
                    continue
                if not kv.may_open:
                    continue  # its parent comes first
                donor = kv.donor(least=size)
                if donor is not None and donor[0].held.length < donor[1]:
                    if id(donor[0]) in coming:
                        continue  # what they have in common is being computed
                    donor = None
                kv.open(self.cache, donor)
                if kv.in_cache:
                    continue
                free -= kv.pending // size + 1
                running += 1
            chunk = kv.next_chunk()
            count = min(chunk.left, room)
            entries.append((kv, chunk, count))
            room -= count
        return entries

    def reserve(
        self, entries: list[tuple[ThreadKV, PrefillChunk, int]], wanted: list[ThreadKV]
    ) -> tuple[Step | None, list[tuple[ThreadKV, PrefillChunk, int]]]:
        """Reserve the rows in the cache; in a page shortage make room: what is idle goes first, then the youngest."""
        if not entries:
            return None, entries  # only branches had to be opened
        stuck: list[ThreadKV] = []  # those that cannot go on though all that may leave has left
        while True:
            try:
                return self.step(entries), entries
            except OutOfPages as error:
                shortage = error
            oldest, youngest = (pick((kv for kv, _, _ in entries), key=_age) for pick in (min, max))
            victim = self._victim(oldest)
            if victim is not None:
                victim.release(self.cache)
                victim.thread.request.spent.preemptions += 1
                entries = [e for e in entries if e[0] is not victim]
                continue
            if len(entries) > 1:
                entries = [e for e in entries if e[0] is not youngest]
                continue
            # One that had no turn in this step may be older; one that cannot leave will give its pages back at its end.
            # (Any other would be pushed out again in the next step, and so on for ever.)
            stuck.append(oldest)
            others = [w for w in wanted if w.branch is not None and (w.pinned or w.thread.age < stuck[0].thread.age)]
            others = [w for w in others if w not in stuck and not w.in_cache]
            if not others and (leaving := self._giving_way(stuck)) is not None:
                leaving.release(self.cache)
                leaving.thread.request.spent.preemptions += 1
                others = [w for w in stuck if w.pinned]
                stuck = [w for w in stuck if not w.pinned]
            if others:
                other = min(others, key=_age)
                chunk = other.next_chunk()
                entries = [(other, chunk, min(chunk.left, self.max_rows))]
                continue
            kv, total, size = stuck[0], self.cache.num_pages, self.cache.page_size
            raise ValueError(
                f"num_pages={total} (of {size} tokens) is too small for prompt {kv.thread.age[0]}: thread "
                f"{kv.thread.id} needs {kv.thread.length} tokens beside those that cannot leave now; "
                "make the engine with a larger num_pages, "
                f"or use a shorter prompt, fewer threads or a smaller max_new_tokens ({shortage})"
            )

    def step(self, entries: list[tuple[ThreadKV, PrefillChunk, int]]) -> Step:
        """Reserve the rows in the cache; `OutOfPages` when there are too few pages for them."""
        positions = {
            chunk.branch: torch.arange(chunk.position + chunk.done, chunk.position + chunk.done + count, device="cpu")
            for _, chunk, count in entries
            if chunk.branch.position != chunk.position + chunk.done
        }
        return self.cache.step({chunk.branch: count for _, chunk, count in entries}, positions or None)

    def _giving_way(self, stuck: list[ThreadKV]) -> ThreadKV | None:
        """When nothing moves: the youngest of `stuck` that can leave, to let one on that cannot."""
        if not any(kv.pinned for kv in stuck):
            return None
        may = [kv for kv in stuck if kv.branch is not None and not kv.pinned and not _built_on(kv.thread)]
        return max(may, key=_age, default=None)

    def _victim(self, oldest: ThreadKV) -> ThreadKV | None:
        """Whose pages to take for `oldest`: a thread that nothing waits for, else the youngest of those younger than
        it; never one that another thread in the cache is built on."""
        best: ThreadKV | None = None
        best_key: tuple[bool, int, int] | None = None
        for request in self.active:
            for thread in request.threads:
                kv = thread.kv
                idle = id(kv) not in self._needed
                if kv.branch is None or kv is oldest or kv.pinned or not (idle or kv.thread.age > oldest.thread.age):
                    continue
                if _built_on(thread):
                    continue
                key = (idle, *kv.thread.age)
                if best_key is None or key > best_key:
                    best, best_key = kv, key
        return best


def _age(kv: ThreadKV) -> tuple[int, int]:
    return kv.thread.age


def _built_on(thread: EngineThread) -> bool:
    """Whether a child of it is in the cache."""
    return any(child.kv.branch is not None for child in thread.children)
