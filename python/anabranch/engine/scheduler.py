"""Which threads go on in a step, and who leaves the cache where pages are short.

Nobody starves. Requests have an order, by arrival and priority, in which only finitely many ever come before a given
one (`Loop.submit`). Who is not in the cache enters in that order: where one waits for room, none behind it enters
(`Scheduler.has_room`, `Scheduler.choose`), so that those inside come to their ends and make room. In a shortage the
first thread always gets on, at the expense of those behind it (`Scheduler.reserve`), so the first request reaches its
end, and then the next is the first. A request that does not get on that way has the cache for itself in the end, and
fails where even that is too small, however many others come and go (`Scheduler._give_room`). Rows go to whoever went
longest without; of those of a step, at least one is for a run of tokens where one waits, so that threads which go on
by a token never hold up a prompt for good (`Scheduler.choose`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from anabranch.engine.admission import DecodeLimit
from anabranch.engine.chunk import PrefillChunk
from anabranch.engine.relations import (
    WORTH_WAITING,
    Progress,
    age,
    alike,
    bring,
    built_on,
    go_together,
    progress,
    sources,
    stands,
    there,
)
from anabranch.engine.request import Request
from anabranch.engine.thread_kv import EngineThread, ThreadKV
from anabranch.errors import OutOfPages
from anabranch.hf.rope import RopeRule
from anabranch.kv.cache import TreeCache
from anabranch.kv.step import Step
from anabranch.threads.ops import next_ops

Entry = tuple[ThreadKV, PrefillChunk, int]


class RequestFailed(Exception):
    """`request` cannot go on, because of `error`; the others can."""

    def __init__(self, request: Request, error: Exception):
        super().__init__(str(error))
        self.request, self.error = request, error


class NothingMoves(RuntimeError):
    """A request can never go on: all that its strategy waits for waits for something that does not come."""


class Scheduler:
    """Selects the rows of each step; `active`: the requests under way, in order, a list that the loop changes.

    What only one request is to blame for comes out as `RequestFailed`.
    """

    def __init__(self, cache: TreeCache, active: list[Request]):
        self.cache, self.active, self.max_rows = cache, active, 1
        self.rope_rules: Sequence[RopeRule] = ()  # the model's
        self.steps = 0  # forwards so far
        self.moves = 0  # how often a thread entered the cache or left it
        self.gains = 0  # how often one got on: it was given a token, or KV that it never had before
        self._limit: DecodeLimit | None = None
        self._first: ThreadKV | None = None  # for whom room was made: the next to enter the cache
        self._urgent: list[ThreadKV] = []  # whom all others make room for, until they have got on
        self._urgent_were: list[tuple[bool, int, int]] = []  # how they stood
        self._ahead: set[int] = set()  # ids of them and of what they come from
        self._tried: dict[Request, tuple[Progress, set[ThreadKV]]] = {}  # whose threads were urgent since it got on
        self._only: tuple[Request, Progress] | None = None  # has all the room until it gets on, or fails
        self.decoding: dict[Request, dict[EngineThread, None]] = {}  # who may be given a token in this step
        self._queueing: set[Request] = set()  # requests of which some thread waits for its turn to decode
        # By id, the ThreadKVs that the first op of some queue needs in the cache, with all that it needs.
        self._needed: dict[int, list[ThreadKV]] = {}
        self._continued: set[int] = set()  # ids of those that one which is needed, and not there, comes from

    @property
    def did(self) -> tuple[int, int, int]:
        """Another one whenever anything has happened."""
        return self.steps, self.moves, self.gains

    def limits(self, max_rows: int, max_threads: int | None) -> None:
        """Rows of a forward, and threads that decode at a time (None: any number), from now on."""
        self.max_rows = max_rows
        if max_threads is None:
            self._limit = None
        elif self._limit is None:
            self._limit = DecodeLimit(max_threads)
        else:
            self._limit.limit = max_threads

    def has_room(self, request: Request) -> bool:
        """Whether a request that has not begun fits beside those that have: its prompt, and a page for each to grow."""
        free = self.cache.usage().pages_free
        running = 0
        for other in self.active:
            inside = sum(thread.kv.branch is not None for thread in other.threads)
            running += inside or 1
            if not inside:
                free -= self._pages(other.trunk.kv)
        return self._pages(request.trunk.kv) + 1 + running <= free

    def _pages(self, kv: ThreadKV) -> int:
        """What it takes to bring a thread into the cache: pages for what is not there, and those it wakes."""
        found, woken, prefixes = 0, 0, kv.thread.request.prefixes
        if prefixes is not None and kv.branch is None and kv.findable:
            found, woken = prefixes.cost(kv.thread.own, kv.findable)
        return (kv.pending - found) // self.cache.page_size + 1 + woken

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
        """Threads of all requests that must be brought into the cache now."""
        self._needed.clear()
        self._continued.clear()
        if self._only is not None:
            request, before = self._only
            if request in self.active and progress(request) == before and (wanted := self.wanted(request)):
                return wanted
            self._only = None
        return [kv for request in self.active for kv in self.wanted(request)]

    def make_way(self) -> bool:
        """Let the first request have the cache for itself until it gets on; False: there is no other, or it has."""
        if len(self.active) < 2 or self._only is not None:
            return False
        self._only = self.active[0], progress(self.active[0])
        return True

    def wanted(self, request: Request) -> list[ThreadKV]:
        """Threads that must be brought into the cache now, parents before their forks."""
        wanted: dict[EngineThread, None] = {}
        decoding = self.decoding[request]
        for thread in list(request.queued):
            for op in next_ops(thread) if thread.born else ():
                kind = request.ops[type(op)]
                if (kind.decodes and thread not in decoding) or kind.waits_for_children(request, op):
                    continue
                needs = kind.needs(request, thread, op)
                together = [need.kv for need in needs]
                for need in needs:
                    self._needed.setdefault(id(need.kv), together)
                    if need.kv.branch is None:
                        self._continued.update(map(id, sources(need.kv)))
                    bring(need, wanted)
        waiting = request in self._queueing or any(t.kv.ready for t in decoding)
        if not wanted and not waiting:
            raise RequestFailed(
                request,
                NothingMoves(
                    f"{type(request.strategy).__name__}: nothing is left to do, but run() still waits for "
                    f"{request.tasks.describe_wait()}; "
                    "was the thread it waits for killed, or does a join wait for a child that waits for its parent?"
                ),
            )
        return [t.kv for t in wanted]

    def choose(self, wanted: list[ThreadKV]) -> list[Entry]:
        """Rows of the next step: every thread that goes on by a token, then longer runs in order, in chunks."""
        room = self.max_rows
        free = self.cache.usage().pages_free
        size = self.cache.page_size
        running = sum(kv.branch is not None for kv in wanted)
        pending = {kv: kv.pending for kv in wanted}
        coming = {id(kv): kv for kv in wanted if kv.branch is not None and pending[kv] > 1}
        entries: list[Entry] = []
        first_outside: ThreadKV | None = None  # the first that waits for room
        groups: set[Request] = set()
        # Longest unserved first: more threads than rows take turns.
        first, self._first = self._first, None
        if self._urgent_were != [*map(stands, self._urgent)]:
            self._urgent = []  # they have got on
        self._ahead = {id(kv) for urgent in self._urgent for kv in sources(urgent)}
        ahead = {id(first), *self._ahead}
        # Who is to enter does so in the order of all, however little it has to write.
        runs = {kv: pending[kv] > 1 or kv.branch is None for kv in wanted}
        line = sorted(wanted, key=lambda w: (id(w) not in ahead, runs[w], 0 if runs[w] else w.last_step))
        early, later = self._live_order(wanted)
        if early:
            line.sort(key=lambda w: w.thread.live is None or w.thread.request not in early)
        kept = int(self.max_rows > 1 and any(left > 1 for left in pending.values()))  # rows for runs of tokens
        for kv in self._of_one_rotation(line):
            if kv.thread.live is not None:
                # Those that are to enter decide when it is the turn of them all.
                request = kv.thread.request
                if request in groups or (request in later and kv.branch is not None):
                    continue
                groups.add(request)
                closed = self._closed(request)
                if closed:
                    if room <= 0 or (first_outside is not None and closed[0].thread.age > first_outside.thread.age):
                        continue
                    taken = running + sum(n // size for _, _, n in entries)
                    if entries and sum(self._pages(member) + 1 for member in closed) > free - taken:
                        first_outside = closed[0]
                        continue
                rows = self._group_rows(request, room, closed)
                entries += rows
                room -= sum(count for _, _, count in rows)
                continue
            if room <= (kept if pending[kv] <= 1 else 0):
                continue
            if kv.branch is None:
                # One that is not in the cache enters when it fits beside those that are, and leaves each a page to
                # grow; else they would push one another out in turns. Alone it may always try.
                if first_outside is not None and kv.thread.age > first_outside.thread.age:
                    continue
                pages = self._pages(kv)
                if entries and pages + 1 + running > free:
                    first_outside = kv
                    continue
                if not kv.may_open:
                    continue  # its parent comes first
                if any(there(sibling) for sibling in kv.absent):
                    continue  # and so do siblings that it sees; of those that are gone it computes what it saw again
                donor = kv.donor(least=size)
                if donor is not None and donor[0].held.length < donor[1]:
                    if donor[0] in wanted:
                        continue  # what they have in common is being computed
                    donor = None
                prefixes = kv.thread.request.prefixes
                if prefixes is not None and kv.findable:
                    found = prefixes.longest(kv.thread.own, kv.findable)
                    if donor is not None and found >= donor[1]:
                        donor = None
                    if any(alike(kv, other) >= found + WORTH_WAITING for other in coming.values()):
                        continue
                try:
                    kv.open(self.cache, donor)
                except ValueError as error:
                    raise RequestFailed(kv.thread.request, error) from error
                self.moves += 1
                if kv.in_cache:
                    continue
                coming[id(kv)] = kv
                free -= pages
                running += 1
            chunk = kv.next_chunk()
            count = min(chunk.left, room)
            entries.append((kv, chunk, count))
            room -= count
        return entries

    @staticmethod
    def _live_order(wanted: list[ThreadKV]) -> tuple[set[Request], set[Request]]:
        """Requests whose threads that see one another are first in line, and those of which some are to enter, in their
        turn. They need room for a whole turn: where it did not suffice, they are first, unless some of them have to
        enter and an older one that waits outside comes before those."""
        outside = [kv for kv in wanted if kv.branch is None]
        entering = {kv.thread.request for kv in outside if kv.thread.live is not None}
        oldest = min(outside, key=age).thread.request if outside else None
        lacked = {kv.thread.request for kv in wanted if kv.thread.live is not None and kv.thread.request.live.refused}
        early = lacked - (entering - {oldest})
        return early, entering - early

    @staticmethod
    def _closed(request: Request) -> list[ThreadKV]:
        """Of the threads that see one another: those that are not in the cache and may enter, the oldest first."""
        members = (thread.kv for thread in request.live.members())
        closed = (kv for kv in members if kv.branch is None and kv.may_open)  # others: what they continue comes first
        return sorted((kv for kv in closed if not any(map(there, kv.absent))), key=age)

    def _group_rows(self, request: Request, room: int, closed: list[ThreadKV]) -> list[Entry]:
        """Rows of threads that see one another: all of a turn, or none. closed: those of them that enter."""
        members = [thread.kv for thread in request.live.members()]
        for kv in closed:
            kv.open(self.cache)
            self.moves += 1
        try:
            # As what a fork continues it may be brought back; a turn of its own it has when something is asked of it.
            return request.live.entries(room, self.max_rows, asked=any(id(kv) in self._needed for kv in members))
        except ValueError as error:  # more of them than rows; nobody else is to suffer for it
            raise RequestFailed(request, error) from error

    def _of_one_rotation(self, wanted: list[ThreadKV]) -> list[ThreadKV]:
        """Those that may share a forward: rotary embeddings that look at the whole of it take sequences of one side of
        their limit at a time, the longest unserved first."""
        if not self.rope_rules or not wanted:
            return wanted
        sides = {id(kv): tuple(rule.is_long(kv.thread.position) for rule in self.rope_rules) for kv in wanted}
        first = sides[id(min(wanted, key=lambda kv: kv.last_step))]
        return [kv for kv in wanted if sides[id(kv)] == first]

    def reserve(self, entries: list[Entry], wanted: list[ThreadKV]) -> tuple[Step | None, list[Entry]]:
        """Reserve the rows in the cache; in a page shortage make room: what is idle goes first, then the youngest."""
        if not entries:
            return None, entries  # only branches had to be opened
        stuck: list[ThreadKV] = []  # those that cannot go on though all that may leave has left
        while True:
            try:
                return self.step(entries), entries
            except OutOfPages as error:
                shortage = error
            except ValueError as error:  # what the model cannot serve; told by branch, not by request
                blamed = entries[0][0].thread.request
                alone = [e for e in entries if e[0].thread.request is blamed]
                if len(alone) == len(entries):
                    raise RequestFailed(blamed, error) from error
                entries = alone
                continue
            oldest, youngest = (pick((kv for kv, _, _ in entries), key=self._rank) for pick in (min, max))
            victim = self._victim(oldest)
            if victim is not None:
                self._push_out(victim)
                entries = [e for e in entries if not go_together(e[0], victim)]
                if entries:
                    continue
                return None, entries
            if any(not go_together(kv, youngest) for kv, _, _ in entries):
                entries = [e for e in entries if not go_together(e[0], youngest)]
                continue
            # One that had no turn in this step may be older. (Any other would be pushed out again in the next step, and
            # so on for ever.)
            stuck.append(oldest)
            if id(oldest) in self._ahead:  # not even all the room there is was enough
                self._urgent, self._ahead = [], set()
            others = [w for w in wanted if w.branch is not None and w.thread.age < stuck[0].thread.age]
            others = [w for w in others if not any(go_together(w, s) for s in stuck) and not w.in_cache]
            if not others and any(w.in_cache for w in wanted):
                return None, []  # one has come back without a row: it goes on first, and may make room
            if others:
                moves = self.moves
                entries = next(filter(None, map(self._alone, sorted(others, key=age))), [])
                if entries:
                    continue
                if moves < self.moves:
                    return None, []  # branches had to be opened
            first = min(stuck, key=age)
            outside = [w for w in wanted if w.branch is None and not go_together(w, first)]
            # Of earlier requests alone: threads of one request that made room for one another could do so for ever.
            earlier = [w for w in outside if w.thread.request.order < first.thread.request.order]
            if earlier and (leaving := self._youngest(stuck)):
                self._first = min(earlier, key=age)  # waits outside for room: the next step begins with it
                self._push_out(leaving)
                return None, []
            # Threads of its own request that see one another, and wait for what one of `stuck` writes.
            waiting = [w for w in others if w.thread.request is first.thread.request]
            if waiting and (found := self._past(first, waiting)) is not None:
                return found
            if self._give_room(wanted, stuck):
                return None, []
            kv, total, size = stuck[0], self.cache.num_pages, self.cache.page_size
            raise RequestFailed(
                kv.thread.request,
                ValueError(
                    f"num_pages={total} (of {size} tokens) is too small for prompt {kv.thread.request.index}: thread "
                    f"{kv.thread.id}, of {kv.thread.length} tokens, and those that are needed beside it do not fit; "
                    "make the engine with a larger num_pages, "
                    f"or use a shorter prompt, fewer threads or a smaller max_new_tokens ({shortage})"
                ),
            )

    def _give_room(self, wanted: list[ThreadKV], stuck: list[ThreadKV]) -> bool:
        """When nobody gets on by the order of their ages: let one of those that wait, and all that it needs beside
        it, go before all others; each once until its request has got on. (Who has written how much depends on who else
        is there: so it may be that the room there is went to threads that wait for one outside.) Where that helps no
        thread of a request, its request has the cache for itself. False: and had it already, so it can never go on."""
        for request in self._tried.keys() - set(self.active):
            del self._tried[request]
        for request in self.active:
            if request not in self._tried or self._tried[request][0] != progress(request):
                self._tried[request] = progress(request), set()
        line = [w for w in wanted if id(w) in self._needed and w.thread.live is None]
        left = [w for w in line if w not in self._tried[w.thread.request][1]]
        trying = {w.thread.request for w in left}
        spent = [w for w in line if w.thread.request not in trying]
        if left and (self._only is not None or not spent):
            first = min(left, key=age)
            self._tried[first.thread.request][1].add(first)
            self._urgent = self._needed[id(first)]
            self._urgent_were = [*map(stands, self._urgent)]
        elif self._only is None and len(self.active) > 1:
            request = min(spent or stuck, key=age).thread.request
            self._tried.pop(request)
            self._only = request, progress(request)
        else:
            return False
        self.moves += 1
        return True

    def _rank(self, kv: ThreadKV) -> tuple[bool, int, int, int]:
        """Who goes before whom in a shortage."""
        return (id(kv) not in self._ahead, *kv.thread.age)

    def _past(self, kv: ThreadKV, others: list[ThreadKV]) -> tuple[Step, list[Entry]] | None:
        """Rows for one thread at the expense of older ones that wait for it; None where that is not room enough."""
        entries = self._alone(kv)
        while entries:
            try:
                step = self.step(entries)
            except OutOfPages:
                if (leaving := self._youngest(others)) is None:
                    return None
                self._push_out(leaving)
            else:
                self._first = kv
                return step, entries
        return None

    def _push_out(self, kv: ThreadKV) -> None:
        """Pre-empt a thread."""
        kv.make_room(self.cache)
        kv.thread.request.spent.preemptions += 1
        self.moves += 1

    def _alone(self, kv: ThreadKV) -> list[Entry]:
        """Rows of a step for one thread, or for those that it must advance with."""
        if kv.thread.live is not None:
            return self._group_rows(kv.thread.request, self.max_rows, self._closed(kv.thread.request))
        chunk = kv.next_chunk()
        return [(kv, chunk, min(chunk.left, self.max_rows))]

    def step(self, entries: list[Entry]) -> Step:
        """Reserve the rows in the cache; `OutOfPages` when there are too few pages for them."""
        positions = {
            chunk.branch: torch.arange(chunk.position + chunk.done, chunk.position + chunk.done + count, device="cpu")
            for _, chunk, count in entries
            if chunk.branch.position != chunk.position + chunk.done
        }
        for _, chunk, n in entries:
            if chunk.positions:
                positions[chunk.branch] = torch.tensor(chunk.positions[chunk.done : chunk.done + n], device="cpu")
        views = {c.branch: c.reads[c.done : c.done + n] for _, c, n in entries if any(c.reads[c.done : c.done + n])}
        rows = {chunk.branch: count for _, chunk, count in entries}
        return self.cache.step(rows, positions or None, views or None)

    @staticmethod
    def _youngest(stuck: list[ThreadKV]) -> ThreadKV | None:
        """The youngest of `stuck` that can leave."""
        may = [kv for kv in stuck if kv.branch is not None and not built_on(kv.thread)]
        return max(may, key=age, default=None)

    def _victim(self, oldest: ThreadKV) -> ThreadKV | None:
        """Whose pages to take for `oldest`: a thread that nothing waits for, else the youngest of those younger than
        it; never one that another thread in the cache is built on."""
        best: ThreadKV | None = None
        best_key: tuple[bool, int, int, int] | None = None
        for request in self.active:
            for thread in request.threads:
                kv = thread.kv
                idle = id(kv) not in self._needed and id(kv) not in self._continued
                if kv.branch is None or go_together(kv, oldest) or id(kv) in self._ahead:
                    continue
                if not (idle or kv.thread.age > oldest.thread.age or id(oldest) in self._ahead):
                    continue
                if built_on(thread):
                    continue
                key = (idle, *kv.thread.age)
                if best_key is None or key > best_key:
                    best, best_key = kv, key
        return best
