"""Looking up a thread's likeliest next tokens."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from anabranch.engine.ops.base import EngineOp
from anabranch.engine.sampling import Sampler, gumbel
from anabranch.engine.thread_kv import EngineThread
from anabranch.strategies.api.ops import Candidates, CandidatesOp

if TYPE_CHECKING:
    from anabranch.engine.request import Request


class FindCandidates(EngineOp[CandidatesOp]):
    """Needs the next token's logits, which stay where they are: the thread may be asked again, or choose."""

    def needs(self, request: Request, thread: EngineThread, op: CandidatesOp) -> list[EngineThread]:
        return [] if thread.kv.has_logits else [thread]

    def ready(self, request: Request, thread: EngineThread, op: CandidatesOp) -> bool:
        request.need_logits(thread, "candidates")
        return thread.kv.has_logits

    def carry_out(self, request: Request, thread: EngineThread, op: CandidatesOp) -> Candidates:
        begin = time.perf_counter()
        found = self._look(request, thread, op)
        seconds = time.perf_counter() - begin
        request.spent.seconds["sampling"] += seconds
        request.spent.seconds["strategy"] -= seconds  # which the queues' time counts as
        return found

    @staticmethod
    def _look(request: Request, thread: EngineThread, op: CandidatesOp) -> Candidates:
        assert thread.kv.logits is not None
        rows, at = thread.kv.logits
        sampler = request.samplers.get(op.sampling)
        with torch.inference_mode():
            raw = rows[at : at + 1].float().log_softmax(-1)
            scores = raw.clone()
            if op.bias:
                where = torch.tensor(list(op.bias), device=raw.device)
                scores[0, where] += torch.tensor(list(op.bias.values()), device=raw.device)
            name = f"prompt {request.index}, thread {thread.id}, position {thread.position}"
            scores = sampler.processed(scores, lambda: list(thread.context), thread.counted_from, name)[0]
            keys = scores if sampler.greedy else scores + gumbel(scores, thread.stream)
            best = keys.topk(min(op.k, keys.shape[-1]))
            found = torch.stack([best.values, scores[best.indices], raw[0, best.indices]]).tolist()
        tokens = best.indices.tolist()
        some = sum(key > -float("inf") for key in found[0])  # what a processor has ruled out is no candidate
        left = request.left(thread)
        budget = None if request.max_total_tokens is None else max(0, request.max_total_tokens - request.sampled)
        ranked, logprobs, likely = (tuple(values[:some]) for values in found)
        ends = tuple(left <= 1 or _ends(request, thread, sampler, token) for token in tokens[:some])
        return Candidates(tuple(tokens[:some]), logprobs, likely, ranked, ends, left, budget)


def _ends(request: Request, thread: EngineThread, sampler: Sampler, token: int) -> bool:
    """Whether the thread would be over with `token`: by EOS, or by what the generation config or the call stops at."""
    if token in sampler.eos_ids or sampler.stops(lambda: [*thread.context, token]):
        return True
    return bool(sampler.stop_strings) and request.holds_stop(thread, sampler.stop_strings, token)
