"""A thread in the engine: its books, its place in the cache, and how it comes back there after a pre-emption.

A thread's tokens are always known to the host; its KV is not always in the cache. What is missing is at the end: the
token just sampled (its KV is computed by the step that needs the next token's logits) and whatever was inserted since.
"""

from __future__ import annotations

import sys
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch

from anabranch.engine.chunk import PrefillChunk
from anabranch.engine.rebuild import Rebuild, fork_at
from anabranch.threads.state import ThreadState

if TYPE_CHECKING:
    from anabranch.engine.drafts.tree import Ahead
    from anabranch.engine.request import Request
    from anabranch.kv.aside import KVAside
    from anabranch.kv.cache import TreeCache
    from anabranch.kv.prefix import PrefixCache
    from anabranch.kv.step import Branch


class EngineThread(ThreadState["EngineThread"]):
    """One thread's record in the engine."""

    def __init__(
        self,
        request: Request,
        parent: EngineThread | None,
        path: tuple[int, ...],
        role: str,
        serial: int,
        stream: np.random.Generator,
    ):
        super().__init__(request, parent, path, role)
        self.request, self.stream = request, stream
        self.kv = ThreadKV(self)
        self._serial = serial

    @property
    def age(self) -> tuple[int, int, int]:
        """Who comes first: by the order of its request, then its own."""
        return (*self.request.order, self._serial)


class ThreadKV:
    """One thread's place in the cache."""

    def __init__(self, thread: EngineThread):
        self.thread = thread
        self.branch: Branch | None = None  # None: not in the cache (not started, or pre-empted)
        self.logits: tuple[torch.Tensor, int] | None = None  # (of a step [rows, vocabulary], row): the next token's
        self.logits_at = -1  # thread length they belong to
        self.borrowed = False  # its branch was forked from a sibling's, so no parent can splice it
        self.hidden: tuple[int, tuple[float, ...]] | None = None  # (thread length it belongs to, the last token's)
        self.wants_hidden = False
        self.ahead: Ahead | None = None  # where a draft's verified scores take it (drafting.py)
        self.fixed = False  # cannot be computed again from its tokens: where it makes room, its KV is put aside
        self.aside: KVAside | None = None  # what was
        self.shared = sys.maxsize  # of its parent's tokens, its own first ones still are at most so many
        self.last_step = 0  # the last step it had rows in
        self.reached = 0  # the context length up to which there ever was KV
        self._rebuild: Rebuild | None = None

    @property
    def held(self) -> Branch:
        """Its branch, where it must have one."""
        assert self.branch is not None
        return self.branch

    @property
    def pending(self) -> int:
        """Tokens whose KV is not in the cache (while it is being rebuilt: at most so many)."""
        thread, branch = self.thread, self.branch
        length = len(thread.prefix) + len(thread.own)  # asked several times a step: no call
        if branch is None:
            return length - self.base  # a fork's parent holds the rest
        left = length - branch.length
        return left if left > 0 else int(self._rebuild is not None)

    @property
    def safe(self) -> bool:
        """Whether it has what it shares with others: in the cache, or put aside."""
        return self.branch is not None or self.aside is not None

    @property
    def stored(self) -> int:
        """Context length up to which there is KV: in the cache, or put aside."""
        if self.aside is not None:
            return self.aside.length
        return 0 if self.branch is None else self.branch.length

    @property
    def has_logits(self) -> bool:
        thread = self.thread
        return self.logits is not None and self.logits_at == len(thread.prefix) + len(thread.own)

    @property
    def ready(self) -> bool:
        """Whether it can be given a token without another forward."""
        return self.has_logits and (not self.pending or self.ahead is not None)

    @property
    def opened(self) -> bool:
        """In the cache as far as it goes: what is missing are its last tokens."""
        return self.branch is not None and self._rebuild is None

    @property
    def in_cache(self) -> bool:
        """All of it, ready to fork or be joined. (While its decode goes on there may be verified guesses behind it.)"""
        thread, branch = self.thread, self.branch
        return branch is not None and self._rebuild is None and branch.length >= len(thread.prefix) + len(thread.own)

    @property
    def rebuilding(self) -> bool:
        """What a joined child wrote is being computed again, by the same forks and joins."""
        return self._rebuild is not None

    def take_over(self, child: ThreadKV, cache: TreeCache) -> None:
        """Become the place of a child that the thread became."""
        self.release(cache)
        if not child.rebuilding:
            self.branch, child.branch = child.branch, None
        # A child that is not in the cache is rebuilt as its parent, if needed.
        self.aside = None
        self.logits, self.logits_at = child.logits, child.logits_at
        self.fixed = self.fixed or child.fixed

    def share_logits(self) -> None:
        """A fork that stands where it was forked, as its parent does, goes on from the same logits."""
        thread = self.thread
        if not self.has_logits and thread.role == "fork" and not thread.own:
            parent = thread.parent
            if parent is not None and parent.goes_on_as(thread) and parent.kv.has_logits:
                self.logits, self.logits_at = parent.kv.logits, parent.kv.logits_at

    def borrow(self, source: ThreadKV, cache: TreeCache) -> None:
        """Share all of a sibling's KV, which is in the cache, and its next token's logits."""
        self.release(cache)
        self.branch, self.borrowed = cache.fork(source.held, 1)[0], True
        self.fixed, self.aside, self.shared = source.fixed, None, source.shared
        self.logits, self.logits_at, self.hidden = source.logits, source.logits_at, source.hidden

    # ---------------------------------------------------------------------------------------- what to cache next

    @property
    def base(self) -> int:
        """With how many of its tokens a branch for it begins: those that it shares with its parent."""
        thread = self.thread
        if self.aside is None:
            return thread.forked_at
        return 0 if self.alone else min(thread.forked_at, self.shared)

    @property
    def alone(self) -> bool:
        """Whether what it continued is not to be had: it is no fork, or has outlived its parent."""
        parent = self.thread.parent
        return self.thread.role != "fork" or parent is None or not (parent.alive or parent.lingers)

    @property
    def may_open(self) -> bool:
        """Whether what it continues is in the cache."""
        if self.thread.role != "fork" or (self.aside is not None and self.alone):
            return True
        assert self.thread.parent is not None
        parent = self.thread.parent.kv
        return parent.branch is not None and parent.opened and parent.branch.length >= self.base

    @property
    def absent(self) -> list[ThreadKV]:
        """The siblings of which it saw something that is not in the cache."""
        if self.aside is not None:
            return []  # what it saw of them is its own
        seen = [(s.spliced.kv, len(s.token_ids)) for s in self.thread.seen if s.spliced is not None]
        return [kv for kv, n in seen if not kv.opened or kv.held.length < len(kv.thread.prefix) + n]

    def donor(self, least: int) -> tuple[ThreadKV, int] | None:
        """For a thread with a prompt of its own: a sibling in the cache whose prompt begins alike, and for how many
        tokens (`least` or more): that far its KV is this thread's as well."""
        thread = self.thread
        if (
            thread.role != "fresh"
            or thread.live is not None
            or self.aside is not None
            or thread.parent is None
            or any(s.spliced for s in thread.segments)
        ):
            return None
        best: tuple[ThreadKV, int] | None = None
        mine = thread.own[: thread.prompt_length]
        siblings = (child.kv for child in thread.parent.children if child.role == "fresh" and child.live is None)
        cached = (kv for kv in siblings if kv.opened)
        for kv in islice(cached, 8):
            other = kv.thread
            theirs = other.own[: other.prompt_length]
            same = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), None)
            shared = min(len(mine), len(theirs)) if same is None else same
            shared = min(shared, thread.length - 1)  # the last token's logits have to be computed
            if shared >= (least if best is None else best[1] + 1):
                best = kv, shared
        return best

    def open(self, cache: TreeCache, donor: tuple[ThreadKV, int] | None = None) -> None:
        """Give it a branch; call it when `may_open`. donor: whose KV it may begin with, and how much of it."""
        thread = self.thread
        if self.aside is not None:
            self.branch = cache.branch() if self.alone else self.beside_parent(cache)
        elif donor is not None:
            self.branch = cache.fork(donor[0].held, 1)[0]
            cache.truncate(self.branch, donor[1])
        elif thread.role == "fork":
            self.branch = self.beside_parent(cache)
        else:
            self.branch = self._known() or cache.branch()
        again = self.aside is not None or any(s.spliced is not None for s in thread.segments)
        if again or not self._shared_at_once(cache):
            self._rebuild = Rebuild(self, cache)
            self.settle()

    def beside_parent(self, cache: TreeCache) -> Branch:
        """A branch with what it shares with its parent."""
        assert self.thread.parent is not None
        return fork_at(cache, self.thread.parent.kv.held, self.base)

    @property
    def findable(self) -> int:
        """How many of its first tokens may be another's: at least one is left, whose logits have to be computed."""
        thread = self.thread
        if self.aside is not None or thread.role == "fork" or thread.request.kv_segments:
            return 0
        if any(s.spliced is not None for s in thread.segments):
            return 0
        most = min(thread.dense_length, thread.length - 1)
        return most if thread.score is None else min(most, thread.score.begin)  # what is scored is computed

    def _known(self) -> Branch | None:
        """A branch with what is known of its tokens from other threads or requests, if anything is."""
        request = self.thread.request
        if request.prefixes is None:
            return None
        branch = request.prefixes.fork(self.thread.own, self.findable)
        if branch is not None and self.last_step == 0:
            request.cached_tokens += branch.length
        return branch

    def next_chunk(self) -> PrefillChunk:
        """What the next step should cache of this thread; it is open and has tokens `pending`."""
        if self._rebuild is not None and self._rebuild.chunk is not None:
            return self._rebuild.chunk
        thread, branch = self.thread, self.held
        position, end = thread.dense_run(branch.length)
        shared = len(thread.prefix)
        segments = thread.kv_segments(thread.length - branch.length) if thread.request.kv_segments else ()
        token_ids = thread.own[branch.length - shared : end - shared]
        return PrefillChunk(branch, token_ids, position, segments[: len(token_ids)])

    def settle(self) -> None:
        """After a step: when a chunk of the rebuilding is through, go on to the next."""
        if self._rebuild is not None and not self._rebuild.go_on():
            self._rebuild = None

    def _shared_at_once(self, cache: TreeCache) -> bool:
        """Share what siblings had written, where all of it is in the cache."""
        if self.absent:
            return False
        for segment in self.thread.seen:
            assert segment.spliced is not None
            cache.share(self.held, segment.spliced.kv.held, len(segment.token_ids))
        return True

    # ---------------------------------------------------------------------------------------- leaving the cache

    def share(self, cache: TreeCache) -> None:
        """Let others begin with what is in the cache now, in whole pages: the thread goes on in the next."""
        prefixes = self._keeping()
        length = min(self.thread.dense_length, self.held.length)
        length -= length % cache.page_size
        if prefixes is not None and length:
            prefixes.keep(cache.fork(self.held, 1)[0], self.thread.context[:length])

    def _keeping(self) -> PrefixCache | None:
        """Where to leave what it has computed, if that is of use to others."""
        request = self.thread.request
        if request.kv_segments:  # its K and V hold vectors of its strategy's own
            return None
        good = request.prefixes is not None and self.opened and request.epoch == request.prefixes.epoch
        return request.prefixes if good else None

    def leave(self, cache: TreeCache) -> None:
        """Give its pages back for good; what others may begin with can be found until the pages are needed."""
        prefixes = self._keeping()
        if prefixes is not None and (length := min(self.thread.dense_length, self.held.length)):
            branch, self.branch = self.held, None
            prefixes.keep(branch, self.thread.context[:length])
        self.forget(cache)

    def make_room(self, cache: TreeCache) -> None:
        """Give its pages back for now; what could not be computed again is put aside."""
        if self.fixed and self.aside is None:
            length = self.thread.forked_at if self.rebuilding else min(self.held.length, self.thread.length)
            self.aside = cache.put_aside(self.held, length) if length else None
        self.release(cache)

    def forget(self, cache: TreeCache) -> None:
        """Give its pages back for good."""
        self.release(cache)
        self.aside = None

    def cut(self, cache: TreeCache, length: int) -> None:
        """Forget the tokens from context length `length` on."""
        self.reached = min(self.reached, length)
        if self.rebuilding:
            self.make_room(cache)
        elif self.branch is not None and self.branch.length > length:
            cache.truncate(self.branch, length)
        if self.aside is not None:
            self.aside.cut(length)

    def release(self, cache: TreeCache) -> None:
        """Give its pages back; its tokens, its logits and what was put aside stay."""
        if self._rebuild is not None:
            self._rebuild.drop()
        if self.branch is not None and self.branch.alive:
            cache.release(self.branch)
        self.branch, self._rebuild, self.borrowed, self.ahead = None, None, False, None
