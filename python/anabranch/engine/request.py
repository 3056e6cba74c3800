"""One prompt in the engine: the books of its threads, and their place in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from anabranch.engine.live import LiveGroup
from anabranch.engine.ops import ENGINE_OPS
from anabranch.engine.rebuild import saw_live
from anabranch.engine.sampling import Sampler, Samplers, random_stream
from anabranch.engine.thread_kv import EngineThread
from anabranch.kv.cache import TreeCache
from anabranch.kv.prefix import PrefixCache
from anabranch.strategies.api.thread import Thread
from anabranch.strategies.draft.draft_tree import DraftTree
from anabranch.threads.books import Books


class Request(Books[EngineThread]):
    """Says what needs a forward, and keeps each thread's KV in step with its tokens."""

    ops = ENGINE_OPS

    def __init__(
        self,
        *args: Any,
        cache: TreeCache,
        samplers: Samplers,
        draft: DraftTree | None = None,
        prefixes: PrefixCache | None = None,
        **kwargs: Any,
    ):
        self.cache, self.samplers, self.draft, self.live = cache, samplers, draft, LiveGroup()
        self._lingering: dict[EngineThread, None] = {}  # threads that have left, but others need what they hold
        self.cached_tokens = 0  # of its prompts, those that were found computed
        self.prefixes, self.epoch = prefixes, 0  # contexts to find and to leave behind, those of one epoch alone
        super().__init__(*args, **kwargs)
        self.order = (0, self.index)  # among all of an engine: who comes first in a shortage (the loop's affair)

    def record(self, parent: EngineThread | None, path: tuple[int, ...], role: str) -> EngineThread:
        return EngineThread(self, parent, path, role, len(self.threads), random_stream(self.seed, path))

    def sampling(self, overrides: tuple[tuple[str, Any], ...]) -> Sampler:
        return self.samplers.get(overrides)

    def holds(self, thread: EngineThread) -> bool:
        return thread.kv.in_cache

    def see(self, thread: Thread, others: Sequence[Thread], lined_up: bool, same_step: str) -> None:
        if self.sequential:
            raise ValueError("see: threads that see one another write at the same time; they cannot run in Sequential")
        if lined_up:
            self.cache.require_rotary()
        self.live.see(self.state(thread), [self.state(other) for other in others], lined_up, same_step)

    def along(self, thread: EngineThread) -> list[EngineThread]:
        return [thread] if thread.live is None else self.live.members()

    def retire(self, thread: EngineThread, fate: str) -> None:
        self.live.leave(thread)
        self.open_lingering(thread)
        thread.lingers, self._lingering[thread] = True, None
        super().retire(thread, fate)
        self.let_go()

    def open_lingering(self, thread: EngineThread) -> None:
        """Its forks that have left and are still needed take what they share from it, where it is in the cache."""
        for child in thread.children:
            if child.lingers and not child.kv.safe and child.kv.may_open and child.born and child.role == "fork":
                child.kv.open(self.cache)

    def let_go(self) -> None:
        """Give back what threads hold that have left and are needed no more."""
        while gone := [thread for thread in self._lingering if not (self.live.needs(thread) or _holds_for(thread))]:
            for thread in gone:
                for reader in (*self.live.readers(thread), *_forks_that_saw(thread)):
                    reader.kv.fixed = True  # what it saw is gone, so it could not be computed again
                for child in thread.children:
                    child.kv.fixed = child.kv.fixed or child.lingers
                thread.kv.leave(self.cache)  # what others may begin with can be found from now on
                thread.lingers = False
                del self._lingering[thread]

    def may_fork(self, thread: EngineThread) -> bool:
        return (thread.kv.has_logits or not self.rewind(thread)) and thread.kv.in_cache

    def hold_children(
        self, thread: EngineThread, children: Sequence[EngineThread], seen: Sequence[tuple[EngineThread, int]]
    ) -> None:
        for child, branch in zip(children, self.cache.fork(thread.kv.held, len(children)), strict=True):
            child.kv.branch = branch
            for other, count in seen:
                self.cache.share(branch, other.kv.held, count)
                child.kv.fixed = child.kv.fixed or other.kv.fixed
            if not seen:
                child.kv.logits, child.kv.logits_at = thread.kv.logits, thread.kv.logits_at
                child.kv.hidden = thread.kv.hidden

    def hold_own(self, children: Sequence[EngineThread]) -> None:
        for child in children:
            if child.kv.borrowed:  # a splice takes what a branch wrote since its fork from the thread
                child.kv.make_room(self.cache)

    def hold_joined(self, thread: EngineThread, children: Sequence[EngineThread]) -> None:
        for child in children:
            self.open_lingering(child)
            child.kv.share(self.cache)
        # The tree takes a child's tokens since its fork from the branch itself; positions come from our own books.
        self.cache.join(thread.kv.held, [child.kv.held for child in children], mode="concat")
        last = children[-1].kv
        if len(children) == 1 and thread.goes_on_as(children[0]) and last.has_logits:
            # One child and nothing in between: one plain sequence, so the child's next-token logits are the thread's.
            thread.kv.logits, thread.kv.logits_at = last.logits, last.logits_at
        for child in children:
            child.kv.branch = None
            thread.kv.fixed = thread.kv.fixed or child.kv.fixed or saw_live([child])

    def may_take_over(self, thread: EngineThread, child: EngineThread) -> bool:
        return child.kv.in_cache or not (thread.kv.fixed or child.kv.fixed)  # others are computed from their tokens

    def take_over(self, thread: EngineThread, child: EngineThread) -> None:
        self.open_lingering(child)
        thread.kv.take_over(child.kv, self.cache)  # its branch and its logits, so not a row is computed

    def cut_needs(self, thread: EngineThread, length: int) -> list[EngineThread]:
        if any(not (child.kv.safe or child.kv.may_open) for child in thread.forks_beyond(length)):
            return [thread]  # a child that is not in the cache takes what it shares from here, before that is cut
        if not thread.kv.opened and thread.splits_joined(length):
            return [thread]  # half of what a child wrote cannot be computed again
        # Nor could those that have left and are needed still, if what they saw had gone.
        return [t for t in self.live.have_gone(thread, length - len(thread.prefix)) if self.live.to_compute(t)]

    def forget(self, thread: EngineThread, length: int) -> None:
        if thread.live is not None:
            own = length - len(thread.prefix)
            if own < thread.turns.assigned and (readers := self.live.have_seen(thread, own)):
                raise ValueError(
                    f"truncate: thread {readers[0].id} has seen what would go of thread {thread.id} (its own tokens "
                    f"from {own} on); cut it before the next token is computed, or end those that see it first"
                )
            for reader in self.live.have_gone(thread, own):
                reader.kv.fixed = True
            thread.turns.cut(own)
        kv = thread.kv
        for child in thread.forks_beyond(length):
            if not child.kv.safe:
                child.kv.open(self.cache)
            child.kv.fixed = True  # what it shares with this thread could not be computed again
            child.kv.shared = min(child.kv.shared, length)
        kv.cut(self.cache, length)
        kv.fixed = kv.fixed or thread.splits_joined(length)
        kv.logits = None

    def prepare(self, thread: EngineThread, what: str) -> None:
        """Have the next token's logits computed where they are missing."""
        if thread.kv.has_logits:
            return
        thread.kv.share_logits()
        if thread.kv.in_cache and not thread.kv.has_logits and not self.rewind(thread):
            raise ValueError(
                f"{what}: thread {thread.id} has nothing to go on from: its last tokens are "
                f"{'joined siblings' if thread.segments else 'its parents'}; insert() at least one token first"
            )

    def rewind(self, thread: EngineThread) -> bool:
        """Forget the last token's KV, so that computing it again gives the logits that are missing; whether it could.

        Needed after a truncation: logits belong to the token that was cut off.
        """
        last = thread.segments[-1] if thread.segments else None
        if not thread.kv.in_cache or last is None or last.spliced is not None:
            return False
        self.cache.truncate(thread.kv.held, thread.length - 1)
        return True

    def free(self, thread: EngineThread) -> None:
        thread.kv.logits = None
        if not thread.lingers:
            thread.kv.forget(self.cache)

    def release(self) -> None:
        for thread in self._lingering:
            thread.lingers = False
        self._lingering.clear()
        super().release()


def _holds_for(thread: EngineThread) -> bool:
    """Whether a thread that has left has something that others have yet to take from it: a fork that is needed still
    what they share, one that saw it, being live, what cannot be computed without the others of its group."""
    if any(child.lingers and child.role == "fork" and not child.kv.safe for child in thread.children):
        return True
    return any(not fork.kv.safe for fork in _forks_that_saw(thread))


def _forks_that_saw(thread: EngineThread) -> list[EngineThread]:
    """The forks there that saw from their beginning what a live thread had written."""
    if thread.live is None or thread.parent is None:
        return []
    siblings = (fork for fork in thread.parent.children if fork.born and (fork.alive or fork.lingers))
    return [fork for fork in siblings if any(segment.spliced is thread for segment in fork.seen)]
