"""Appending given tokens and finding out how likely the model found them."""

from __future__ import annotations

from math import nan
from typing import TYPE_CHECKING

from anabranch.engine.thread_kv import EngineThread
from anabranch.records.actions import Action
from anabranch.strategies.api.ops import ScoreOp
from anabranch.threads.ops.base import HostOp
from anabranch.threads.running import RunningScore

if TYPE_CHECKING:
    from anabranch.engine.request import Request


class Score(HostOp[ScoreOp]):
    """Over once all log-probabilities are there, a forward or two later."""

    def needs(self, host: Request, thread: EngineThread, op: ScoreOp) -> list[EngineThread]:
        return host.along(thread)

    def advance(self, host: Request, thread: EngineThread, op: ScoreOp) -> bool:
        if thread.score is None and host.settle(thread, op):
            host.prepare(thread, "score")
            if not (thread.kv.in_cache and thread.kv.has_logits):
                return False
            self._begin(host, thread, op)
        wanted = thread.score.logprobs if thread.score is not None else []
        logprobs = [logprob for logprob in wanted if logprob is not None]
        if len(logprobs) < len(wanted):
            return False
        thread.queue.popleft()
        thread.score = None
        if logprobs:
            kept = thread.segments[-1].logprobs
            assert kept is not None
            kept[-len(logprobs) :] = logprobs
        op.resolve(tuple(logprobs), thread.clock)
        return True

    @staticmethod
    def _begin(host: Request, thread: EngineThread, op: ScoreOp) -> None:
        """Append the tokens; the first one's log-probability is known already."""
        thread.reach(op.issued)
        assert thread.kv.logits is not None
        rows, at = thread.kv.logits
        thread.score = RunningScore(op, thread.length, [None] * len(op.token_ids))
        thread.score.logprobs[0] = float(rows[at].float().log_softmax(-1)[op.token_ids[0]])
        thread.log.append(
            Action("sample" if op.kind == "sampled" else "insert", list(op.token_ids), clock=thread.clock)
        )
        position = thread.position
        thread.append(op.token_ids, op.kind, logprobs=[nan] * len(op.token_ids))
        if op.kind == "sampled":
            host.count_sampled(thread, len(op.token_ids))
        else:
            host.inserted += len(op.token_ids)
        host.narrator.tell(thread, op.token_ids, position, op.kind != "sampled")
