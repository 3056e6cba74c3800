"""Inserting tokens that nobody sampled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from anabranch.records.actions import Action
from anabranch.strategies.api.ops import InsertOp
from anabranch.threads.ops.base import HostOp
from anabranch.threads.state import AnyThread

if TYPE_CHECKING:
    from anabranch.threads.books import Books


class Insert(HostOp[InsertOp]):
    """Appends to the books alone; the tokens are prefilled when something needs them."""

    def carry_out(self, host: Books[Any], thread: AnyThread, op: InsertOp) -> None:
        clock = thread.clock
        host.insert(thread, host.settle(thread, op), op.kind)
        if op.kind == "inserted":
            thread.log.append(Action("insert", list(op.token_ids), clock=clock))
