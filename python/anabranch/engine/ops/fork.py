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
        return request.with_live(thread)

    def ready(self, request: Request, thread: EngineThread, op: ForkOp) -> bool:
        return (thread.kv.has_logits or not rewind(request.cache, thread)) and thread.kv.in_cache

    def carry_out(self, request: Request, thread: EngineThread, op: ForkOp) -> list[Thread]:
        children = [request.state(child) for child in op.children]
        context = thread.context  # one tuple for all children
        branches = request.cache.fork(thread.kv.held, len(children))
        thread.blocks.append((thread.length, children))
        thread.spawned_at = -1
        headers: list[list[int] | None] = []
        for child in children:
            header = child.queue[0] if child.queue else None
            if isinstance(header, InsertOp) and header.header:
                header.token_ids = request.ids(thread, header.given)
                header.given = header.token_ids
                child.header_length = len(header.token_ids)
                headers.append(list(header.token_ids))
            else:
                headers.append(None)
        names = [child.id for child in children]
        thread.log.append(Action("fork", children=names, length=op.apart or None, headers=headers))
        for i, (child, branch) in enumerate(zip(children, branches, strict=True)):
            thread.branch_off(child, context)
            child.start = child.position = thread.position + i * op.apart
            child.kv.branch, child.kv.logits, child.kv.logits_at = branch, thread.kv.logits, thread.kv.logits_at
            if not child.alive:  # killed before it came to be
                child.kv.release(request.cache)
        request.narrator.forked(thread, [child.id for child in children])
        return op.children

    def drop(self, request: Request, thread: EngineThread, op: ForkOp, fate: str) -> None:
        for handle in op.children:  # they never came to be
            request.end(request.state(handle), fate)
