"""Join mode "reprefill": append the children's tokens one behind another, to be computed again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from anabranch.engine.joins.common import adopt, adoptable, end_children, splice
from anabranch.engine.thread_kv import EngineThread

if TYPE_CHECKING:
    from anabranch.engine.request import Request
    from anabranch.strategies.api.ops import JoinOp


class Reprefill:
    """The first child's KV is what computing it again would give, where nothing came in between; it is spliced."""

    def needs(self, thread: EngineThread, op: JoinOp, children: Sequence[EngineThread]) -> list[EngineThread]:
        if not children or not _spliceable(thread, children[0]) or adoptable(thread, op, children):
            return []  # nothing of it is to be spliced
        return [thread, children[0]]

    def carry_out(self, request: Request, thread: EngineThread, op: JoinOp, children: Sequence[EngineThread]) -> None:
        if not children:
            return
        length = thread.length
        if adoptable(thread, op, children):
            adopt(request, thread, children[0])
        else:
            self._append(request, thread, op, children)
        request.narrator.tell_held(thread, length)

    @staticmethod
    def _append(request: Request, thread: EngineThread, op: JoinOp, children: Sequence[EngineThread]) -> None:
        first = 0
        if _spliceable(thread, children[0]) and thread.goes_on_as(children[0]) and op.headers[0] is None:
            # Nothing stands between the fork and the first child: its KV is what computing it again would give.
            splice(request, thread, children[:1])
            first = 1
        for i, child in enumerate(children[first:], first):
            end_children(request, child)
            clock = thread.clock
            own = child.own[child.prompt_length :]
            if (given := op.headers[i]) is not None:
                header = op.headers[i] = request.ids(thread, given)
                own = header + own[child.header_length :]
            if own:
                thread.append(own, "joined", child.id)
            thread.clock = clock  # these tokens were counted in their own thread
            request.retire(child, "joined")


def _spliceable(thread: EngineThread, first: EngineThread) -> bool:
    """Whether the first child saw nothing but its thread's context, in which it then stands."""
    return first.role == "fork" and first.live is None and thread.live is None
