"""Join mode "concat": splice the children's KV side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from anabranch.engine.joins.common import adopt, adoptable, splice
from anabranch.engine.thread_kv import EngineThread

if TYPE_CHECKING:
    from anabranch.engine.request import Request
    from anabranch.strategies.api.ops import JoinOp


class Concat:
    """What is spliced is KV, so the thread and all children must have theirs in the cache."""

    def needs(self, thread: EngineThread, op: JoinOp, children: Sequence[EngineThread]) -> list[EngineThread]:
        return [thread, *children] if children and not adoptable(thread, op, children) else []

    def carry_out(self, request: Request, thread: EngineThread, op: JoinOp, children: Sequence[EngineThread]) -> None:
        if not children:
            return
        length = thread.length
        if adoptable(thread, op, children):
            adopt(request, thread, children[0])
        else:
            splice(request, thread, children)
        request.narrator.tell_held(thread, length)
