"""What the join modes share: the interface, becoming the only child, splicing KV."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from anabranch.threads.state import AnyThread

if TYPE_CHECKING:
    from anabranch.strategies.api.ops import JoinOp
    from anabranch.threads.books import Books


class HostJoin(Protocol):
    """How a host carries out one join mode."""

    def needs(self, host: Books[Any], thread: AnyThread, op: JoinOp, children: Sequence[AnyThread]) -> list[AnyThread]:
        """Threads that the host must hold wholly first (an engine: in its cache)."""

    def carry_out(self, host: Books[Any], thread: AnyThread, op: JoinOp, children: Sequence[AnyThread]) -> None:
        """Do it; all that it `needs` is held. There may be no children: all were killed."""


def adoptable(host: Books[Any], thread: AnyThread, op: JoinOp, children: Sequence[AnyThread]) -> bool:
    """Whether the thread may simply become its only remaining child: nothing to splice, so nothing to compute first.

    Only for a thread that no parent will join (a branch knows its own tokens by where it was forked).
    """
    if len(children) != 1 or op.headers != [None]:
        return False
    others = [c for c in thread.children if c.alive and c.role == "fork" and c is not children[0]]
    return (
        (op.mode == "concat" or same_segment(thread, children))
        and all(t.live is None for t in (thread, *children))
        and thread.role != "fork"
        and not others
        and thread.goes_on_as(children[0])
        and not any(c.alive for c in children[0].children)
        and host.may_take_over(thread, children[0])
    )


def same_segment(thread: AnyThread, children: Sequence[AnyThread]) -> bool:
    """Whether the first child's KV is what computing its tokens in the thread would give, as far as vectors go that
    the model adds to K and V."""
    return bool(children[0].kv_segment == thread.kv_segment)


def adopt(host: Books[Any], thread: AnyThread, child: AnyThread) -> None:
    """The thread becomes its child: takes over its branch and its logits, so not a row is computed for the join."""
    host.take_over(thread, child)
    thread.adopt(child)
    host.retire(child, "joined")


def splice(host: Books[Any], thread: AnyThread, children: Sequence[AnyThread]) -> None:
    """The children's KV becomes the thread's, side by side."""
    for child in children:
        end_children(host, child)
    host.hold_joined(thread, children)
    for child in children:
        thread.splice(child)
        host.retire(child, "joined")


class JoinOfTokens:
    """The frame of the modes that bring back what children wrote: become the only child, or `append` them."""

    def carry_out(self, host: Books[Any], thread: AnyThread, op: JoinOp, children: Sequence[AnyThread]) -> None:
        if not children:
            return
        length = thread.length
        if adoptable(host, thread, op, children):
            adopt(host, thread, children[0])
        else:
            self.append(host, thread, op, children)
        host.narrator.tell_held(thread, length)

    def append(self, host: Books[Any], thread: AnyThread, op: JoinOp, children: Sequence[AnyThread]) -> None:
        """Take the children's tokens behind the thread's own."""
        raise NotImplementedError


def end_children(host: Books[Any], thread: AnyThread) -> None:
    """Kill a joined thread's own children."""
    for child in thread.children:
        host.end(child, "killed")
