"""Scoring given tokens on a server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anabranch.records.actions import Action
from anabranch.strategies.api.ops import ScoreOp
from anabranch.threads.ops import HostOp

if TYPE_CHECKING:
    from anabranch.remote.request import RemoteRequest, RemoteThread


class RemoteScore(HostOp[ScoreOp]):
    """One request; the tokens join the thread when it is answered."""

    def advance(self, host: RemoteRequest, thread: RemoteThread, op: ScoreOp) -> bool:
        if thread.work is not None and thread.work.op is op:
            return False
        given = host.settle(thread, op)
        if given:
            host.ask_score(thread, op, given)
            return False
        thread.queue.popleft()
        op.resolve((), thread.clock)
        return True

    def settle(self, host: RemoteRequest, thread: RemoteThread, op: ScoreOp, logprobs: list[float]) -> None:
        """The server has answered."""
        if not thread.alive or op.done:
            return
        thread.work = None
        thread.reach(op.issued)
        thread.log.append(
            Action("sample" if op.kind == "sampled" else "insert", list(op.token_ids), clock=thread.clock)
        )
        position = thread.position
        thread.append(op.token_ids, op.kind, logprobs=list(logprobs))
        host.longest_context = max(host.longest_context, thread.length)  # the server has read all of it
        if op.kind == "sampled":
            host.count_sampled(thread, len(op.token_ids))
        else:
            host.inserted += len(op.token_ids)
        host.narrator.tell(thread, op.token_ids, position, op.kind != "sampled")
        thread.queue.popleft()
        op.resolve(tuple(logprobs), thread.clock)
        if not thread.queue:
            host.emptied(thread)
