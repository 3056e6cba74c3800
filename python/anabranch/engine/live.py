"""The rows of threads that see one another, turn by turn (anabranch/threads/live.py).

A thread that was pre-empted is computed again row by row as it was, by the turns on record.
"""

from __future__ import annotations

from collections.abc import Sequence

from anabranch.engine.thread_kv import EngineThread, PrefillChunk, ThreadKV
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
        self.unknown: dict[EngineThread, Sequence[Sight]] = {}  # sights on record that name threads still to come

    def see(self, thread: EngineThread, others: Sequence[EngineThread], lined_up: bool, same_step: str) -> None:
        """From the next turn on `thread` sees `others`."""
        for one in (thread, *others):
            if one.live is None:
                one.live = Turns()
                one.turns.assign(0, len(one.own))
                one.turns.clock = one.clock
                self.threads.append(one)
        views = thread.turns.views
        begin = thread.turns.assigned  # what it sampled last is still to be computed
        if views and views[-1].begin == begin:
            views.pop()
        views.append(View(begin, tuple(others), lined_up, same_step))

    def recall(self, thread: EngineThread, turns: Sequence[tuple[int, int]], sights: Sequence[Sight]) -> None:
        """The turns in which a thread's tokens, those to come included, are to be computed, and what it saw then."""
        thread.live = Turns()
        for turn, count in turns:
            thread.turns.assign(turn, count)
            self.turn = max(self.turn, turn)
        self.threads.append(thread)
        self.unknown[thread] = sights
        known = {one.id: one for one in self.threads}
        for reader, seen in list(self.unknown.items()):
            if all(name in known for sight in seen for name in sight.others):
                views = (View(s.begin, tuple(known[name] for name in s.others), s.lined_up, s.same_step) for s in seen)
                reader.turns.views.extend(views)
                del self.unknown[reader]

    def members(self) -> list[EngineThread]:
        """Those that are there now."""
        return [thread for thread in self.threads if thread.alive and thread.born]

    # ---------------------------------------------------------------------------------------- one forward

    def entries(self, room: int, max_rows: int) -> list[Entry]:
        """The rows that the group has in the next forward, at most `room`: whole turns, in their order; none where not
        even one turn fits."""
        everybody = self.members()
        members = [thread for thread in everybody if thread.kv.branch is not None]
        closed = {thread for thread in everybody if thread.kv.branch is None}  # forks of those that come first
        for thread in self.unknown:
            raise ValueError(f"trace: thread {thread.id} saw threads that came to be later; it cannot be replayed")
        if not closed and self._settled(members) and not any(map(_comes_soon, self.threads)):
            self._next_turn(members, max_rows)
        left = {thread: self._uncached(thread) for thread in members}
        counts = dict.fromkeys(members, 0)
        turns = sorted({thread.turns.of(n) for thread, (at, end) in left.items() for n in range(at, end)})
        for turn in turns:
            if any(min(t.turns.until(turn), t.turns.assigned) > len(t.own) for t in members):
                break  # on record, but still to be written
            rows = {t: min(end, t.turns.until(turn)) - at - counts[t] for t, (at, end) in left.items()}
            rows = {t: n for t, n in rows.items() if n > 0}
            if closed and any(self._sees(t, left[t][0] + counts[t] + n - 1, closed) for t, n in rows.items()):
                break
            if sum(rows.values()) > room:
                if turn:
                    break
                for thread, n in rows.items():  # a plain prefill may be cut anywhere
                    rows[thread] = min(n, room - sum(counts.values()))
                    counts[thread] += rows[thread]
                break
            for thread, n in rows.items():
                counts[thread] += n
            room -= sum(rows.values())
        found = [self._entry(thread, left[thread][0], count) for thread, count in counts.items() if count]
        self.refused = bool(turns) and not found
        return found

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
        at = max(0, thread.kv.held.length - len(thread.prefix))
        return at, max(at, min(thread.turns.assigned, len(thread.own)))

    @staticmethod
    def _sees(thread: EngineThread, number: int, closed: set[EngineThread]) -> bool:
        """Whether the row of own token `number` sees tokens of threads that are not in the cache."""
        turn, view = thread.turns.of(number), thread.turns.view_at(number)
        others = () if view is None or not turn else view.others
        return any(other in closed and visible(view, thread, other, turn) for other in others)  # type: ignore[arg-type]

    def _entry(self, thread: EngineThread, at: int, count: int) -> Entry:
        position = thread.position - len(thread.own) + at
        chunk = PrefillChunk(thread.kv.held, thread.own[at : at + count], position)
        chunk.reads = [self._reads(thread, at + i) for i in range(count)]
        return thread.kv, chunk, count

    def _reads(self, thread: EngineThread, number: int) -> list[Read]:
        """What the row of own token `number` reads."""
        live = thread.turns
        turn, view = live.of(number), live.view_at(number)
        if view is None or not turn:
            return []
        seen = [(other, visible(view, thread, other, turn)) for other in view.others if other.alive and other.born]
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

    def leave(self, thread: EngineThread) -> list[EngineThread]:
        """A thread takes nothing more: nobody sees it from the next turn on. Those that have seen it."""
        found = self.readers(thread)
        for reader in found:
            view = reader.turns.views[-1]
            if thread in view.others:
                others = [other for other in view.others if other is not thread]
                self.see(reader, others, view.lined_up, view.same_step)
        return found

    def readers(self, thread: EngineThread) -> list[EngineThread]:
        """The living threads that have, or had, `thread` in their view."""
        if thread.live is None:
            return []
        others = (other for other in self.members() if other is not thread)
        return [other for other in others if any(thread in view.others for view in other.turns.views)]


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
