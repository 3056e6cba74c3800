"""How a thread forgets tokens, in its books and in the cache."""

from __future__ import annotations

from anabranch.engine.live import in_sight
from anabranch.engine.thread_kv import EngineThread
from anabranch.kv.cache import TreeCache


def cut_needs(thread: EngineThread, length: int) -> list[EngineThread]:
    """Threads that must be wholly in the cache before this one can be cut to `length`."""
    if any(child.kv.branch is None for child in thread.forks_beyond(length)):
        return [thread]  # a child that is not in the cache takes what it shares from here, before that is cut
    if not thread.kv.opened and thread.splits_joined(length):
        return [thread]  # half of what a child wrote cannot be computed again
    return []


def truncate(cache: TreeCache, thread: EngineThread, length: int, what: str) -> None:
    """Cut a thread to a context length; ValueError (it begins with `what`) when more than its own would go."""
    if not thread.begin <= length <= thread.length:
        raise ValueError(
            f"{what}: thread {thread.id} can be cut to a length of {thread.begin} (all but its own tokens) to "
            f"{thread.length}"
        )
    if length == thread.length:
        return
    if thread.live is not None:
        own = length - len(thread.prefix)
        if own < thread.live.assigned and (readers := in_sight(thread)):
            raise ValueError(
                f"{what}: thread {readers[0].id} has seen what would go of thread {thread.id} (its own tokens from "
                f"{own} on); cut it before the next token is computed, or end those that see it first"
            )
        thread.live.cut(own)
    kv = thread.kv
    for child in thread.forks_beyond(length):
        if child.kv.branch is None:
            child.kv.open(cache)
        child.severed = child.kv.pinned = True  # what it shares with this thread could not be computed again
    if kv.rebuilding:
        kv.release(cache)
    elif kv.branch is not None and kv.branch.length > length:
        cache.truncate(kv.branch, length)
    if thread.reader is not None and not thread.reader.drop(thread.length - length):
        thread.reader = None  # some of it was told
    kv.pinned = not thread.cut(length) or kv.pinned
    kv.logits = None


def rewind(cache: TreeCache, thread: EngineThread) -> bool:
    """Forget the last token's KV, so that computing it again gives the logits that are missing; whether it could.

    Needed after a truncation: logits belong to the token that was cut off.
    """
    last = thread.segments[-1] if thread.segments else None
    if not thread.kv.in_cache or last is None or last.spliced is not None:
        return False
    cache.truncate(thread.kv.held, thread.length - 1)
    return True
