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
        return [*host.along(thread), *(host.state(other) for other, _ in op.sees)]

    def waits_for_children(self, host: Books[Any], op: ForkOp) -> bool:
        """For those that are to be seen, and for what the strategy may still have to add to them."""
        if not op.sees:
            return False
        if host.tasks.due:
            return True
        seen = ((host.state(other), count) for other, count in op.sees)
        return any(not s.born or (s.queue if count is None else len(s.own) < count) for s, count in seen)

    def ready(self, host: Books[Any], thread: AnyThread, op: ForkOp) -> bool:
        if op.sees:  # no logits are needed: its children do not go on from its last token
            return super().ready(host, thread, op)
        return host.may_fork(thread)

    def carry_out(self, host: Books[Any], thread: AnyThread, op: ForkOp) -> list[Thread]:
        children = [host.state(child) for child in op.children]
        seen = [
            (other, len(other.own) if count is None else count)
            for other, count in ((host.state(handle), count) for handle, count in op.sees)
        ]
        context = thread.context + tuple(t for other, count in seen for t in other.own[:count])  # one for all children
        host.hold_children(thread, children, seen)
        at = len(thread.blocks)
        if seen:  # forks asked for later may have come to be while it waited
            while (
                at and thread.blocks[at - 1][0] == thread.length and thread.blocks[at - 1][1][0].path > children[0].path
            ):
                at -= 1
        thread.blocks.insert(at, (thread.length, children))
        thread.spawned_at = -1
        headers: list[list[int] | None] = []
        for child, segment in zip(children, op.segments or [thread.kv_segment] * len(children), strict=True):
            child.kv_segment = segment
            thread.branch_off(child, context, seen)
            header = child.queue[0] if child.queue else None
            if isinstance(header, InsertOp) and header.header:
                header.token_ids = host.ids(child, header.given)
                header.given = header.token_ids
                child.header_length = len(header.token_ids)
                headers.append(list(header.token_ids))
            else:
                headers.append(None)
        names = [child.id for child in children]
        action = Action(
            "fork",
            children=names,
            headers=headers,
            segments=op.segments or (),
            clock=thread.clock,
            length=op.apart or None,
            logged=[len(other.log) for other, _ in seen],
        )
        thread.log.append(action)
        for i, child in enumerate(children):
            child.start = child.position = child.start + i * op.apart
            if not child.alive:  # killed before it came to be
                host.free(child)
        host.narrator.forked(thread, names)
        return op.children

    def drop(self, host: Books[Any], thread: AnyThread, op: ForkOp, fate: str) -> None:
        for handle in op.children:  # they never came to be
            host.end(host.state(handle), fate)
