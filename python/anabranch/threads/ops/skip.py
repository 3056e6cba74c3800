"""Moving the position of a thread's next token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from anabranch.records.actions import Action
from anabranch.strategies.api.ops import SkipOp
from anabranch.threads.ops.base import HostOp
from anabranch.threads.state import AnyThread

if TYPE_CHECKING:
    from anabranch.threads.books import Books


class Skip(HostOp[SkipOp]):
    """In the books alone: a cache is told each token's position when it is computed."""

    def carry_out(self, host: Books[Any], thread: AnyThread, op: SkipOp) -> None:
        position = thread.position + op.count
        if position < 0:
            raise ValueError(
                f"skip: count={op.count}; thread {thread.id} is on position {thread.position}, "
                "and there is none below 0"
            )
        host.check_position(thread, position - 1)
        thread.position = position
        thread.log.append(Action("skip", position=position, clock=thread.clock))
