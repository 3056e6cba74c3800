"""A thread's place in the cache: its branch, the tokens not cached yet, and how it comes back after a pre-emption.

A thread's tokens are always known to the host; its KV is not always in the cache. What is missing is at the end: the
token just sampled (its KV is computed by the step that needs the next token's scores) and whatever was inserted since.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from anabranch.strategies.api.thread import Segment, Thread
from anabranch.text.tokens import Reader


@dataclass
class Feed:
    """A run of tokens to be cached next: on `branch`, from position `position`, the first `done` of them already."""

    branch: Any
    token_ids: list[int]
    position: int
    done: int = 0

    @property
    def left(self) -> int:
        return len(self.token_ids) - self.done


class Live:
    """Engine-side state of one thread."""

    def __init__(self, thread: Thread, serial: int, stream: np.random.Generator):
        self.thread, self.serial, self.stream = thread, serial, stream
        self.branch: Any = None  # None: not in the cache (not started, or pre-empted)
        self.scores: tuple[Any, int] | None = None  # (logits of a step [rows, vocabulary], row): the next token's
        self.scores_at = -1  # thread length they belong to
        self.pinned = False  # cannot be rebuilt from its tokens, so it is never pre-empted
        self.severed = False  # a fork whose parent has cut, and perhaps written anew, some of what it shares
        self.born = True
        self.last_step = 0  # the last step it had rows in
        self.reader: Reader | None = None  # tells the thread's text to whoever streams it
        self._rebuild: Iterator[Feed] | None = None
        self._feed: Feed | None = None
        self._scratch: list[Any] = []  # branches that exist only while it is being rebuilt

    @property
    def pending(self) -> int:
        """Tokens whose KV is not in the cache (while it is being rebuilt: at most so many)."""
        if self.branch is not None:
            return max(self.thread.length - self.branch.length, int(self._rebuild is not None))
        return self.thread.length - len(self.thread._prefix)  # a fork's parent holds the rest

    @property
    def has_scores(self) -> bool:
        return self.scores is not None and self.scores_at == self.thread.length

    @property
    def opened(self) -> bool:
        """In the cache as far as it goes: what is missing are its last tokens."""
        return self.branch is not None and self._rebuild is None

    @property
    def in_cache(self) -> bool:
        """All of it, ready to fork or be joined."""
        return self.opened and self.branch.length == self.thread.length

    def age(self) -> tuple[int, int]:
        """Order of arrival: of its prompt, then its own."""
        return self.thread._host.index, self.serial  # type: ignore[attr-defined]

    # ---------------------------------------------------------------------------------------- what to cache next

    @property
    def may_open(self) -> bool:
        """Whether what it continues is in the cache."""
        if self.thread.role != "fork":
            return True
        parent: Live = self.thread.parent._live  # type: ignore[union-attr]
        return (
            parent.branch is not None and parent._rebuild is None and parent.branch.length >= len(self.thread._prefix)
        )

    def donor(self, least: int) -> tuple[Live, int] | None:
        """For a thread with a prompt of its own: a sibling in the cache whose prompt begins alike, and for how many
        tokens (`least` or more): that far its KV is this thread's as well."""
        thread = self.thread
        if thread.role != "fresh" or thread.parent is None or any(s.spliced for s in thread._segments):
            return None
        best: tuple[Live, int] | None = None
        mine = thread._own[: thread._prompt_length]
        siblings = (kid._live for _, kids in thread.parent._forks for kid in kids if kid.role == "fresh")
        cached = (live for live in siblings if live.branch is not None and live._rebuild is None)
        for live in islice(cached, 8):
            other = live.thread
            theirs = other._own[: other._prompt_length]
            same = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), None)
            shared = min(len(mine), len(theirs)) if same is None else same
            shared = min(shared, thread.length - 1)  # the last token's scores have to be computed
            if shared >= (least if best is None else best[1] + 1):
                best = live, shared
        return best

    def open(self, cache: Any, donor: tuple[Live, int] | None = None) -> None:
        """Give it a branch; call it when `may_open`. donor: whose KV it may begin with, and how much of it."""
        thread = self.thread
        if donor is not None:
            self.branch = cache.fork(donor[0].branch, 1)[0]
            cache.truncate(self.branch, donor[1])
        elif thread.role == "fork":
            assert thread.parent is not None
            self.branch = cache.fork(thread.parent._live.branch, 1)[0]
            if self.branch.length > len(thread._prefix):  # the parent has gone on since
                cache.truncate(self.branch, len(thread._prefix))
        else:
            self.branch = cache.branch()
        if any(s.spliced is not None for s in thread._segments):
            self._rebuild = self._program(cache, thread, self.branch)
            self.settle()

    def next_feed(self) -> Feed:
        """What the next step should cache of this thread; it is open and has tokens `pending`."""
        if self._feed is not None:
            return self._feed
        thread, missing = self.thread, self.thread.length - self.branch.length
        return Feed(self.branch, thread._own[len(thread._own) - missing :], thread._position - missing)

    def settle(self) -> None:
        """After a step: when a feed of the rebuilding is through, go on to the next."""
        while self._rebuild is not None and (self._feed is None or not self._feed.left):
            self._feed = next(self._rebuild, None)
            if self._feed is None:
                self._rebuild = None

    def _program(self, cache: Any, thread: Thread, branch: Any) -> Iterator[Feed]:
        """Rebuild a thread that holds joined siblings, by the same forks and joins.

        Its tokens in a flat row would let the second sibling see the first, and give other KV than before.
        """
        joined = [s.spliced for s in thread._segments if s.spliced is not None]
        waiting = {id(k): k for k in joined}
        anchors: dict[int, Any] = {}

        def anchor_here() -> None:
            for key, kid in list(waiting.items()):
                if len(kid._prefix) == branch.length:
                    anchors[key] = cache.fork(branch, 1)[0]
                    self._scratch.append(anchors[key])
                    del waiting[key]

        anchor_here()
        for segment in thread._segments:
            if segment.spliced is None:
                ids, at = segment.token_ids, 0
                while at < len(ids):
                    cuts = [len(k._prefix) - branch.length for k in waiting.values() if len(k._prefix) > branch.length]
                    size = min([len(ids) - at, *cuts])
                    yield Feed(branch, ids[at : at + size], segment.position + at)
                    at += size
                    anchor_here()
            else:
                kid = anchors.pop(id(segment.spliced))
                yield from self._program(cache, segment.spliced, kid)
                cache.join(branch, [kid], mode="concat")
                self._scratch.remove(kid)
                anchor_here()

    # ---------------------------------------------------------------------------------------- leaving the cache

    def release(self, cache: Any) -> None:
        """Give its pages back; its tokens and scores stay."""
        for branch in [*self._scratch, self.branch]:
            if branch is not None and branch.alive:
                cache.release(branch)
        self.branch, self._rebuild, self._feed, self._scratch = None, None, None, []


def append(
    thread: Thread, token_ids: list[int], kind: str, source: str | None = None, logprobs: list[float] | None = None
) -> None:
    """Add tokens at the end of a thread, on the positions that follow."""
    last = thread._segments[-1] if thread._segments else None
    if (
        last is not None
        and (last.kind, last.source, last.spliced) == (kind, source, None)
        and (last.logprobs is None) == (logprobs is None)
    ):
        last.token_ids.extend(token_ids)
        if last.logprobs is not None:
            last.logprobs.extend(logprobs or ())
    else:
        kept = None if logprobs is None else list(logprobs)
        thread._segments.append(Segment(kind, list(token_ids), thread._position, source, logprobs=kept))
    thread._own.extend(token_ids)
    thread._position += len(token_ids)
    thread._depth += len(token_ids)


def positions(segment: Segment) -> Sequence[int]:
    """Of each of its tokens. (A joined child that had joined children of its own holds several runs of positions.)"""
    if segment.spliced is None:
        return range(segment.position, segment.position + len(segment.token_ids))
    return [p for s in segment.spliced._segments for p in positions(s)][: len(segment.token_ids)]


def cut(thread: Thread, length: int) -> bool:
    """Forget a thread's tokens from context length `length` on; False when that cut through spliced tokens."""
    excess, clean = thread.length - length, True
    del thread._own[len(thread._own) - excess :]
    while excess:
        segment = thread._segments[-1]
        gone = min(excess, len(segment.token_ids))
        start = len(segment.token_ids) - gone
        clean = clean and (segment.spliced is None or start == 0)
        logprobs = None if segment.logprobs is None else segment.logprobs[start:]
        position = positions(segment)[start]
        thread._forgotten.append(
            Segment(segment.kind, segment.token_ids[start:], position, segment.source, logprobs=logprobs)
        )
        del segment.token_ids[start:]
        if segment.logprobs is not None:
            del segment.logprobs[start:]
        if not segment.token_ids:
            thread._segments.pop()
        excess -= gone
    # Joined siblings share positions, so the last token left need not stand on the largest.
    thread._position = max([thread._start, *(max(positions(s)) + 1 for s in thread._segments)])
    thread._header_length = min(thread._header_length, len(thread._own))
    return clean
