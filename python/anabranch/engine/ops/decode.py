"""Sampling tokens until something ends it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anabranch.engine.ops.base import EngineOp
from anabranch.engine.thread_kv import EngineThread
from anabranch.records.actions import Action
from anabranch.strategies.api.ops import Decode, Ended

if TYPE_CHECKING:
    from anabranch.engine.request import Request


class Decoding(EngineOp[Decode]):
    """Settles a decode that has come to the head of its queue; the loop then samples its tokens (`record_token`)."""

    decodes = True

    def needs(self, request: Request, thread: EngineThread, op: Decode) -> list[EngineThread]:
        return request.with_live(thread)

    def advance(self, request: Request, thread: EngineThread, op: Decode) -> bool:
        decode = thread.decode
        if decode is None or decode.op is not op:
            decode = thread.decode = request.running(thread, op)
            thread.reach(op.issued)
        if decode.limit <= 0 or request.out_of_budget:
            thread.queue.popleft()
            end(request, thread, op, "length" if decode.limit <= 0 else "budget")
            return True
        request.need_logits(thread, "decode")
        return False

    def drop(self, request: Request, thread: EngineThread, op: Decode, fate: str) -> None:
        end(request, thread, op, "killed")


def record_token(request: Request, thread: EngineThread, token: int, logprob: float | None = None) -> None:
    """A token was sampled for a thread's decode; end the decode where that ends it."""
    decode = thread.running
    op, sampler, position = decode.op, decode.sampler, thread.position
    thread.append([token], "sampled", logprobs=None if logprob is None else [logprob])
    if not op.token_ids:
        thread.log.append(Action("sample", op.token_ids))  # the list itself, which grows
    op.token_ids.append(token)
    request.count_sampled(thread)
    request.narrator.tell(thread, [token], position, False)
    reason: str | None = None
    stop: str | int | None = None
    if token in op.stop_ids:
        reason, stop = "stop", token
    elif token in sampler.eos_ids:
        reason = "eos"
    elif (stop := decode.stop_string()) is not None or sampler.stops(lambda: [*thread.prefix, *thread.own]):
        reason = "stop"
    elif request.until(thread, op):
        reason = "until"
    elif len(op.token_ids) >= decode.limit:
        reason = "length"
    elif request.out_of_budget:
        reason = "budget"
    if reason is not None and not op.done:  # until() may have killed this thread
        thread.queue.popleft()
        end(request, thread, op, reason, stop)
        if not thread.queue:
            request.emptied(thread)


def end(request: Request, thread: EngineThread, op: Decode, reason: str, stop: str | int | None = None) -> None:
    """A decode is over."""
    thread.ended = Ended(reason, tuple(op.token_ids), request.decoded_text(op), stop, tuple(op.stats))
    op.resolve(thread.ended, thread.clock)
