"""What the join modes share: the interface, becoming the only child, splicing KV."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from anabranch.engine.thread_kv import EngineThread

if TYPE_CHECKING:
    from anabranch.engine.request import Request
    from anabranch.strategies.api.ops import JoinOp


class EngineJoin(Protocol):
    """How the engine carries out one join mode."""

    def needs(self, thread: EngineThread, op: JoinOp, children: Sequence[EngineThread]) -> list[EngineThread]:
        """Threads that must be wholly in the cache first."""

    def carry_out(self, request: Request, thread: EngineThread, op: JoinOp, children: Sequence[EngineThread]) -> None:
        """Do it; all that it `needs` is in the cache. There may be no children: all were killed."""


def adoptable(thread: EngineThread, op: JoinOp, children: Sequence[EngineThread]) -> bool:
    """Whether the thread may simply become its only remaining child: nothing to splice, so nothing to compute first.

    Only for a thread that no parent will join (a branch knows its own tokens by where it was forked).
    """
    others = [c for c in thread.children if c.alive and c.role == "fork" and c not in children]
    return (
        op.headers == [None]
        and thread.role != "fork"
        and len(children) == 1
        and not others
        and thread.goes_on_as(children[0])
        and not any(c.alive for c in children[0].children)
    )


def adopt(request: Request, thread: EngineThread, child: EngineThread) -> None:
    """The thread becomes its child: takes over its branch and its logits, so not a row is computed for the join."""
    thread.kv.take_over(child.kv, request.cache)
    thread.adopt(child)
    request.retire(child, "joined")


def splice(request: Request, thread: EngineThread, children: Sequence[EngineThread]) -> None:
    """The children's KV becomes the thread's, side by side."""
    for child in children:
        end_children(request, child)
        child.kv.share(request.cache)
    # The tree takes a child's tokens since its fork from the branch itself; positions come from our own books.
    request.cache.join(thread.kv.held, [child.kv.held for child in children], mode="concat")
    last = children[-1].kv
    if len(children) == 1 and thread.goes_on_as(children[0]) and last.has_logits:
        # One child and nothing in between: one plain sequence, so the child's next-token logits are the thread's.
        thread.kv.logits, thread.kv.logits_at = last.logits, last.logits_at
    for child in children:
        child.kv.branch = None
        thread.splice(child)
        thread.kv.pinned = thread.kv.pinned or child.kv.pinned
        request.retire(child, "joined")


def end_children(request: Request, thread: EngineThread) -> None:
    """Kill a joined thread's own children."""
    for child in thread.children:
        request.end(child, "killed")
