"""The packed row of a finished generation: every token once, each seeing what it saw when the engine computed it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from anabranch._check import told
from anabranch.records.history import Stage, size, stages
from anabranch.records.live_rows import check_live, write_live
from anabranch.records.rows import Rows

if TYPE_CHECKING:
    from anabranch.records.result import Node, Result, Run
    from anabranch.records.trace import Trace


def trace_rows(
    trace: Trace | Result, *, discarded: bool = True, forgotten: bool = True, flat_loss: bool = False
) -> Rows:
    """The segments of a trace and who sees whom; the arguments are those of `anabranch.training.from_trace`.

    Raises:
        TypeError: no trace.
        ValueError: a thread was forked from tokens that its parent then cut off: what it saw is no longer in the trace;
            threads saw one another in a way that no causal row can show.
    """
    if not hasattr(trace, "tree"):
        raise TypeError(f"trace: expected a Result or a Trace (trace.load), got {told(trace)}")
    writer = _Writer(discarded, forgotten, flat_loss)
    writer.thread(trace.tree, [])
    return writer.rows


class _Writer:
    """Walks the tree as the engine grew it. A context is a list of segments, in context order."""

    def __init__(self, discarded: bool, forgotten: bool, flat_loss: bool):
        self.discarded, self.forgotten, self.flat_loss = discarded, forgotten, flat_loss
        self.rows = Rows()
        self.own: dict[str, list[int]] = {}  # the segments of each thread beyond what it shares with its parent
        self.held: dict[str, list[list[int]]] = {}  # the same at each earlier time, before some of it was cut off
        self.before: dict[str, list[int]] = {}  # those that it shares
        self.numbers: dict[str, int] = {}
        self.mute: set[str] = set()  # threads without loss
        self.together: set[str] = set()  # forks that saw one another: what comes back of them was computed again

    def thread(self, node: Node, before: list[int]) -> None:
        """Add a thread, and its children where it forked them; `before`: what it shares with its parent."""
        if _live(node):
            check_live([node])
        number = self.numbers[node.id] = len(self.numbers)
        self.own[node.id], self.held[node.id], self.before[node.id] = [], [], before
        base = self.length(before)
        waiting = self.kept(node)
        self._check_cuts(node, waiting)
        parts = stages(node)
        kids = _at_their_stage(node, waiting, parts)
        mute = node.id in self.mute
        for i, part in enumerate(parts):
            kept = min(later.kept for later in parts[i:])
            # What goes is there for its own sake, or for forks that share it.
            needed = [
                min([kid.forked_at - base, *(between.kept for between in parts[i:j])])
                for j in range(i, len(parts))
                for kid in kids[j]
            ]
            limit = size(part.runs) if self.forgotten else max([kept, *needed])
            ends = sorted({later.kept for later in parts[i:]})
            loss_to = 0 if mute else None if self.forgotten else kept
            self.stage(node, part, kids[i], number, limit, ends, loss_to)
            self.held[node.id].append(list(self.own[node.id]))
            self.own[node.id] = self.first(self.own[node.id], part.kept)
        if left := [kid for part in kids for kid in part]:
            raise ValueError(
                f"trace: thread {left[0].id} was forked at a context length of {left[0].forked_at}, which thread "
                f"{node.id} (length {base + self.length(self.own[node.id])}) does not reach; is the trace whole?"
            )

    def stage(
        self,
        node: Node,
        part: Stage,
        waiting: list[Node],
        number: int,
        limit: int,
        ends: Sequence[int],
        kept: int | None,
    ) -> None:
        """Go on to the end of one stage: add its tokens up to own token `limit`, and the children of `waiting`.

        ends: own tokens in front of which segments end, since later stages begin there. kept: there is no loss from own
        token `kept` on (None: on all).
        """
        own, before = self.own[node.id], self.before[node.id]
        base, begin = self.length(before), self.length(own)
        length = base + begin

        def fork() -> None:
            here = [k for k in waiting if k.role == "fork" and k.forked_at == length]
            self.live([k for k in here if _live(k)], waiting, own, node)
            for kid in [k for k in waiting if k.role == "fresh" or k.forked_at == length]:
                waiting.remove(kid)
                self.thread(kid, [] if kid.role == "fresh" else [*before, *own, *self.seen(kid)])

        fork()
        at = 0  # of the stage's tokens
        for (kind, source), group in groupby(part.runs, key=lambda run: (run.kind, run.source)):
            runs = list(group)
            if at + size(runs) <= begin:
                at += size(runs)
                continue
            if at >= limit:
                break
            shared = self.shared(runs, [*before, *own]) if kind == "joined" and at >= begin else None
            if shared is not None:
                own += shared
                at, length = at + size(runs), length + self.length(shared)
                fork()
                continue
            learnt = self.sampled_in(source, runs) if kind == "joined" else [kind == "sampled"] * size(runs)
            done = 0
            for run in runs:
                skip = min(len(run.token_ids), max(0, begin - at))
                i, at, done = skip, at + skip, done + skip
                while i < len(run.token_ids) and at < limit:
                    stops = [k.forked_at - length for k in waiting if k.forked_at > length]
                    stops += [end - at for end in (*ends, limit) if end > at]
                    count = min([len(run.token_ids) - i, *stops])
                    written = learnt[done : done + count]
                    loss: Any = written if kind != "joined" or self.flat_loss else False
                    if kept is not None and at >= kept:
                        loss = False
                    ids, sees = run.token_ids[i : i + count], [*before, *own]
                    segment = self.rows.add(ids, sees, run.position + i, written, loss, number, run.kv_segment)
                    own.append(segment)
                    self.record(segment, run, i)
                    i, at, done, length = i + count, at + count, done + count, length + count
                    fork()

    def kept(self, node: Node) -> list[Node]:
        """The children that are to be there; those that are there for others to see alone are without loss."""
        gone = {} if self.discarded else {k.id: k for k in node.children if k.fate in ("discarded", "killed")}
        left = [k for k in node.children if k.id not in gone]
        found = list(left)
        while left:
            seen = [gone.pop(name) for name, _ in left.pop().sees if name in gone]
            self.mute.update(kid.id for kid in seen)
            found, left = found + seen, left + seen
        if node.id in self.mute:
            self.mute.update(kid.id for kid in found)
        there = {k.id for k in found}
        return [k for k in node.children if k.id in there]

    def seen(self, kid: Node) -> list[int]:
        """The segments of siblings that a thread saw from its beginning on."""
        found: list[int] = []
        for name, count in kid.sees:
            # Nobody cuts what a living thread sees: so as it is now, or as it was when it last was as long as that.
            states = [self.own.get(name, []), *reversed(self.held.get(name, []))]
            state = next((held for held in states if self.length(held) >= count), None)
            if state is None:
                raise ValueError(
                    f"trace: thread {kid.id} saw {count} tokens of thread {name}, which are not in the trace"
                )
            found += self.first(state, count)
        return found

    def live(self, kids: Sequence[Node], waiting: list[Node], own: list[int], parent: Node) -> None:
        """Add forks that saw one another, turn by turn."""
        if not kids:
            return
        check_live(kids)
        self.together.update(kid.id for kid in kids)
        before = [*self.before[parent.id], *own]
        for kid in kids:
            waiting.remove(kid)
            self.numbers[kid.id] = len(self.numbers)
            self.before[kid.id] = before
        self.own |= write_live(self.rows, kids, before, self.numbers)
        if self.forgotten:
            for kid in kids:
                self.cut_off(kid)

    def record(self, segment: int, run: Run, at: int = 0) -> None:
        logprobs = getattr(run, "logprobs", None)
        if run.kind == "sampled" and logprobs is not None:
            self.rows.recorded[segment] = logprobs[at : at + len(self.rows.ids[segment])]

    def length(self, segments: Sequence[int]) -> int:
        return sum(len(self.rows.ids[s]) for s in segments)

    def shared(self, runs: Sequence[Run], context: list[int]) -> list[int] | None:
        """The segments that a joined thread is already there with; None where its tokens were computed again.

        They are the thread's own where its KV was spliced, and where the parent simply became its child.
        """
        source = runs[0].source or ""
        if source not in self.own:
            raise ValueError(f"trace: thread {source!r} was joined, but is not among the children so far")
        if source in self.together:
            return None
        if not (runs[0].spliced or (self.before[source] == context and runs[0].position == self.start(source))):
            return None
        found: list[int] = []
        left = [t for run in runs for t in run.token_ids]
        for segment in self.own[source]:
            ids = list(self.rows.ids[segment])
            if not left or left[: len(ids)] != ids[: len(left)]:
                break
            found.append(self._prefix(segment, min(len(left), len(ids))))
            left = left[len(ids) :]
        return found if not left else None

    def start(self, source: str) -> int:
        return self.rows.first[self.own[source][0]] if self.own[source] else -1

    def sampled_in(self, source: str | None, runs: Sequence[Run]) -> list[bool]:
        """Which tokens of a joined thread the model itself wrote: its header may read differently here."""
        tokens = [t for run in runs for t in run.token_ids]
        there = [
            (t, w) for s in self.own[source or ""] for t, w in zip(self.rows.ids[s], self.rows.written[s], strict=True)
        ]
        written = [False] * len(tokens)
        for i in range(1, min(len(tokens), len(there)) + 1):
            if there[-i][0] != tokens[-i]:
                break
            written[-i] = there[-i][1]
        return written

    # -- what was cut off ------------------------------------------------------------------------------------------

    def first(self, segments: Sequence[int], count: int) -> list[int]:
        """The segments of the first `count` tokens."""
        found: list[int] = []
        for segment in segments:
            if count <= 0:
                break
            found.append(self._prefix(segment, min(count, len(self.rows.ids[segment]))))
            count -= len(self.rows.ids[found[-1]])
        return found

    @staticmethod
    def _check_cuts(node: Node, kids: Sequence[Node]) -> None:
        """A fork of what was cut off cannot be shown where a trace does not say where its cuts were made.

        Its log says which of a fork and a cut came first; without one a thread is taken to fork last.
        """
        if all(piece.cut is not None for piece in node.forgotten):
            return
        forked = {kid.id: kid.forked_at for kid in kids if kid.role == "fork"}
        so_far: list[str] = []
        for action in getattr(node, "log", ()):
            if action.do == "fork":
                so_far += [name for name in action.children if name in forked]
            elif action.length is not None and (lost := [n for n in so_far if forked[n] > action.length]):
                raise ValueError(
                    f"trace: thread {lost[0]} was forked from thread {node.id} at a context length of "
                    f"{forked[lost[0]]}, and thread {node.id} was cut back to {action.length} since; "
                    "what it shared is no longer there"
                )

    def cut_off(self, node: Node) -> None:
        """Add what a thread forgot that saw others, each piece behind the tokens that stood before it.

        There is loss on the first token of a piece alone: what others had written by the next is not on record.
        """
        for part in stages(node)[:-1]:
            held, piece = self.first(self.own[node.id], part.kept), part.runs[-1]
            sampled = [piece.kind == "sampled"] * len(piece.token_ids)
            loss = [flag and not i for i, flag in enumerate(sampled)]
            sees, number = [*self.before[node.id], *held], self.numbers[node.id]
            segment = self.rows.add(piece.token_ids, sees, piece.position, sampled, loss, number, piece.kv_segment)
            self.record(segment, piece)

    def _prefix(self, segment: int, size: int) -> int:
        """A segment with its first `size` tokens: itself, or, where it was cut since, a copy of them."""
        rows = self.rows
        if size == len(rows.ids[segment]):
            return segment
        part: dict[str, Any] = {
            "written": rows.written[segment][:size],
            "learnt": False,
            "thread": rows.threads[segment],
            "kv_segment": rows.kv_segments[segment],
        }
        return rows.add(rows.ids[segment][:size], rows.sees[segment], rows.first[segment], **part)


def _live(node: Node) -> bool:
    """Whether a thread saw others while it wrote, or was seen."""
    return bool(getattr(node, "turns", ()) or getattr(node, "sights", ()))


def _at_their_stage(node: Node, kids: Sequence[Node], parts: Sequence[Stage]) -> list[list[Node]]:
    """The children of each of a thread's stages; without a log, of its last."""
    entries = {name: i for i, action in enumerate(node.log) if action.do == "fork" for name in action.children}
    found: list[list[Node]] = [[] for _ in parts]
    for kid in kids:
        entry = entries.get(kid.id) if kid.role == "fork" else -1
        cuts = [part.logged for part in parts if part.logged is not None]
        found[len(cuts) if entry is None else sum(logged <= entry for logged in cuts)].append(kid)
    return found
