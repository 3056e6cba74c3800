"""Moving the position of a thread's next token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anabranch.engine.ops.base import EngineOp
from anabranch.engine.thread_kv import EngineThread
from anabranch.records.actions import Action
from anabranch.strategies.api.ops import SkipOp

if TYPE_CHECKING:
    from anabranch.engine.request import Request


class Skip(EngineOp[SkipOp]):
    """In the books alone: the cache is told each token's position when it is computed."""

    def carry_out(self, request: Request, thread: EngineThread, op: SkipOp) -> None:
        position = thread.position + op.count
        if position < 0:
            raise ValueError(
                f"skip: count={op.count}; thread {thread.id} is on position {thread.position}, "
                "and there is none below 0"
            )
        request.check_position(thread, position - 1)
        thread.position = position
        thread.log.append(Action("skip", position=position))
