"""Looking up a thread's likeliest next tokens."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from anabranch.engine.sampling import Sampler, gumbel
from anabranch.engine.thread_kv import EngineThread
from anabranch.strategies.api.ops import Candidates, CandidatesOp
from anabranch.threads.ops.base import HostOp

if TYPE_CHECKING:
    from anabranch.engine.request import Request


class FindCandidates(HostOp[CandidatesOp]):
    """Needs the next token's logits, which stay where they are: the thread may be asked again, or choose."""

    def needs(self, host: Request, thread: EngineThread, op: CandidatesOp) -> list[EngineThread]:
        return [] if thread.kv.has_logits else [thread]

    def ready(self, host: Request, thread: EngineThread, op: CandidatesOp) -> bool:
        host.prepare(thread, "candidates")
        return thread.kv.has_logits

    def carry_out(self, host: Request, thread: EngineThread, op: CandidatesOp) -> Candidates:
        begin = time.perf_counter()
        found = self._look(host, thread, op)
        seconds = time.perf_counter() - begin
        host.spent.seconds["sampling"] += seconds
        host.spent.seconds["strategy"] -= seconds  # which the queues' time counts as
        return found

    @staticmethod
    def _look(host: Request, thread: EngineThread, op: CandidatesOp) -> Candidates:
        assert thread.kv.logits is not None
        rows, at = thread.kv.logits
        sampler = host.samplers.get(op.sampling)
        with torch.inference_mode():
            raw = rows[at : at + 1].float().log_softmax(-1)
            scores = raw.clone()
            if op.bias:
                where = torch.tensor(list(op.bias), device=raw.device)
                scores[0, where] += torch.tensor(list(op.bias.values()), device=raw.device)
            name = f"prompt {host.index}, thread {thread.id}, position {thread.position}"
            scores = sampler.processed(scores, lambda: list(thread.context), thread.counted_from, name)[0]
            keys = scores if sampler.greedy else scores + gumbel(scores, thread.stream)
            best = keys.topk(min(op.k, keys.shape[-1]))
            found = torch.stack([best.values, scores[best.indices], raw[0, best.indices]]).tolist()
        tokens = best.indices.tolist()
        some = sum(key > -float("inf") for key in found[0])  # what a processor has ruled out is no candidate
        left = host.left(thread)
        budget = None if host.max_total_tokens is None else max(0, host.max_total_tokens - host.sampled)
        ranked, logprobs, likely = (tuple(values[:some]) for values in found)
        ends = tuple(left <= 1 or _ends(host, thread, sampler, token) for token in tokens[:some])
        return Candidates(tuple(tokens[:some]), logprobs, likely, ranked, ends, left, budget)


def _ends(host: Request, thread: EngineThread, sampler: Sampler, token: int) -> bool:
    """Whether the thread would be over with `token`: by EOS, or by what the generation config or the call stops at."""
    if token in sampler.eos_ids or sampler.stops(lambda: [*thread.context, token]):
        return True
    return bool(sampler.stop_strings) and host.holds_stop(thread, sampler.stop_strings, token)
