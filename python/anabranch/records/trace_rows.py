"""The packed row of a finished generation: every token once, each seeing what it saw when the engine computed it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from anabranch._check import told
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
        self.before: dict[str, list[int]] = {}  # those that it shares
        self.numbers: dict[str, int] = {}
        self.together: set[str] = set()  # forks that saw one another: what comes back of them was computed again

    def thread(self, node: Node, before: list[int]) -> None:
        """Add a thread, and its children where it forked them; `before`: what it shares with its parent."""
        if _live(node):
            check_live([node])
        number = self.numbers[node.id] = len(self.numbers)
        own = self.own[node.id] = []
        self.before[node.id] = before
        length = self.length(before)
        waiting = [k for k in node.children if self.discarded or k.fate not in ("discarded", "killed")]
        self._check_cuts(node, waiting)

        def fork() -> None:
            here = [k for k in waiting if k.role == "fork" and k.forked_at == length]
            self.live([k for k in here if _live(k)], waiting, own, node)
            for kid in [k for k in waiting if k.role == "fresh" or k.forked_at == length]:
                waiting.remove(kid)
                self.thread(kid, [] if kid.role == "fresh" else [*before, *own, *self.seen(kid)])

        fork()
        for (kind, source), group in groupby(node.runs, key=lambda run: (run.kind, run.source)):
            runs = list(group)
            shared = self.shared(runs, [*before, *own]) if kind == "joined" else None
            if shared is not None:
                own += shared
                length += self.length(shared)
                fork()
                continue
            learnt = self.sampled_in(source, runs) if kind == "joined" else [kind == "sampled"] * _size(runs)
            done = 0
            for run in runs:
                at = 0
                while at < len(run.token_ids):
                    stops = [k.forked_at - length for k in waiting if k.forked_at > length]
                    size = min([len(run.token_ids) - at, *stops])
                    written = learnt[done : done + size]
                    loss = written if kind != "joined" or self.flat_loss else False
                    ids, sees = run.token_ids[at : at + size], [*before, *own]
                    segment = self.rows.add(ids, sees, run.position + at, written, loss, number, run.kv_segment)
                    own.append(segment)
                    self.record(segment, run, at)
                    at, done, length = at + size, done + size, length + size
                    fork()
        if waiting:
            raise ValueError(
                f"trace: thread {waiting[0].id} was forked at a context length of {waiting[0].forked_at}, which thread "
                f"{node.id} (length {length}) does not reach; is the trace whole?"
            )
        if self.forgotten:
            self.cut_off(node, before, own, number)

    def seen(self, kid: Node) -> list[int]:
        """The segments of siblings that a thread saw from its beginning on."""
        found: list[int] = []
        for name, left in kid.sees:
            if self.length(self.own.get(name, [])) < left:
                raise ValueError(
                    f"trace: thread {kid.id} saw {left} tokens of thread {name}, which are not in the trace"
                )
            for segment in self.own[name]:
                if left > 0:
                    found.append(self._prefix(segment, min(left, len(self.rows.ids[segment]))))
                    left -= len(self.rows.ids[segment])
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
                self.cut_off(kid, before, self.own[kid.id], self.numbers[kid.id])

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
            if len(left) < len(ids):  # cut back since: a copy of what is left of the segment
                rows, n = self.rows, len(left)
                segment = rows.add(
                    left,
                    rows.sees[segment],
                    rows.first[segment],
                    rows.written[segment][:n],
                    False,
                    rows.threads[segment],
                    rows.kv_segments[segment],
                )
            found.append(segment)
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

    @staticmethod
    def _check_cuts(node: Node, kids: Sequence[Node]) -> None:
        """A trace with a log says which of a fork and a cut came first; one without is taken to fork last."""
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

    def cut_off(self, node: Node, before: list[int], own: list[int], number: int) -> None:
        """Add what was forgotten, each piece behind the tokens that stood before it; the last cut is undone first."""
        held: list[tuple[int, int]] = [(s, len(self.rows.ids[s])) for s in own]  # (segment, tokens of it)
        for cut in reversed(_cuts(node.forgotten)):
            at = cut[0].position
            held = self._up_to(node, held, at)
            sees = [*before, *(self._prefix(s, n) for s, n in held)]
            for run in cut:
                sampled = run.kind == "sampled"
                segment = self.rows.add(run.token_ids, sees, run.position, sampled, sampled, number, run.kv_segment)
                self.record(segment, run)
                sees.append(segment)
                held.append((segment, len(run.token_ids)))

    def _up_to(self, node: Node, held: list[tuple[int, int]], position: int) -> list[tuple[int, int]]:
        """What a thread held before `position`."""
        kept: list[tuple[int, int]] = []
        end, whole = position if not held else -1, True
        for segment, size in held:
            first = self.rows.first[segment]
            if first >= position:
                break
            # Siblings that were joined share positions: a cut among them would be a cut in each.
            if not whole:
                end = -1
                break
            left = min(size, position - first)
            whole, end = left == size, max(end, first + left)
            kept.append((segment, left))
        if end != position and kept:
            raise ValueError(
                f"trace: thread {node.id} was cut back to position {position}; what it held then is not in the trace"
            )
        return kept

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


def _size(runs: Sequence[Run]) -> int:
    return sum(len(run.token_ids) for run in runs)


def _cuts(forgotten: Sequence[Run]) -> list[list[Run]]:
    """Runs as they were forgotten, from the end backwards → one list a cut, each in context order."""
    cuts: list[list[Run]] = []
    for run in forgotten:
        if cuts and run.position + len(run.token_ids) == cuts[-1][0].position:
            cuts[-1].insert(0, run)
        else:
            cuts.append([run])
    return cuts
