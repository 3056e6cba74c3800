"""Join mode "concat": splice the children's KV side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from anabranch.threads.joins.common import JoinOfTokens, adoptable, splice
from anabranch.threads.state import AnyThread

if TYPE_CHECKING:
    from anabranch.strategies.api.ops import JoinOp
    from anabranch.threads.books import Books


class Concat(JoinOfTokens):
    """What is spliced is KV, so the thread and all children must have theirs in the cache."""

    def needs(self, host: Books[Any], thread: AnyThread, op: JoinOp, children: Sequence[AnyThread]) -> list[AnyThread]:
        return [thread, *children] if children and not adoptable(host, thread, op, children) else []

    def append(self, host: Books[Any], thread: AnyThread, op: JoinOp, children: Sequence[AnyThread]) -> None:
        splice(host, thread, children)
