"""How threads stand to one another, as far as it decides who may go on, and who has to leave."""

from __future__ import annotations

from collections.abc import Iterable

from anabranch.engine.request import Request
from anabranch.engine.thread_kv import EngineThread, ThreadKV

WORTH_WAITING = 64  # tokens that another request is computing just now: who needs them too waits for it

Progress = tuple[int, int, int]


def bring(thread: EngineThread, wanted: dict[EngineThread, None]) -> None:
    """Add a thread, unless it is in the cache, behind what it cannot be without there: its parents, and siblings that
    it sees (computed for it alone, what they have in common with it would be there twice)."""
    if thread.kv.branch is not None:
        if not thread.kv.in_cache:
            wanted[thread] = None
        return
    left = [thread]
    while left:
        thread = left[-1]
        before = []
        if thread.kv.branch is None and thread not in wanted:
            before = [sibling.thread for sibling in thread.kv.absent if there(sibling)]
            if not thread.kv.may_open:
                assert thread.parent is not None
                before.append(thread.parent)
            before = [other for other in before if not other.kv.in_cache and other not in wanted]
        if before:
            left += before
        else:
            left.pop()
            if not thread.kv.in_cache:
                wanted[thread] = None


def there(kv: ThreadKV) -> bool:
    """Whether what a thread holds comes from itself: it has not left, or not for good."""
    return kv.thread.alive or kv.thread.lingers


def sources(kv: ThreadKV) -> Iterable[ThreadKV]:
    """A thread and what it comes from: what it continues, and the siblings that it sees, where its KV is to be made of
    theirs; and all that those come from."""
    found: dict[int, ThreadKV] = {}
    left = [kv]
    while left:
        kv = left.pop()
        if id(kv) in found:
            continue
        found[id(kv)] = kv
        thread = kv.thread
        if thread.role == "fork" and thread.parent is not None:
            left.append(thread.parent.kv)
        if kv.branch is None and kv.aside is None:
            left += [s.spliced.kv for s in thread.seen if s.spliced is not None and there(s.spliced.kv)]
    return found.values()


def progress(request: Request) -> Progress:
    """How far a request has got: it changes with every token and every operation."""
    return request.sampled, request.inserted, sum(len(thread.log) for thread in request.threads)


def stands(kv: ThreadKV) -> tuple[bool, int, int]:
    """Whether a thread is there, how much it has done, and has to do."""
    thread = kv.thread
    return thread.alive, len(thread.own) + len(thread.log), len(thread.queue)


def age(kv: ThreadKV) -> tuple[int, int, int]:
    return kv.thread.age


def go_together(a: ThreadKV, b: ThreadKV) -> bool:
    """Whether one of the two cannot have rows in a step without the other: they are one, or see one another."""
    live = a.thread.live is not None and b.thread.live is not None
    return a is b or (live and a.thread.request is b.thread.request)


def alike(kv: ThreadKV, other: ThreadKV) -> int:
    """With how many equal tokens two threads begin that others could find."""
    most = min(kv.findable, other.thread.dense_length)
    mine, theirs = kv.thread.own[:most], other.thread.own[:most]
    if other.thread.role == "fork" or mine[:WORTH_WAITING] != theirs[:WORTH_WAITING]:
        return 0
    return next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), most)


def built_on(thread: EngineThread) -> bool:
    """Whether a child of it is in the cache, or a sibling that sees it: what they share would stay."""
    siblings = thread.parent.children if thread.parent is not None else ()
    forks = (child.kv for child in thread.children if child.role == "fork")  # a spawned child shares nothing with it
    return any(kv.branch is not None for kv in forks) or any(
        segment.spliced is thread for other in siblings if other.kv.branch is not None for segment in other.seen
    )
