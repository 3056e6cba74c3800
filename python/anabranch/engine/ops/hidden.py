"""Looking up the last token's hidden state."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anabranch.engine.thread_kv import EngineThread
from anabranch.runner.hidden import check_head
from anabranch.strategies.api.ops import HiddenOp
from anabranch.threads.ops.base import HostOp

if TYPE_CHECKING:
    from anabranch.engine.request import Request


class Hidden(HostOp[HiddenOp]):
    """The step that computes the last token notes what the language head reads. A token that is in the cache already
    is computed once more, in one row of a step."""

    def needs(self, host: Request, thread: EngineThread, op: HiddenOp) -> list[EngineThread]:
        return [] if _known(thread) else [thread]

    def ready(self, host: Request, thread: EngineThread, op: HiddenOp) -> bool:
        if _known(thread):
            return True
        if not thread.kv.wants_hidden:
            check_head(host.samplers.base.model)
            thread.kv.wants_hidden = True
        if thread.kv.in_cache and not host.rewind(thread):
            raise ValueError(
                f"hidden: thread {thread.id} has no last token of its own (it ends in "
                f"{'joined siblings' if thread.segments else 'its parents'}); insert() at least one token, or ask the "
                "parent before the fork"
            )
        return False

    def carry_out(self, host: Request, thread: EngineThread, op: HiddenOp) -> tuple[float, ...]:
        thread.kv.wants_hidden = False
        assert thread.kv.hidden is not None
        return thread.kv.hidden[1]


def _known(thread: EngineThread) -> bool:
    return thread.kv.hidden is not None and thread.kv.hidden[0] == thread.length
