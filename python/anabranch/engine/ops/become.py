"""A thread that goes on as one of its siblings stands."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile
from typing import TYPE_CHECKING

from anabranch.engine.thread_kv import EngineThread
from anabranch.records.actions import Action
from anabranch.strategies.api.awaitable import ThreadGone
from anabranch.strategies.api.ops import BecomeOp
from anabranch.threads.ops.base import HostOp

if TYPE_CHECKING:
    from anabranch.engine.request import Request


class Become(HostOp[BecomeOp]):
    """The books take over the sibling's tokens, the cache shares its pages.

    In the log it is a cut and tokens again, sampled or inserted as they were: a replay needs no other thread for it.
    A pre-emption ends the sharing; the thread is then computed from its own tokens, like any other.
    """

    def needs(self, host: Request, thread: EngineThread, op: BecomeOp) -> list[EngineThread]:
        source = host.state(op.source)
        return [source] if source.alive else []

    def waits_for_children(self, host: Request, op: BecomeOp) -> bool:
        source = host.state(op.source)
        return bool(source.queue) or (source.alive and not source.born)

    def carry_out(self, host: Request, thread: EngineThread, op: BecomeOp) -> None:
        source = host.state(op.source)
        _check(thread, source)
        pairs = zip(_placed(thread), _placed(source), strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        begin = len(thread.prefix) + same
        if begin < thread.length:
            thread.log.append(Action("truncate", length=begin, clock=thread.clock))
            host.cut(thread, begin, "become")
        thread.clock = max(op.issued, source.clock)  # what it wrote itself is no part of where it stands now
        thread.clock -= len(source.own) - same
        at = 0
        for segment in source.segments:
            skip = max(0, same - at)
            at += len(segment.token_ids)
            if ids := segment.token_ids[skip:]:
                logprobs = None if segment.logprobs is None else segment.logprobs[skip:]
                if (position := segment.position + skip) != thread.position:
                    thread.position = position
                    thread.log.append(Action("skip", position=position, clock=thread.clock))
                done = "sample" if segment.kind == "sampled" else "insert"
                thread.log.append(Action(done, list(ids), clock=thread.clock))
                thread.append(ids, segment.kind, segment.source, logprobs)
        if source.position != thread.position:
            thread.position = source.position
            thread.log.append(Action("skip", position=source.position, clock=thread.clock))
        thread.path_sampled, thread.ended, thread.chosen = source.path_sampled, source.ended, None
        thread.decode = thread.reader = None
        thread.kv.borrow(source.kv, host.cache)
        host.narrator.became(thread, source.id)


def _placed(thread: EngineThread) -> Iterator[tuple[int, int]]:
    """(token, position) of all its own."""
    return zip(thread.own, (p for segment in thread.segments for p in segment.positions()), strict=True)


def _check(thread: EngineThread, source: EngineThread) -> None:
    """Raise where one cannot become the other."""
    if not source.alive:
        raise ThreadGone(f"become: thread {source.id}, which thread {thread.id} was to become, was {source.fate}")
    if thread.prefix != source.prefix:
        raise ValueError(
            f"become: threads {thread.id} and {source.id} were not forked from the same place of thread "
            f"{thread.id.rpartition('.')[0]}; fork them together"
        )
    if any(child.alive for child in thread.children):
        raise ValueError(f"become: thread {thread.id} has children; join or discard them first")
    if thread.live is not None or source.live is not None:
        raise ValueError(
            f"become: thread {thread.id} or {source.id} sees others while it writes, or is seen, and its KV depends on "
            "that; fork in the place of become()"
        )
    if any(segment.kind == "joined" for t in (thread, source) for segment in t.segments):
        raise ValueError(
            f"become: thread {thread.id} or {source.id} holds what joined children wrote, which cannot be shared; fork "
            "in the place of become()"
        )
