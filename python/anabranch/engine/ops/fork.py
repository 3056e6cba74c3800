"""Children that begin with all of their parent's context."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anabranch.engine.cuts import rewind
from anabranch.engine.ops.base import EngineOp
from anabranch.engine.thread_kv import EngineThread
from anabranch.records.actions import Action
from anabranch.strategies.api.ops import ForkOp, InsertOp
from anabranch.strategies.api.thread import Thread

if TYPE_CHECKING:
    from anabranch.engine.request import Request


class Fork(EngineOp[ForkOp]):
    """The children are to share their parent's last token, so its KV is computed first.

    That costs one more row in a step that other threads use as well, and the row's logits serve children without a
    header. (Leaving the token to the children instead would compute it once per child, and a concat join would then
    bring it back once per child.)
    """

    def needs(self, request: Request, thread: EngineThread, op: ForkOp) -> list[EngineThread]:
        return [thread, *(request.state(other) for other, _ in op.sees)]

    def waits_for_children(self, request: Request, op: ForkOp) -> bool:
        """For those that are to be seen, and for what the strategy may still have to add to them."""
        if not op.sees:
            return False
        if request.tasks.due:
            return True
        seen = ((request.state(other), count) for other, count in op.sees)
        return any(not s.born or (s.queue if count is None else len(s.own) < count) for s, count in seen)

    def ready(self, request: Request, thread: EngineThread, op: ForkOp) -> bool:
        if op.sees and not super().ready(request, thread, op):
            return False  # no logits are needed: its children do not go on from its last token
        return bool(op.sees) or ((thread.kv.has_logits or not rewind(request.cache, thread)) and thread.kv.in_cache)

    def carry_out(self, request: Request, thread: EngineThread, op: ForkOp) -> list[Thread]:
        children = [request.state(child) for child in op.children]
        seen = [
            (other, len(other.own) if count is None else count)
            for other, count in ((request.state(handle), count) for handle, count in op.sees)
        ]
        context = thread.context + tuple(t for other, count in seen for t in other.own[:count])  # one for all children
        branches = request.cache.fork(thread.kv.held, len(children))
        for branch in branches:
            for other, count in seen:
                request.cache.share(branch, other.kv.held, count)
        at = len(thread.blocks)
        if seen:  # forks asked for later may have come to be while it waited
            while (
                at and thread.blocks[at - 1][0] == thread.length and thread.blocks[at - 1][1][0].path > children[0].path
            ):
                at -= 1
        thread.blocks.insert(at, (thread.length, children))
        thread.spawned_at = -1
        headers: list[list[int] | None] = []
        for child in children:
            thread.branch_off(child, context, seen)
            child.kv.pinned = any(other.kv.pinned for other, _ in seen)
            header = child.queue[0] if child.queue else None
            if isinstance(header, InsertOp) and header.header:
                header.token_ids = request.ids(child, header.given)
                header.given = header.token_ids
                child.header_length = len(header.token_ids)
                headers.append(list(header.token_ids))
            else:
                headers.append(None)
        thread.log.append(Action("fork", children=[child.id for child in children], headers=headers))
        for child, branch in zip(children, branches, strict=True):
            child.kv.branch = branch
            if not seen:
                child.kv.logits, child.kv.logits_at = thread.kv.logits, thread.kv.logits_at
            if not child.alive:  # killed before it came to be
                child.kv.release(request.cache)
        request.narrator.forked(thread, [child.id for child in children])
        return op.children

    def drop(self, request: Request, thread: EngineThread, op: ForkOp, fate: str) -> None:
        for handle in op.children:  # they never came to be
            request.end(request.state(handle), fate)
