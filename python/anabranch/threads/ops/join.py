"""Taking children back, by any of the join modes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from anabranch.records.actions import Action
from anabranch.records.joins import JOINS
from anabranch.strategies.api.ops import JoinOp
from anabranch.threads.joins import HOST_JOINS
from anabranch.threads.ops.base import HostOp
from anabranch.threads.state import AnyThread

if TYPE_CHECKING:
    from anabranch.threads.books import Books


class Join(HostOp[JoinOp]):
    """What a join splices is KV, so in an engine the token that was sampled last is computed first."""

    def needs(self, host: Books[Any], thread: AnyThread, op: JoinOp) -> list[AnyThread]:
        needed = HOST_JOINS[op.mode].needs(host, thread, op, _children(host, op))
        host.hold_own([child for child in needed if child is not thread])
        return needed

    def waits_for_children(self, host: Books[Any], op: JoinOp) -> bool:
        return any(child.queue or not child.born for child in _children(host, op))

    def carry_out(self, host: Books[Any], thread: AnyThread, op: JoinOp) -> None:
        children, names = _children(host, op), [child.id for child in op.children]
        for child in children:
            thread.reach(child.clock)
            thread.path_sampled = max(thread.path_sampled, child.path_sampled)
        if op.mode == "concat" and any(t.live is not None for t in (thread, *children)):
            raise ValueError(
                "join: mode='concat' splices KV that depends on what its thread saw of others; take threads that see "
                "one another back by mode='reprefill', 'summary' or 'discard'"
            )
        clock, seen = thread.clock, {} if op.keep is None else thread.live_record()
        if not children and op.keep is not None:  # all were killed while it waited for them: what is left is a cut
            thread.log.append(Action("truncate", length=op.keep, clock=clock, **seen))
        HOST_JOINS[op.mode].carry_out(host, thread, op, children)
        if children:
            headers = [None if h is None else host.ids(thread, h) for h in op.headers]
            action = JOINS[op.mode].recorded(names, op.token_ids, op.keep, headers)
            thread.log.append(replace(action, clock=clock, **seen))
            host.narrator.joined(thread, names, op.mode)
        elif op.token_ids:  # … and an insertion
            thread.log.append(Action("insert", op.token_ids, clock=clock))


def _children(host: Books[Any], op: JoinOp) -> list[AnyThread]:
    return [host.state(child) for child in op.children]
