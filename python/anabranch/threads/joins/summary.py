"""Join mode "summary": the children go, and a text stands in their place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from anabranch.threads.joins.common import end_children
from anabranch.threads.state import AnyThread

if TYPE_CHECKING:
    from anabranch.strategies.api.ops import JoinOp
    from anabranch.threads.books import Books


class Summary:
    """A cut and an insertion; it happens even when all children were killed meanwhile."""

    def needs(self, host: Books[Any], thread: AnyThread, op: JoinOp, children: Sequence[AnyThread]) -> list[AnyThread]:
        return [] if op.keep is None else host.cut_needs(thread, op.keep)

    def carry_out(self, host: Books[Any], thread: AnyThread, op: JoinOp, children: Sequence[AnyThread]) -> None:
        if op.keep is not None:
            host.cut(thread, op.keep, f"join: keep={op.keep}")
        for child in children:
            end_children(host, child)
            host.retire(child, "joined")
        host.insert(thread, host.settle(thread, op), "inserted")
