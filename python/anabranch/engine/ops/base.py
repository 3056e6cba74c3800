"""What every op has in the engine: when it can be carried out, and how."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

from anabranch.engine.thread_kv import EngineThread
from anabranch.strategies.api.ops import Op

if TYPE_CHECKING:
    from anabranch.engine.request import Request

AnyOp = TypeVar("AnyOp", bound=Op)


class EngineOp(Generic[AnyOp]):
    """How the engine carries out one kind of op; one object a kind, without a state of its own."""

    decodes = False  # whether it samples: then it waits for its turn among the threads that decode

    def needs(self, request: Request, thread: EngineThread, op: AnyOp) -> list[EngineThread]:
        """Threads that must be wholly in the cache before `op` can be carried out (or go on)."""
        return []

    def waits_for_children(self, request: Request, op: AnyOp) -> bool:
        """Whether `op` takes back children that still have something to do."""
        return False

    def ready(self, request: Request, thread: EngineThread, op: AnyOp) -> bool:
        """Whether it can be carried out now."""
        return not self.waits_for_children(request, op) and all(t.kv.in_cache for t in self.needs(request, thread, op))

    def advance(self, request: Request, thread: EngineThread, op: AnyOp) -> bool:
        """Carry out `op`, the first in its thread's queue, if that is possible now; whether the queue moved on."""
        if not self.ready(request, thread, op):
            return False
        thread.reach(op.issued)
        thread.queue.remove(op)  # the first, as a rule: see `next_ops`
        value = self.carry_out(request, thread, op)
        op.resolve(value, thread.clock)
        return True

    def carry_out(self, request: Request, thread: EngineThread, op: AnyOp) -> Any:
        """Do it at once; what the strategy gets for its ``yield``."""
        raise NotImplementedError

    def drop(self, request: Request, thread: EngineThread, op: AnyOp, fate: str) -> None:
        """The thread leaves with `op` still in its queue."""
