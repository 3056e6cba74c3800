"""Join mode "summary": the children go, and a text stands in their place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from anabranch.engine.cuts import cut_needs, truncate
from anabranch.engine.joins.common import end_children
from anabranch.engine.thread_kv import EngineThread

if TYPE_CHECKING:
    from anabranch.engine.request import Request
    from anabranch.strategies.api.ops import JoinOp


class Summary:
    """A cut and an insertion; it happens even when all children were killed meanwhile."""

    def needs(self, thread: EngineThread, op: JoinOp, children: Sequence[EngineThread]) -> list[EngineThread]:
        return [] if op.keep is None else cut_needs(thread, op.keep)

    def carry_out(self, request: Request, thread: EngineThread, op: JoinOp, children: Sequence[EngineThread]) -> None:
        if op.keep is not None:
            truncate(request.cache, thread, op.keep, f"join: keep={op.keep}")
        for child in children:
            end_children(request, child)
            request.retire(child, "joined")
        request.insert(thread, request.settle(thread, op), "inserted")
