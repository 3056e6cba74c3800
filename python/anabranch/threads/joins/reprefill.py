"""Join mode "reprefill": append the children's tokens one behind another, to be computed again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from anabranch.threads.joins.common import JoinOfTokens, adoptable, end_children, same_segment, splice
from anabranch.threads.state import AnyThread

if TYPE_CHECKING:
    from anabranch.strategies.api.ops import JoinOp
    from anabranch.threads.books import Books


class Reprefill(JoinOfTokens):
    """The first child's KV is what computing it again would give, where nothing came in between; it is spliced."""

    def needs(self, host: Books[Any], thread: AnyThread, op: JoinOp, children: Sequence[AnyThread]) -> list[AnyThread]:
        if not children or not _spliceable(thread, children[0]) or adoptable(host, thread, op, children):
            return []  # nothing of it is to be spliced
        return [thread, children[0]]

    def append(self, host: Books[Any], thread: AnyThread, op: JoinOp, children: Sequence[AnyThread]) -> None:
        first = 0
        same = same_segment(thread, children)
        if same and _spliceable(thread, children[0]) and thread.goes_on_as(children[0]) and op.headers[0] is None:
            # Nothing stands between the fork and the first child: its KV is what computing it again would give.
            splice(host, thread, children[:1])
            first = 1
        for i, child in enumerate(children[first:], first):
            end_children(host, child)
            clock = thread.clock
            own = child.own[child.prompt_length :]
            if (given := op.headers[i]) is not None:
                header = op.headers[i] = host.ids(thread, given)
                own = header + own[child.header_length :]
            if own:
                thread.append(own, "joined", child.id)
            thread.clock = clock  # these tokens were counted in their own thread
            host.retire(child, "joined")


def _spliceable(thread: AnyThread, first: AnyThread) -> bool:
    """Whether the first child saw nothing but its thread's context, in which it then stands."""
    return first.role == "fork" and first.live is None and thread.live is None
