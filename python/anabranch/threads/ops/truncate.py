"""Forgetting a thread's last tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from anabranch.records.actions import Action
from anabranch.strategies.api.ops import TruncateOp
from anabranch.threads.ops.base import HostOp
from anabranch.threads.state import AnyThread

if TYPE_CHECKING:
    from anabranch.threads.books import Books


class Truncate(HostOp[TruncateOp]):
    """Only a thread's own tokens can go."""

    def needs(self, host: Books[Any], thread: AnyThread, op: TruncateOp) -> list[AnyThread]:
        return host.cut_needs(thread, op.length)

    def carry_out(self, host: Books[Any], thread: AnyThread, op: TruncateOp) -> None:
        thread.log.append(Action("truncate", length=op.length, clock=thread.clock, **thread.live_record()))
        host.cut(thread, op.length, f"truncate: length={op.length}")
