"""Inserting tokens that nobody sampled."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anabranch.engine.ops.base import EngineOp
from anabranch.engine.thread_kv import EngineThread
from anabranch.records.actions import Action
from anabranch.strategies.api.ops import InsertOp

if TYPE_CHECKING:
    from anabranch.engine.request import Request


class Insert(EngineOp[InsertOp]):
    """Appends to the books alone; the tokens are prefilled when something needs them."""

    def carry_out(self, request: Request, thread: EngineThread, op: InsertOp) -> None:
        clock = thread.clock
        request.insert(thread, request.settle(thread, op), op.kind)
        if op.kind == "inserted":
            thread.log.append(Action("insert", list(op.token_ids), clock=clock))
