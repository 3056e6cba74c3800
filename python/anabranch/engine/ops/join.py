"""Taking children back, by any of the join modes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anabranch.engine.joins import ENGINE_JOINS
from anabranch.engine.ops.base import EngineOp
from anabranch.engine.thread_kv import EngineThread
from anabranch.records.actions import Action
from anabranch.records.joins import JOINS
from anabranch.strategies.api.ops import JoinOp

if TYPE_CHECKING:
    from anabranch.engine.request import Request


class Join(EngineOp[JoinOp]):
    """What a join splices is KV, so the token that was sampled last is computed first."""

    def needs(self, request: Request, thread: EngineThread, op: JoinOp) -> list[EngineThread]:
        return ENGINE_JOINS[op.mode].needs(thread, op, _children(request, op))

    def waits_for_children(self, request: Request, op: JoinOp) -> bool:
        return any(child.queue or not child.born for child in _children(request, op))

    def carry_out(self, request: Request, thread: EngineThread, op: JoinOp) -> None:
        children, names = _children(request, op), [child.id for child in op.children]
        for child in children:
            thread.reach(child.clock)
            thread.path_sampled = max(thread.path_sampled, child.path_sampled)
        if op.mode == "concat" and any(t.live is not None for t in (thread, *children)):
            raise ValueError(
                "join: mode='concat' splices KV that depends on what its thread saw of others; take threads that see "
                "one another back by mode='reprefill', 'summary' or 'discard'"
            )
        ENGINE_JOINS[op.mode].carry_out(request, thread, op, children)
        if children:
            headers = [None if h is None else request.ids(thread, h) for h in op.headers]
            thread.log.append(JOINS[op.mode].recorded(names, op.token_ids, op.keep, headers))
            request.narrator.joined(thread, names, op.mode)
        else:  # all were killed while it waited for them
            if op.keep is not None:
                thread.log.append(Action("truncate", length=op.keep))
            if op.token_ids:
                thread.log.append(Action("insert", op.token_ids))


def _children(request: Request, op: JoinOp) -> list[EngineThread]:
    return [request.state(child) for child in op.children]
