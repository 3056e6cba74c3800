"""The books of one thread: its tokens and where they came from, its positions, its queue, its children, its log.

Whatever host runs threads derives its own record from `ThreadState`; children, parents and joined threads are then
records of that class.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, Generic, TypeVar

from anabranch.records.actions import Action
from anabranch.records.result import Cut
from anabranch.strategies.api.awaitable import Awaitable
from anabranch.strategies.api.host import Host
from anabranch.strategies.api.ops import Decode, Ended, Op
from anabranch.strategies.api.thread import Thread
from anabranch.text.tokens import Reader
from anabranch.threads.live import Turns
from anabranch.threads.running import RunningDecode, RunningScore

State = TypeVar("State", bound="ThreadState[Any]")


@dataclass
class Segment(Generic[State]):
    """A run of tokens of one origin. ``kind``: "prompt", "inserted" (by the runtime), "sampled", "joined" (from
    `source`).

    Positions are `position`, `position` + 1, … ; `spliced`: the tokens are in the context as the thread `source` wrote
    them, blind to its siblings. `logprobs`: of each token, where they were recorded. `kv_segment`: whose vectors the
    model adds to their K and V (see `Strategy.kv_segments`). `cut`: where it stood, if it was cut off.
    """

    kind: str
    token_ids: list[int]
    position: int
    source: str | None = None
    spliced: State | None = None
    logprobs: list[float] | None = None
    kv_segment: int = 0
    cut: Cut | None = None

    def positions(self) -> Sequence[int]:
        """Of each of its tokens. (A joined child that had joined children of its own holds several runs of them.)"""
        if self.spliced is None:
            return range(self.position, self.position + len(self.token_ids))
        return [p for s in self.spliced.segments for p in s.positions()][: len(self.token_ids)]


class ThreadState(Generic[State]):
    """What a host keeps of one thread; what a strategy sees of it is a `ThreadView`."""

    def __init__(self, host: Host, parent: State | None, path: tuple[int, ...], role: str):
        self.parent, self.path, self.role = parent, path, role
        self.id = ".".join(map(str, path))
        self.handle: Thread = Thread(host, self, None if parent is None else parent.handle, path, role)
        self.alive = True
        self.lingers = False  # it has left, but others need what it holds to be computed again
        self.fate: str | None = None  # how it left: "joined", "discarded", "killed", "finished"
        self.ended: Ended | None = None  # how its last decode ended
        self.queue: deque[Op] = deque()
        self.waiting: list[Awaitable] = []  # who waits for the queue to be empty
        self.born = role != "fork"  # a fork begins when its parent gets to the ForkOp in its queue
        self.severed = False  # a fork whose parent has cut, and perhaps written anew, some of what it shares
        self.prefix: tuple[int, ...] = ()  # context at its fork
        self.forked_at = 0  # of that, the part that was its parent's context
        self.seen: list[Segment[State]] = []  # the rest: what siblings had written
        self.own: list[int] = []  # tokens since; prompt included for a trunk or a fresh thread
        self.segments: list[Segment[State]] = []  # of `own`
        self.forgotten: list[Segment[State]] = []
        self.dense_prefix = 0  # as `dense_length`, of what its parent was at the fork
        self.start = 0  # position at its fork
        self.position = 0  # of the next token
        self.blocks: list[tuple[int, list[State]]] = []  # (length, children) of each fork, in order
        self.next_child = 0
        self.spawned_at = -1  # the turn of the strategy in which the last block, of fresh threads, was begun
        self.clock = 0  # Lamport clock at its end
        self.path_sampled = 0  # sampled tokens on the longest way here
        self.prompt_length = 0  # of a prompt of its own: the trunk's, a spawned thread's
        self.header_length = 0  # tokens of the header that its fork gave it
        self.kv_segment = 0  # of the tokens that it writes
        self.log: list[Action] = []
        self.chosen: list[int] | None = None  # of its last log entry, while tokens are chosen one after another
        self.decode: RunningDecode[Any] | None = None  # what is settled about the decode at the head of its queue
        self.score: RunningScore | None = None
        self.reader: Reader | None = None  # tells the thread's text to whoever streams it
        self.live: Turns | None = None  # of a thread that sees others while it writes, or is seen

    @property
    def turns(self) -> Turns:
        """Of a thread that sees others, or is seen."""
        assert self.live is not None
        return self.live

    @property
    def samples(self) -> bool:
        """Whether a decode is at the head of its queue."""
        return bool(self.queue) and isinstance(self.queue[0], Decode)

    @property
    def running(self) -> RunningDecode[Any]:
        """Its decode, which has begun."""
        assert self.decode is not None
        return self.decode

    # ---------------------------------------------------------------------------------------- what there is

    @property
    def idle(self) -> bool:
        return not self.queue

    @property
    def length(self) -> int:
        return len(self.prefix) + len(self.own)

    @property
    def dense_length(self) -> int:
        """How many of its first tokens are one plain sequence: on positions 0, 1, …, all before each in its sight."""
        length = self.dense_prefix
        if length < len(self.prefix) or self.live is not None:
            return length
        for segment in self.segments:
            if segment.spliced is not None or segment.position != length:
                break
            length += len(segment.token_ids)
        return length

    @property
    def begin(self) -> int:
        """Context length in front of its own tokens, a prompt left out."""
        return len(self.prefix) + self.prompt_length

    @property
    def counted_from(self) -> int:
        """Length of the prompt that ``min_new_tokens`` and its like count from: the one that begins its context.

        A spawned thread has its own; a fork goes on with its parent's context, and so behind its parent's prompt.
        """
        thread = self
        while thread.role == "fork":
            assert thread.parent is not None
            thread = thread.parent
        return thread.prompt_length

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(self.own[self.prompt_length :])

    @property
    def context(self) -> tuple[int, ...]:
        return (*self.prefix, *self.own)

    @property
    def last_sampled(self) -> Sequence[int]:
        return self.segments[-1].token_ids if self.segments and self.segments[-1].kind == "sampled" else ()

    def backwards(self, length: int | None = None) -> Iterator[int]:
        """The context (up to `length`) from its last token on."""
        skip = 0 if length is None else self.length - length
        return islice(chain(reversed(self.own), reversed(self.prefix)), skip, None)

    @property
    def children(self) -> Iterator[State]:
        """All that have come to be, in order."""
        return (child for _, block in self.blocks for child in block)

    def kv_segments(self, count: int) -> list[int]:
        """Of each of its last `count` tokens."""
        found: list[int] = []
        for segment in reversed(self.segments):
            if len(found) >= count:
                break
            found += [segment.kv_segment] * len(segment.token_ids)
        return found[:count][::-1]

    def goes_on_as(self, child: State) -> bool:
        """Whether its context is, token for token, the one that its fork `child` began with."""
        return self.length == len(child.prefix) and not child.severed and not child.seen

    def forks_beyond(self, length: int) -> list[State]:
        """Its forks that share more of it than the first `length` tokens."""
        there = (c for c in self.children if c.alive or c.lingers)
        return [c for c in there if c.born and c.role == "fork" and c.forked_at > length]

    def seen_beyond(self, length: int) -> list[State]:
        """Siblings that see more of it than the first `length` tokens."""
        siblings = self.parent.children if self.parent is not None else ()
        own = length - len(self.prefix)
        return [c for c in siblings if c.alive and any(s.spliced is self and len(s.token_ids) > own for s in c.seen)]

    def splits_joined(self, length: int) -> bool:
        """Whether a cut to context length `length` leaves a part of what a joined child wrote."""
        end = self.length
        for segment in reversed(self.segments):
            begin = end - len(segment.token_ids)
            if begin <= length:
                return segment.spliced is not None and begin < length < end
            end = begin
        return False

    def dense_run(self, length: int) -> tuple[int, int]:
        """Of the token behind context length `length`, which is its own and was not joined: its position, and the
        context length to which those behind it stand on the positions that follow."""
        end, begin, first = self.length, self.length, self.position
        for segment in reversed(self.segments):
            if segment.spliced is not None or begin <= length:
                break
            if segment.position + len(segment.token_ids) != first:  # a gap, or a position that comes again
                end = begin
            begin, first = begin - len(segment.token_ids), segment.position
        return first + length - begin, end

    # ---------------------------------------------------------------------------------------- what can happen to it

    def live_record(self) -> dict[str, Any]:
        """``turns`` and ``sights`` of a thread that sees others, or is seen, as a `Node` has them; else nothing."""
        if self.live is None:
            return {}
        return {"turns": self.live.pairs(), "sights": tuple(view.recorded() for view in self.live.views)}

    def reach(self, clock: int) -> None:
        """What it does next comes after `clock`."""
        self.clock = max(self.clock, clock)

    def append(
        self, token_ids: Sequence[int], kind: str, source: str | None = None, logprobs: list[float] | None = None
    ) -> None:
        """Add tokens at the end, on the positions that follow."""
        last = self.segments[-1] if self.segments else None
        if (
            last is not None
            and (last.kind, last.source, last.spliced) == (kind, source, None)
            and (last.logprobs is None) == (logprobs is None)
            and last.kv_segment == self.kv_segment
            and last.position + len(last.token_ids) == self.position
        ):
            last.token_ids.extend(token_ids)
            if last.logprobs is not None:
                last.logprobs.extend(logprobs or ())
        else:
            kept = None if logprobs is None else list(logprobs)
            self.segments.append(
                Segment(kind, list(token_ids), self.position, source, logprobs=kept, kv_segment=self.kv_segment)
            )
        self.own.extend(token_ids)
        self.position += len(token_ids)
        self.clock += len(token_ids)

    def branch_off(self, child: State, context: tuple[int, ...], seen: Sequence[tuple[State, int]] = ()) -> None:
        """A fork comes to be, with `context`: the whole of this thread's, then the first tokens of the siblings that it
        has `seen` (one tuple for all children)."""
        child.prefix, child.forked_at, child.path_sampled = context, self.length, self.path_sampled
        child.reach(self.clock)
        child.start = self.position
        for other, count in seen:
            segment = Segment("joined", other.own[:count], self.position, other.id, other)
            child.seen.append(segment)
            child.reach(other.clock)
            child.path_sampled = max(child.path_sampled, other.path_sampled)
            child.start = max([child.start, *(p + 1 for p in segment.positions())])
        child.position = child.start
        child.dense_prefix = self.dense_length
        child.born = True

    def splice(self, child: State) -> None:
        """Take over a fork's own tokens, on the positions where it wrote them."""
        if child.own:
            part = Segment("joined", list(child.own), child.segments[0].position, child.id, child)
            part.kv_segment = child.kv_segment
            self.segments.append(part)
            self.own.extend(child.own)
            self.position = max(self.position, child.position)

    def adopt(self, child: State) -> None:
        """Become one's only child, which went on where this thread stands: nothing comes in between."""
        for segment in child.segments:
            source = child.id if segment.spliced is None else segment.source  # whose KV it is, as everywhere
            part = replace(segment, kind="joined", token_ids=list(segment.token_ids), source=source, logprobs=None)
            self.segments.append(part)
        self.own.extend(child.own)
        self.position = child.position

    def cut(self, length: int) -> None:
        """Forget the tokens from context length `length` on."""
        excess = self.length - length
        del self.own[len(self.own) - excess :]
        while excess:
            segment = self.segments[-1]
            gone = min(excess, len(segment.token_ids))
            start = len(segment.token_ids) - gone
            logprobs = None if segment.logprobs is None else segment.logprobs[start:]
            position = segment.positions()[start]
            cut = Cut(len(self.own) + excess - gone, len(self.log), segment.spliced is not None)
            gone_ids = segment.token_ids[start:]
            part = replace(segment, token_ids=gone_ids, position=position, spliced=None, logprobs=logprobs, cut=cut)
            self.forgotten.append(part)
            del segment.token_ids[start:]
            if segment.logprobs is not None:
                del segment.logprobs[start:]
            if not segment.token_ids:
                self.segments.pop()
            excess -= gone
        # Joined siblings share positions, so the last token left need not stand on the largest.
        self.position = max([self.start, *(max(s.positions()) + 1 for s in self.segments)])
        self.header_length = min(self.header_length, len(self.own))


AnyThread = ThreadState[Any]  # a host's record, whatever it adds to the books
