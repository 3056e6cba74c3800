"""Appending a token that the strategy chose among what the model offered."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anabranch.engine.sampling import token_logprobs
from anabranch.engine.thread_kv import EngineThread
from anabranch.records.actions import Action
from anabranch.strategies.api.ops import ChooseOp, Ended
from anabranch.threads.ops.base import HostOp

if TYPE_CHECKING:
    from anabranch.engine.request import Request


class Choose(HostOp[ChooseOp]):
    """A token as the model wrote it: in the metrics, in the trace, with its log-probability where that is recorded."""

    def needs(self, host: Request, thread: EngineThread, op: ChooseOp) -> list[EngineThread]:
        return [thread] if host.logprobs and not thread.kv.has_logits else []

    def ready(self, host: Request, thread: EngineThread, op: ChooseOp) -> bool:
        if not host.logprobs:
            return True
        host.prepare(thread, "choose")
        return thread.kv.has_logits

    def carry_out(self, host: Request, thread: EngineThread, op: ChooseOp) -> bool:
        left = host.left(thread)
        if left <= 0 or host.out_of_budget:
            thread.ended = Ended("length" if left <= 0 else "budget")
            return False
        logprobs = None
        if host.logprobs:
            assert thread.kv.logits is not None
            rows, at = thread.kv.logits
            logprobs = token_logprobs(rows[at : at + 1].float(), [op.token])
        position = thread.position
        thread.append([op.token], "sampled", logprobs=logprobs)
        thread.kv.logits = None
        if thread.chosen is None or not thread.log or thread.log[-1].token_ids is not thread.chosen:
            thread.chosen = []
            thread.log.append(Action("sample", thread.chosen, clock=thread.clock - 1))
        thread.chosen.append(op.token)
        host.count_chosen(thread)
        host.narrator.tell(thread, [op.token], position, False)
        reason = "eos" if op.token in host.eos_ids else "length" if left == 1 else None
        thread.ended = None if reason is None else Ended(reason)
        return True
