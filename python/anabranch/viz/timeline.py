"""A generation as a timeline: one lane a thread over a token clock, arrows for forks and joins. Pure data, no drawing.

A trace keeps what each thread did and in which order, not when. The clock here is the one behind
``critical_path_tokens``: a thread that forks hands its time on, every token that a thread writes takes one tick, and
what takes children back goes on no earlier than the last of them ended. Prompts and what a join computes again take no
tick. With `Sequential` threads stand one behind another, as they ran.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from anabranch._check import told
from anabranch.viz.ranges import Range, first, last, merged, size, union
from anabranch.viz.thread_log import actions_of

if TYPE_CHECKING:
    from anabranch.records.actions import Action
    from anabranch.records.result import Node, Result, Run
    from anabranch.records.trace import Piece, Trace

__all__ = ["Arrow", "Lane", "Step", "Timeline", "Token", "Usage", "timeline"]


class Token(NamedTuple):
    """A token that a thread wrote.

    ``clock``: it was written between this tick and the next. ``kind``: "sampled" or "inserted". ``logprob``: where the
    trace has it. ``cut``: its thread forgot it later.
    """

    id: int
    clock: int
    kind: str
    position: int | None = None
    logprob: float | None = None
    cut: bool = False


@dataclass
class Step:
    """What happened to a thread's context: ``do`` "prompt", "write", "fork" or "spawn" (``lanes``), "join" (``lanes``,
    ``mode``) or "cut" (to context length ``length``). ``ranges``: the tokens that it added, by serial number."""

    do: str
    clock: int
    ranges: list[Range] = field(default_factory=list)
    lanes: tuple[int, ...] = ()
    mode: str | None = None
    length: int = 0


@dataclass
class Lane:
    """One thread. ``begin``, ``end``: of what it wrote, in ticks; ``gone``: when its context was given up or joined.

    ``shared``: what it shares with its parent, by serial number; ``steps``: what happened to its context since.
    """

    number: int
    id: str
    parent: int | None
    role: str
    fate: str | None
    ended: str | None
    begin: int
    end: int
    gone: int
    positions: tuple[int, int]
    shared: list[Range]
    tokens: list[Token] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    @property
    def depth(self) -> int:
        return self.id.count(".")


@dataclass(frozen=True)
class Arrow:
    """From one lane at a tick to another at a tick: ``kind`` "fork", "spawn" or "join" (then with its ``mode``)."""

    kind: str
    source: int
    leaves: int
    target: int
    arrives: int
    mode: str | None = None


class Usage(NamedTuple):
    """At a tick: threads that hold a context, tokens that they see together, and those that exist for them."""

    clock: int
    threads: int
    seen: int
    held: int


@dataclass
class Timeline:
    """Everything that is drawn. ``length``: ticks in all; ``ids``, ``owner``: token id and lane of each serial number.

    ``pieces``: what token ids read as, where the trace has it.
    """

    lanes: list[Lane]
    arrows: list[Arrow]
    length: int
    ids: list[int]
    owner: list[int]
    pieces: dict[int, Piece] | None = None

    def context(self, lane: int, token: int | None = None) -> list[Range]:
        """What a thread saw when its token number `token` was written; None: at its end.

        >>> seen = timeline(trace).context(1, 0)  # by its first token: the prompt, and what it was forked from

        Raises:
            ValueError: there is no such lane or token.
        """
        if not 0 <= lane < len(self.lanes):
            raise ValueError(f"lane={lane!r}; the timeline has {len(self.lanes)} lanes, from 0 on")
        of = self.lanes[lane]
        if token is not None and not 0 <= token < len(of.tokens):
            raise ValueError(f"token={token!r}; lane {lane} has {len(of.tokens)} tokens, from 0 on")
        seen, written = list(of.shared), 0
        for step in of.steps:
            if step.do == "write":
                if token is not None and written + size(step.ranges) > token:
                    return seen + first(step.ranges, token - written)
                written += size(step.ranges)
            seen = first(seen, step.length) if step.do == "cut" else seen + step.ranges
        return seen

    def context_ids(self, lane: int, token: int | None = None) -> list[int]:
        """Token ids of `context`."""
        return [self.ids[i] for first, stop in self.context(lane, token) for i in range(first, stop)]

    def text(self, token_ids: Iterable[int]) -> str | None:
        """What tokens read as, one behind another; None where the trace does not tell."""
        if self.pieces is None:
            return None
        parts = (self.pieces.get(token, "\ufffd") for token in token_ids)
        raw = (p.encode("utf-8", "replace") if isinstance(p, str) else bytes(p) for p in parts)
        return b"".join(raw).decode("utf-8", "replace")

    def usage(self, samples: int = 120) -> list[Usage]:
        """How much is seen and held over time, at about `samples` ticks."""
        stride = max(1, -(-self.length // samples))
        found = []
        for tick in sorted({*range(0, self.length, stride), self.length}):
            last = tick == self.length
            there = [lane for lane in self.lanes if lane.begin <= tick < lane.gone or (last and lane.gone == tick)]
            contexts = [_at(lane, tick) for lane in there]
            held = union(part for context in contexts for part in context)
            found.append(Usage(tick, len(there), sum(map(size, contexts)), held))
        return found


def timeline(trace: Trace | Result) -> Timeline:
    """The timeline of a finished generation.

    trace: a `Trace`, or the `Result` itself.

    >>> lanes = timeline(ab.trace.load("trace.json")).lanes

    Raises:
        TypeError: no trace.
        ValueError: a log in it cannot be followed; the thread is named.
    """
    from anabranch.records.result import Result

    if not hasattr(trace, "tree"):
        raise TypeError(f"trace: expected a Result or a Trace (trace.load), got {told(trace)}")
    whole = trace.trace() if isinstance(trace, Result) else trace
    book = _Book(whole.strategy.startswith("Sequential("))
    _Thread(book, whole.tree, None, 0, []).run()
    length = max(lane.end for lane in book.lanes)
    book.lanes[0].gone = length
    return Timeline(book.lanes, book.arrows, length, book.ids, book.owner, dict(whole.pieces) if whole.pieces else None)


class _Book:
    """What all threads write into."""

    def __init__(self, sequential: bool):
        self.sequential = sequential
        self.now = 0  # ticks so far, where threads run one after another
        self.lanes: list[Lane] = []
        self.arrows: list[Arrow] = []
        self.ids: list[int] = []
        self.owner: list[int] = []

    def store(self, token_ids: Sequence[int], owner: int) -> list[Range]:
        """New serial numbers for tokens that exist for themselves."""
        begin = len(self.ids)
        self.ids += token_ids
        self.owner += [owner] * len(token_ids)
        return [(begin, len(self.ids))] if token_ids else []


class _Thread:
    """Follows one thread's log; its children are followed where it forks them."""

    def __init__(
        self, book: _Book, node: Node, parent: Lane | None, clock: int, shared: list[Range], header: int = 0
    ):  # fmt: skip
        self.book, self.node = book, node
        self.header = header  # tokens of the header that its fork gave it
        self.nodes = {child.id: child for child in node.children}
        self.children: dict[str, _Thread] = {}
        self.own: list[Range] = []  # its context beyond what it shares
        self.prompt = 0
        self.numbers: dict[int, int] = {}  # serial number → which of the lane's tokens it is
        self.cuts: list[list[Range]] = []
        self.killed: dict[str, int] = {}  # child → when it was taken away
        self.lane = Lane(
            len(book.lanes), node.id, None if parent is None else parent.number, node.role, node.fate, node.ended,
            clock, clock, clock, (node.start, node.stop), shared,
        )  # fmt: skip
        book.lanes.append(self.lane)

    def run(self) -> None:
        """All of it."""
        prompt = [token for run in self.node.runs if run.kind == "prompt" for token in run.token_ids]
        if prompt:
            self.prompt = len(prompt)
            self.add(Step("prompt", self.lane.begin, self.book.store(prompt, self.lane.number)))
        for action in actions_of(self.node):
            if action.clock is not None and not self.book.sequential and action.do not in ("spawn", "kill"):
                self.lane.end = max(self.lane.end, action.clock)  # it may have waited for others than its children
            if action.do in ("insert", "sample"):
                self.write(action.token_ids, "sampled" if action.do == "sample" else "inserted")
            elif action.do in ("fork", "spawn"):
                self.branch(action)
            elif action.do == "truncate":
                self.cut(action.length or 0)
            elif action.do == "join":
                self.join(action)
            elif action.clock is not None:
                self.killed |= dict.fromkeys(action.children, action.clock)
        self.lane.gone = self.lane.end
        for name, clock in self.killed.items():
            if name in self.children:
                lane = self.children[name].lane
                lane.gone = max(lane.end, clock)
        self.learn()

    @property
    def clock(self) -> int:
        """When the next token is written."""
        return max(self.lane.end, self.book.now) if self.book.sequential else self.lane.end

    def add(self, step: Step) -> None:
        self.lane.steps.append(step)
        self.own += step.ranges

    def write(self, token_ids: Sequence[int], kind: str) -> None:
        if not token_ids:
            return
        clock, ranges = self.clock, self.book.store(token_ids, self.lane.number)
        if not self.lane.tokens:
            self.lane.begin = clock
        for i, serial in enumerate(range(*ranges[0])):
            self.numbers[serial] = len(self.lane.tokens)
            self.lane.tokens.append(Token(token_ids[i], clock + i, kind))
        self.add(Step("write", clock, ranges))
        self.lane.end = self.book.now = clock + len(token_ids)

    def branch(self, action: Action) -> None:
        fresh, lane = action.do == "spawn", self.lane
        here, shared = lane.end, [] if fresh else merged([*lane.shared, *self.own])
        clock = self.clock
        if fresh and action.clock is not None and not self.book.sequential:
            here = clock = action.clock  # begun by the strategy, whatever the thread itself is at
        numbers = []
        for i, name in enumerate(action.children):
            header = action.headers[i] if i < len(action.headers) else None
            child = _Thread(
                self.book,
                self.child(name, action.do),
                lane,
                self.clock if self.book.sequential else clock,
                shared,
                len(header or ()),
            )
            self.children[name] = child
            child.run()
            numbers.append(child.lane.number)
            kind = "spawn" if fresh else "fork"
            self.book.arrows.append(Arrow(kind, lane.number, here, child.lane.number, child.lane.begin))
        self.add(Step(action.do, here, lanes=tuple(numbers)))

    def child(self, name: str, do: str) -> Node:
        if name not in self.nodes or (do != "join" and name in self.children):
            raise ValueError(f"trace: {do} of {name!r} in the log of thread {self.lane.id}, which has no such child")
        return self.nodes[name]

    def cut(self, length: int) -> None:
        """Forget the context from `length` on."""
        kept = max(0, length - size(self.lane.shared))
        gone = size(self.own) - kept
        if gone > 0:
            self.cuts.append(last(self.own, gone))
            self.own = first(self.own, kept)
            self.header = min(self.header, kept)
            self.lane.steps.append(Step("cut", self.lane.end, length=size(self.lane.shared) + kept))

    def join(self, action: Action) -> None:
        for name in action.children:
            self.child(name, "join")
            if name not in self.children:
                raise ValueError(f"trace: thread {self.lane.id} joins {name!r}, which it has not forked by then")
        children = [self.children[name] for name in action.children]
        lane = self.lane
        lane.end = max([lane.end, *(child.lane.end for child in children)])
        ranges: list[Range] = []
        kept_as_it_is = size(lane.shared) + size(self.own)
        for i, (name, child) in enumerate(zip(action.children, children, strict=True)):
            child.lane.gone = lane.end
            self.book.arrows.append(
                Arrow("join", child.lane.number, child.lane.end, lane.number, lane.end, action.mode)
            )
            if action.mode == "summary":
                continue
            header = action.headers[i] if i < len(action.headers) else None
            # The first of those computed again is taken as it is where nothing stands between it and the fork.
            at_fork = i == 0 and self.node_forked_at(name) == kept_as_it_is and header is None
            if action.mode == "concat" or (at_fork and child.lane.role == "fork"):
                ranges += child.own
            else:
                ids = [
                    self.book.ids[s] for part in last(child.own, size(child.own) - child.prompt) for s in range(*part)
                ]
                if header is not None:
                    ids = [*header, *ids[child.header :]]
                ranges += self.book.store(ids, child.lane.number)
        numbers = tuple(child.lane.number for child in children)
        self.add(Step("join", lane.end, merged(ranges), numbers, action.mode))
        if action.mode == "summary":
            if action.length is not None:
                self.cut(action.length)
            self.write(action.token_ids, "inserted")

    def node_forked_at(self, name: str) -> int:
        return self.nodes[name].forked_at

    # -- what the runs know beyond the log ---------------------------------------------------------------------------

    def learn(self) -> None:
        """Positions and log-probabilities of the tokens, from the runs that hold them."""
        kept = [s for part in self.own for s in range(*part) if s in self.numbers]
        self.match(kept, [run for run in self.node.runs if run.kind in ("sampled", "inserted")], False)
        runs = list(self.node.forgotten)
        for cut in self.cuts:  # as they were forgotten: from the end backwards
            found: list[Run] = []
            while runs and sum(len(run.token_ids) for run in found) < size(cut):
                found.insert(0, runs.pop(0))
            self.match([s for part in cut for s in range(*part)], found, True)

    def match(self, serials: Sequence[int], runs: Sequence[Run], cut: bool) -> None:
        known = [
            (token, run.position + i, run.logprobs[i] if run.logprobs is not None else None)
            for run in runs
            for i, token in enumerate(run.token_ids)
        ]
        agree = [token for token, _, _ in known] == [self.book.ids[s] for s in serials]
        for i, serial in enumerate(serials):
            number = self.numbers.get(serial)
            if number is not None:
                _, position, logprob = known[i] if agree else (0, None, None)
                token = self.lane.tokens[number]
                self.lane.tokens[number] = token._replace(position=position, logprob=logprob, cut=cut)


def _at(lane: Lane, tick: int) -> list[Range]:
    """A thread's context at a tick."""
    seen = list(lane.shared)
    for step in lane.steps:
        if step.clock > tick or (step.do == "write" and step.clock == tick):
            break
        if step.do == "cut":
            seen = first(seen, step.length)
        else:
            seen += first(step.ranges, tick - step.clock) if step.do == "write" else step.ranges
    return seen
