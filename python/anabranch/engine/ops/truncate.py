"""Forgetting a thread's last tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anabranch.engine.cuts import cut_needs, truncate
from anabranch.engine.ops.base import EngineOp
from anabranch.engine.thread_kv import EngineThread
from anabranch.records.actions import Action
from anabranch.strategies.api.ops import TruncateOp

if TYPE_CHECKING:
    from anabranch.engine.request import Request


class Truncate(EngineOp[TruncateOp]):
    def needs(self, request: Request, thread: EngineThread, op: TruncateOp) -> list[EngineThread]:
        return cut_needs(thread, op.length)

    def carry_out(self, request: Request, thread: EngineThread, op: TruncateOp) -> None:
        thread.log.append(Action("truncate", length=op.length, clock=thread.clock))
        truncate(request.cache, thread, op.length, f"truncate: length={op.length}")
