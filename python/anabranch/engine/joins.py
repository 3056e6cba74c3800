"""How a thread takes its children back, and how it forgets: tokens, positions and cache under each join mode."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from anabranch.engine.thread_state import append, cut
from anabranch.records import events
from anabranch.records.actions import Action
from anabranch.strategies.api.ops import Join
from anabranch.strategies.api.thread import Segment, Thread

if TYPE_CHECKING:
    from anabranch.engine.request import Request


def adoptable(op: Join) -> bool:
    """Whether the thread may simply become its only remaining child: nothing to splice, so nothing to compute first.

    Only for a thread that no parent will join (a branch knows its own tokens by where it was forked).
    """
    thread, kids = op.thread, op.kids
    others = [k for _, children in thread._forks for k in children if k.alive and k.role == "fork" and k not in kids]
    return (
        op.headers == [None]
        and thread.role != "fork"
        and len(kids) == 1
        and not others
        and continues(thread, kids[0])
        and not any(k.alive for _, children in kids[0]._forks for k in children)
    )


def join(request: Request, op: Join) -> None:
    """Carry out a join (not "discard", which needs no waiting); all that `Request.needs` named is in the cache."""
    thread, kids, mode = op.thread, op.kids, op.mode
    length = thread.length
    for kid in kids:
        thread._depth = max(thread._depth, kid._depth)
        thread._path_sampled = max(thread._path_sampled, kid._path_sampled)
    if mode == "summary":
        if op.keep is not None:
            truncate(request.cache, thread, op.keep, f"join: keep={op.keep}")
        for kid in kids:
            _end_children(request, kid)
            request.retire(kid, "joined")
        request.insert(thread, request.settle(op), "inserted")
    elif kids:
        if adoptable(op):
            _adopt(request, thread, kids[0])
        elif mode == "concat":
            _splice(request, thread, kids)
        else:
            _reprefill(request, thread, op)
        request.tell_held(thread, length)
    if kids:
        headers: list[Any] = list(op.headers)
        thread._log.append(Action("join", op.token_ids, [k.id for k in kids], mode, op.keep, headers))
    else:  # all were killed while it waited for them
        if op.keep is not None:
            thread._log.append(Action("truncate", length=op.keep))
        if op.token_ids:
            thread._log.append(Action("insert", op.token_ids))
    if request.emit and kids:
        request.emit(events.Join(request.index, thread.id, tuple(k.id for k in kids), mode, thread.length))


def _adopt(request: Request, thread: Thread, kid: Thread) -> None:
    """The thread becomes its child: takes over its branch and its scores, so not a row is computed for the join."""
    mine, its = thread._live, kid._live
    mine.release(request.cache)
    if its._rebuild is None:
        mine.branch, its.branch = its.branch, None
    mine.scores, mine.scores_at = (
        its.scores,
        its.scores_at,
    )  # a child not in the cache is rebuilt as its parent, if needed
    mine.pinned = mine.pinned or its.pinned
    for segment in kid._segments:
        source = kid.id if segment.spliced is None else segment.source  # whose KV it is, as everywhere
        thread._segments.append(Segment("joined", list(segment.token_ids), segment.position, source, segment.spliced))
    thread._own.extend(kid._own)
    thread._position = kid._position
    request.retire(kid, "joined")


def _splice(request: Request, thread: Thread, kids: list[Thread]) -> None:
    for kid in kids:
        _end_children(request, kid)
    # The tree takes a kid's tokens since its fork from the branch itself; positions come from our own books.
    request.cache.join(thread._live.branch, [kid._live.branch for kid in kids], mode="concat")
    mine, its = thread._live, kids[-1]._live
    if len(kids) == 1 and continues(thread, kids[0]) and its.has_scores:
        # One child and nothing in between: one plain sequence, so the child's next-token scores are the thread's.
        mine.scores, mine.scores_at = its.scores, its.scores_at
    for kid in kids:
        kid._live.branch = None
        if kid._own:
            thread._segments.append(Segment("joined", list(kid._own), kid._segments[0].position, kid.id, kid))
            thread._own.extend(kid._own)
            thread._position = max(thread._position, kid._position)
        thread._live.pinned = thread._live.pinned or kid._live.pinned
        request.retire(kid, "joined")


def _reprefill(request: Request, thread: Thread, op: Join) -> None:
    rest = list(zip(op.kids, op.headers, strict=True))
    if op.kids[0].role == "fork" and continues(thread, op.kids[0]) and op.headers[0] is None:
        # Nothing stands between the fork and the first child: its KV is what computing it again would give.
        _splice(request, thread, op.kids[:1])
        rest = rest[1:]
    for kid, given in rest:
        _end_children(request, kid)
        depth = thread._depth
        own = kid._own[kid._prompt_length :]
        if given is not None:
            header = op.headers[op.kids.index(kid)] = request.ids(thread, given)
            own = header + own[kid._header_length :]
        if own:
            append(thread, own, "joined", kid.id)
        thread._depth = depth  # these tokens were counted in their own thread
        request.retire(kid, "joined")


def _end_children(request: Request, thread: Thread) -> None:
    for _, children in thread._forks:
        for child in children:
            request.kill(child, "killed")


def continues(thread: Thread, kid: Thread) -> bool:
    """Whether the thread's context is, token for token, the one that its fork `kid` began with."""
    return thread.length == len(kid._prefix) and not kid._live.severed


def built_on(thread: Thread, length: int) -> list[Thread]:
    """Its forks that share more of it than the first `length` tokens."""
    kids = (kid for _, children in thread._forks for kid in children)
    return [k for k in kids if k.alive and k._live.born and k.role == "fork" and len(k._prefix) > length]


def splits_joined(thread: Thread, length: int) -> bool:
    """Whether a cut to context length `length` leaves a part of what a joined child wrote."""
    end = thread.length
    for segment in reversed(thread._segments):
        begin = end - len(segment.token_ids)
        if begin <= length:
            return segment.spliced is not None and begin < length < end
        end = begin
    return False


def truncate(cache: Any, thread: Thread, length: int, what: str) -> None:
    """Cut a thread to a context length; ValueError (it begins with `what`) when more than its own would go."""
    least = len(thread._prefix) + thread._prompt_length
    if not least <= length <= thread.length:
        raise ValueError(
            f"{what}: thread {thread.id} can be cut to a length of {least} (all but its own tokens) to {thread.length}"
        )
    if length == thread.length:
        return
    live = thread._live
    for child in built_on(thread, length):
        if child._live.branch is None:
            child._live.open(cache)
        child._live.severed = child._live.pinned = True  # what it shares with this thread could not be computed again
    if live._rebuild is not None:
        live.release(cache)
    elif live.branch is not None and live.branch.length > length:
        cache.truncate(live.branch, length)
    if live.reader is not None and not live.reader.drop(thread.length - length):
        live.reader = None  # some of it was told
    live.pinned = not cut(thread, length) or live.pinned
    live.scores = None


def rewind(cache: Any, thread: Thread) -> bool:
    """Forget the last token's KV, so that computing it again gives the scores that are missing; whether it could.

    Needed after a truncation: scores belong to the token that was cut off.
    """
    live, last = thread._live, thread._segments[-1] if thread._segments else None
    if not live.in_cache or last is None or last.spliced is not None:
        return False
    cache.truncate(live.branch, thread.length - 1)
    return True
