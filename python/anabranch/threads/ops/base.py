"""What every op has in a host: when it can be carried out, and how."""

from __future__ import annotations

from itertools import takewhile
from typing import Any, Generic, TypeVar

from anabranch.strategies.api.ops import ForkOp, Op

AnyOp = TypeVar("AnyOp", bound=Op)


def next_ops(thread: Any) -> list[Op]:
    """The queued ops of a thread that may be carried out now: the first, and any fork right behind other forks: all
    begin with the same context, and one that waits for siblings holds up no other."""
    queue = thread.queue
    if not queue:
        return []
    first = queue[0]
    if not isinstance(first, ForkOp):
        return [first]
    return list(takewhile(lambda op: isinstance(op, ForkOp), queue))


class HostOp(Generic[AnyOp]):
    """How a host carries out one kind of op; one object a kind, without a state of its own.

    ``host``: the `Books` of the prompt; ``thread``: the host's own record of the thread whose queue `op` begins.
    """

    decodes = False  # whether it samples: then it waits for its turn among the threads that decode

    def needs(self, host: Any, thread: Any, op: AnyOp) -> list[Any]:
        """Records of the threads that the host must hold wholly (`Books.holds`) before `op` can be carried out."""
        return []

    def waits_for_children(self, host: Any, op: AnyOp) -> bool:
        """Whether `op` takes threads that still have something to do."""
        return False

    def ready(self, host: Any, thread: Any, op: AnyOp) -> bool:
        """Whether it can be carried out now."""
        return not self.waits_for_children(host, op) and all(map(host.holds, self.needs(host, thread, op)))

    def advance(self, host: Any, thread: Any, op: AnyOp) -> bool:
        """Carry out `op`, the first in its thread's queue, if that is possible now; whether the queue moved on."""
        if not self.ready(host, thread, op):
            return False
        thread.reach(op.issued)
        thread.queue.remove(op)  # the first, as a rule: see `next_ops`
        value = self.carry_out(host, thread, op)
        op.resolve(value, thread.clock)
        return True

    def carry_out(self, host: Any, thread: Any, op: AnyOp) -> Any:
        """Do it at once; what the strategy gets for its ``yield``."""
        raise NotImplementedError

    def drop(self, host: Any, thread: Any, op: AnyOp, fate: str) -> None:
        """The thread leaves with `op` still in its queue."""
