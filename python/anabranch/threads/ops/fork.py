"""Children that begin with all of their parent's context."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from anabranch.records.actions import Action
from anabranch.strategies.api.ops import ForkOp, InsertOp
from anabranch.strategies.api.thread import Thread
from anabranch.threads.ops.base import HostOp
from anabranch.threads.state import AnyThread

if TYPE_CHECKING:
    from anabranch.threads.books import Books


class Fork(HostOp[ForkOp]):
    """The children are to share their parent's last token, so in an engine its KV is computed first.

    That costs one more row in a step that other threads use as well, and the row's logits serve children without a
    header. (Leaving the token to the children instead would compute it once per child, and a concat join would then
    bring it back once per child.)
    """

    def needs(self, host: Books[Any], thread: AnyThread, op: ForkOp) -> list[AnyThread]:
        return [thread]

    def ready(self, host: Books[Any], thread: AnyThread, op: ForkOp) -> bool:
        return host.may_fork(thread)

    def carry_out(self, host: Books[Any], thread: AnyThread, op: ForkOp) -> list[Thread]:
        children = [host.state(child) for child in op.children]
        context = thread.context  # one tuple for all children
        host.hold_children(thread, children)
        thread.blocks.append((thread.length, children))
        thread.spawned_at = -1
        headers: list[list[int] | None] = []
        for child in children:
            header = child.queue[0] if child.queue else None
            if isinstance(header, InsertOp) and header.header:
                header.token_ids = host.ids(thread, header.given)
                header.given = header.token_ids
                child.header_length = len(header.token_ids)
                headers.append(list(header.token_ids))
            else:
                headers.append(None)
        thread.log.append(Action("fork", children=[c.id for c in children], headers=headers, clock=thread.clock))
        for child in children:
            thread.branch_off(child, context)
            if not child.alive:  # killed before it came to be
                host.free(child)
        host.narrator.forked(thread, [child.id for child in children])
        return op.children

    def drop(self, host: Books[Any], thread: AnyThread, op: ForkOp, fate: str) -> None:
        for handle in op.children:  # they never came to be
            host.end(host.state(handle), fate)
