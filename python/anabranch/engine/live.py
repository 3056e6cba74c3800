"""The rows of threads that see one another, turn by turn (anabranch/threads/live.py).

A thread that was pre-empted is computed again row by row as it was, by the turns on record. For that those who have
left stay in the group as long as someone who is to be computed again saw them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from anabranch.engine.chunk import PrefillChunk
from anabranch.engine.thread_kv import EngineThread, ThreadKV
from anabranch.kv.views import Read
from anabranch.records.result import Sight
from anabranch.strategies.api.ops import ForkOp, InsertOp, TruncateOp
from anabranch.threads.live import Turns, View, sees_same_turn, shared, visible

Entry = tuple[ThreadKV, PrefillChunk, int]


class LiveGroup:
    """All live threads of one prompt."""

    def __init__(self) -> None:
        self.threads: list[EngineThread] = []
        self.turn = 0
        self.refused = False  # whether a turn lacked room in the last forward
        self.replays = False  # the turns of all that is to come are on record
        self._to_come: dict[str, list[Sight]] = {}  # of threads by name: sights on record that name some still to come
        self._later: dict[str, Sequence[Sight]] = {}  # likewise: those of what they write behind the next cut

    def see(self, thread: EngineThread, others: Sequence[EngineThread], lined_up: bool, same_step: str) -> None:
        """From the next turn on `thread` sees `others`."""
        for one in (thread, *others):
            if one.live is None:
                one.live = Turns(len(one.log))
                one.turns.assign(0, len(one.own))
                one.turns.clock = one.clock
                self.threads.append(one)
        views = thread.turns.views
        begin = thread.turns.assigned  # what it sampled last is still to be computed
        if views and views[-1].begin == begin:
            views.pop()
        views.append(View(begin, tuple(others), lined_up, same_step))

    def recall(self, sights: Mapping[str, Sequence[Sight]]) -> None:
        """From now on everything happens again as it is on record. sights: of each thread, by name, all its own."""
        self.replays, self._later = True, dict(sights)

    def take_in(
        self,
        thread: EngineThread,
        turns: Sequence[tuple[int, int]],
        sights: Sequence[Sight],
        later: Sequence[Sight] = (),
    ) -> None:
        """The turns in which a thread's tokens, those to come included, are to be computed, and what it saw then: up to
        where some of it is cut off, and behind that once more. later: sights of what it writes behind that cut."""
        thread.live = Turns(thread.turns.since if thread.live is not None else len(thread.log))
        for turn, count in turns:
            thread.turns.assign(turn, count)
        if thread not in self.threads:
            self.threads.append(thread)
        self._to_come[thread.id], self._later[thread.id] = list(sights), later
        known = {one.id: one for one in self.threads}
        for reader in self.threads:
            left = self._to_come[reader.id]
            while left and all(name in known for name in left[0].others):
                sight = left.pop(0)
                others = tuple(known[name] for name in sight.others)
                reader.turns.views.append(View(sight.begin, others, sight.lined_up, sight.same_step))

    def members(self) -> list[EngineThread]:
        """Those that are there now, and those that have left and are needed still."""
        return [thread for thread in self.threads if (thread.alive or thread.lingers) and thread.born]

    # ---------------------------------------------------------------------------------------- one forward

    def entries(self, room: int, max_rows: int, asked: bool = True) -> list[Entry]:
        """The rows that the group has in the next forward, at most `room`: whole turns, in their order; none where not
        even one turn fits. asked: whether there may be a new turn, behind those so far. (In a replay a turn may take
        several forwards: what it has written is there all at once.)"""
        everybody = self.members()
        members = [thread for thread in everybody if thread.kv.branch is not None]  # others: forks of those
        found: list[Entry] = []
        for kv in [thread.kv for thread in members if thread.kv.rebuilding]:  # what it joined before it was live
            if room:
                chunk = kv.next_chunk()
                found.append((kv, chunk, min(chunk.left, room)))
                room -= found[-1][2]
        members = [thread for thread in members if not thread.kv.rebuilding]
        # Whoever is needed still is so until the turns so far are computed again.
        whole = len(members) == len(everybody) and all(thread.alive for thread in members)
        if asked and whole and not self.replays and self._settled(members) and not any(map(_comes_soon, self.threads)):
            self._next_turn(members, max_rows)
        left = {thread: self._uncached(thread) for thread in members}
        ends = {thread: at for thread, (at, _) in left.items()}  # own tokens that are there with this forward
        waiting: set[EngineThread] = set()
        self.refused = False
        turns = sorted({thread.turns.of(n) for thread, (at, end) in left.items() for n in range(at, end)})
        for turn in turns:
            rows = {t: min(end, t.turns.until(turn)) - ends[t] for t, (_, end) in left.items() if t not in waiting}
            rows = {t: n for t, n in rows.items() if n > 0}
            held_up = self._held_up(rows, ends, turn)
            if held_up and not self.replays:
                break
            waiting |= held_up
            rows = {t: n for t, n in rows.items() if t not in held_up}
            if sum(rows.values()) > room:
                self.refused = turn > 0 and all(ends[t] == at for t, (at, _) in left.items())
                if turn:
                    break
                for thread, n in rows.items():  # a plain prefill may be cut anywhere
                    rows[thread] = min(n, room)
                    ends[thread] += rows[thread]
                    room -= rows[thread]
                break
            for thread, n in rows.items():
                ends[thread] += n
            room -= sum(rows.values())
        found += [self._entry(t, at, ends[t] - at) for t, (at, _) in left.items() if ends[t] > at]
        return found

    def _held_up(
        self, rows: Mapping[EngineThread, int], ends: Mapping[EngineThread, int], turn: int
    ) -> set[EngineThread]:
        """Of those with `rows` in a turn: whose see something that is neither there (`ends`) nor computed with them."""
        found: set[EngineThread] = set()
        while more := {t for t, n in rows.items() if t not in found and self._lacks(t, n, rows, ends, turn, found)}:
            found |= more
        return found

    def _lacks(
        self,
        thread: EngineThread,
        count: int,
        rows: Mapping[EngineThread, int],
        ends: Mapping[EngineThread, int],
        turn: int,
        without: set[EngineThread],
    ) -> bool:
        """Whether a row of a thread's next `count` own tokens sees what is not there."""
        if not turn:
            return False
        number = ends[thread] + count - 1
        if self.replays and (to_come := self._to_come[thread.id]) and to_come[0].begin <= number:
            return True
        view = thread.turns.view_at(number)
        for other in view.others if view is not None else ():
            there = ends.get(other, 0) + (0 if other in without else rows.get(other, 0))
            if visible(view, thread, other, turn) > max(there, shared(thread, other)):  # type: ignore[arg-type]
                return True
        return False

    def _settled(self, members: Sequence[EngineThread]) -> bool:
        """Whether nobody that still writes has a token to be sampled, or computed, of the turns so far."""
        return all(
            thread.turns.assigned <= self._uncached(thread)[0] and not (thread.kv.has_logits and thread.samples)
            for thread in members
            if thread.queue
        )

    def _next_turn(self, members: Sequence[EngineThread], max_rows: int) -> None:
        """Give a turn to all that was written since the last one; of more than `max_rows` tokens, equal shares."""
        new = {t: len(t.own) - t.turns.assigned for t in members if len(t.own) > t.turns.assigned}
        if len(new) > max_rows:
            raise ValueError(
                f"max_rows={max_rows}: {len(new)} threads that see one another need a row each in one forward; make "
                f"the engine with max_rows of at least {len(new)}"
            )
        share = max_rows if sum(new.values()) <= max_rows else max_rows // len(new)
        self.turn += bool(new)
        clocks = {thread: thread.clock for thread in members}
        for thread, count in new.items():
            thread.turns.assign(self.turn, min(count, share))
            view = thread.turns.view_at(thread.turns.assigned - 1)
            for other in view.others if view is not None else ():
                same = view is not None and sees_same_turn(view, thread, other)
                if other in clocks and other.live is not None:
                    thread.reach(clocks[other] if same else other.turns.clock)
        for thread, clock in clocks.items():
            thread.turns.clock = clock

    @staticmethod
    def _uncached(thread: EngineThread) -> tuple[int, int]:
        """Own tokens with a turn that are not in the cache: from number … to."""
        at = max(0, thread.kv.stored - len(thread.prefix))
        return at, max(at, min(thread.turns.assigned, len(thread.own)))

    def _entry(self, thread: EngineThread, at: int, count: int) -> Entry:
        shared = len(thread.prefix)
        position, end = thread.dense_run(shared + at)
        chunk = PrefillChunk(thread.kv.held, thread.own[at : at + count], position)
        if end < shared + at + count:
            chunk.positions = [p for s in thread.segments for p in s.positions()][at : at + count]
        chunk.reads = [self._reads(thread, at + i) for i in range(count)]
        return thread.kv, chunk, count

    def _reads(self, thread: EngineThread, number: int) -> list[Read]:
        """What the row of own token `number` reads."""
        live = thread.turns
        turn, view = live.of(number), live.view_at(number)
        if view is None or not turn:
            return []
        seen = [(other, visible(view, thread, other, turn)) for other in view.others]
        found = []
        total = sum(count for _, count in seen)
        before = 0
        for other, count in seen:
            start, stop = len(other.prefix) + shared(thread, other), len(other.prefix) + count
            # Lined up, a row stands behind all blocks before its own, wherever each was written.
            offset = total - before - thread.start + other.start if view.lined_up else 0
            before += count
            if stop > start:
                found.append(Read(other.kv.held, start, stop, offset))
        return found

    # ---------------------------------------------------------------------------------------- leaving

    def leave(self, thread: EngineThread) -> None:
        """A thread takes nothing more: nobody sees it from the next turn on."""
        if self.replays or thread.live is None:
            return
        for reader in self.threads:  # forks that are still to come to be among them
            views = reader.turns.views
            if reader.alive and views and thread in views[-1].others:
                others = [other for other in views[-1].others if other is not thread]
                self.see(reader, others, views[-1].lined_up, views[-1].same_step)

    def readers(self, thread: EngineThread) -> list[EngineThread]:
        """Those that have, or had, `thread` in their view, and are there, or are still to come to be."""
        if thread.live is None:
            return []
        others = (other for other in self.threads if other is not thread and (other.alive or other.lingers))
        return [other for other in others if any(thread in view.others for view in other.turns.views)]

    def have_seen(self, thread: EngineThread, own: int) -> list[EngineThread]:
        """Those alive that may have seen more of `thread` than its first `own` tokens (in a replay: that have)."""
        readers = [reader for reader in self.readers(thread) if reader.born and reader.alive]
        if not self.replays:
            return readers
        return [reader for reader in readers if _see(reader, range(self._uncached(reader)[0]), thread, own)]

    def have_gone(self, thread: EngineThread, own: int) -> list[EngineThread]:
        """Those needed still, though they have left, that have or are to see more of `thread` than its first `own`."""
        gone = [reader for reader in self.readers(thread) if not reader.alive]
        return [reader for reader in gone if _see(reader, range(reader.turns.assigned), thread, own)]

    def to_compute(self, thread: EngineThread) -> bool:
        """Whether it wrote something in turns on record that is not in the cache."""
        at, end = self._uncached(thread)
        return at < end

    def needs(self, thread: EngineThread) -> bool:
        """Whether rows that saw a thread which leaves are to be computed, once more or, in a replay, at all."""
        if thread.live is None:
            return False
        if self.replays:
            gone = {one.id for one in self.threads if not (one.alive or one.lingers)}
            for name, sights in (*self._to_come.items(), *self._later.items()):
                if name not in gone and any(thread.id in sight.others for sight in sights):
                    return True
        readers = self.readers(thread)
        return any(_see(reader, range(self._uncached(reader)[0], reader.turns.assigned), thread) for reader in readers)


def _see(reader: EngineThread, numbers: range, thread: EngineThread, more_than: int = 0) -> bool:
    """Whether rows of some own tokens of `reader` see more than the first own tokens of `thread`."""
    live = reader.turns
    for number in numbers:
        turn, view = live.of(number), live.view_at(number)
        if turn and view is not None and thread in view.others:
            if visible(view, reader, thread, turn) > more_than:
                return True
    return False


def _comes_soon(thread: EngineThread) -> bool:
    """Whether a thread is to come to be, by a fork that nothing but its parent's KV holds up: however many steps that
    takes (it may have to be computed again), the group's next turn is its first."""
    parent = thread.parent
    if not thread.alive or thread.born or parent is None or parent.live is not None:
        return False
    if not parent.born:
        return _comes_soon(parent)
    for op in parent.queue:
        if isinstance(op, ForkOp) and thread.handle in op.children:
            return not op.sees
        if not isinstance(op, (ForkOp, InsertOp, TruncateOp)):
            return False
    return False
