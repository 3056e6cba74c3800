"""Sampling tokens until something ends it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from anabranch.records.actions import Action
from anabranch.strategies.api.ops import Decode, Ended
from anabranch.threads.ops.base import HostOp
from anabranch.threads.state import AnyThread

if TYPE_CHECKING:
    from anabranch.threads.books import Books


class Decoding(HostOp[Decode]):
    """Settles a decode that has come to the head of its queue; the host then samples its tokens (`record_token`)."""

    decodes = True

    def needs(self, host: Books[Any], thread: AnyThread, op: Decode) -> list[AnyThread]:
        return host.along(thread)

    def advance(self, host: Books[Any], thread: AnyThread, op: Decode) -> bool:
        decode = thread.decode
        if decode is None or decode.op is not op:
            decode = thread.decode = host.running(thread, op)
            thread.reach(op.issued)
        if decode.limit <= 0 or host.out_of_budget:
            thread.queue.popleft()
            end(host, thread, op, "length" if decode.limit <= 0 else "budget")
            return True
        host.prepare(thread, "decode")
        return False

    def drop(self, host: Books[Any], thread: AnyThread, op: Decode, fate: str) -> None:
        end(host, thread, op, "killed")


def record_token(host: Books[Any], thread: AnyThread, token: int, logprob: float | None = None) -> None:
    """A token was sampled for a thread's decode; end the decode where that ends it."""
    decode = thread.running
    op, sampler, position = decode.op, decode.sampler, thread.position
    thread.append([token], "sampled", logprobs=None if logprob is None else [logprob])
    if not op.token_ids:
        thread.log.append(Action("sample", op.token_ids, clock=thread.clock - 1))  # the list itself, which grows
    op.token_ids.append(token)
    host.count_sampled(thread)
    host.narrator.tell(thread, [token], position, False)
    reason: str | None = None
    stop: str | int | None = None
    if token in op.stop_ids:
        reason, stop = "stop", token
    elif token in sampler.eos_ids:
        reason = "eos"
    elif (stop := decode.stop_string()) is not None or sampler.stops(lambda: [*thread.prefix, *thread.own]):
        reason = "stop"
    elif host.until(thread, op):
        reason = "until"
    elif len(op.token_ids) >= decode.limit:
        reason = "length"
    elif host.out_of_budget:
        reason = "budget"
    if reason is not None and not op.done:  # until() may have killed this thread
        thread.queue.popleft()
        end(host, thread, op, reason, stop)
        if not thread.queue:
            host.emptied(thread)


def end(host: Books[Any], thread: AnyThread, op: Decode, reason: str, stop: str | int | None = None) -> None:
    """A decode is over."""
    thread.ended = Ended(reason, tuple(op.token_ids), host.decoded_text(op), stop, tuple(op.stats))
    op.resolve(thread.ended, thread.clock)
