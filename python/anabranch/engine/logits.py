"""Next-token logits on their way from a forward to whoever needs them: sampling, statistics, tokens to be scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from anabranch.engine.chunk import PrefillChunk
from anabranch.engine.request import Request
from anabranch.engine.sampling import token_logprobs, token_stats
from anabranch.engine.thread_kv import EngineThread, ThreadKV
from anabranch.runner import scores as vocabulary
from anabranch.threads.running import RunningScore


class Head(NamedTuple):
    """A row that needs the model's head: token `nth` of a thread's context, row `row` of the step."""

    kv: ThreadKV
    nth: int
    row: int


def heads(entries: Sequence[tuple[ThreadKV, PrefillChunk, int]]) -> list[Head]:
    """Rows of a step whose logits are needed: the last of each thread that is whole now, and those in front of tokens
    to be scored. Branches already have this step's rows."""
    found: list[Head] = []
    end = 0
    for kv, chunk, n in entries:
        end += n
        if chunk.branch is not kv.branch or chunk.kept:
            continue  # computes again what a joined sibling wrote; makes room for what was put aside
        end -= chunk.drafted
        n -= chunk.drafted
        length, score = chunk.branch.length - chunk.drafted, kv.thread.score
        if score is not None:
            last = min(length, score.begin + len(score.op.token_ids) - 1)
            at = range(max(length - n, score.begin), last)
            found += [Head(kv, nth, end - length + nth) for nth in at]
        if length == kv.thread.length:
            found.append(Head(kv, length - 1, end - 1))
        end += chunk.drafted  # what guesses need: `Drafting.heads`
    return found


def record(logits: torch.Tensor, found: Sequence[Head]) -> None:
    """Note the log-probabilities of tokens that are being scored; `logits` [heads, vocabulary]."""
    scored: list[tuple[int, RunningScore, int]] = []
    for at, head in enumerate(found):
        score = head.kv.thread.score
        if score is not None and 0 <= (nth := head.nth + 1 - score.begin) < len(score.op.token_ids):
            scored.append((at, score, nth))
    if scored:
        rows = logits[torch.tensor([at for at, _, _ in scored], device=logits.device)]
        logprobs = token_logprobs(rows, [score.op.token_ids[nth] for _, score, nth in scored])
        for (_, score, nth), logprob in zip(scored, logprobs, strict=True):
            score.logprobs[nth] = logprob


def note_hidden(found: Sequence[torch.Tensor], heads: Sequence[Head], model: str) -> None:
    """Keep what the model's head was given for the last tokens of threads that want it; `found` [heads, width] each."""
    if len(found) != 1 or len(found[0]) != len(heads):
        raise ValueError(
            f"hidden: the language head of {model} was not called once, with one row a token whose logits are needed; "
            "its hidden states cannot be told apart"
        )
    for row, head in zip(found[0], heads, strict=True):
        if head.kv.wants_hidden and head.nth == head.kv.thread.length - 1:
            head.kv.hidden = head.kv.thread.length, tuple(row.float().tolist())


def invalid(
    logits: torch.Tensor, found: Sequence[Head], entries: Sequence[tuple[ThreadKV, PrefillChunk, int]], model: str
) -> dict[Request, ValueError]:
    """For each request that has a row with a NaN or +inf, or with nothing but −inf, an error that names the first.

    ``remove_invalid_values=True``, a processor of Transformers, deals with such scores: no error for those requests.
    """
    best = vocabulary.highest(logits)  # hands a NaN on, and reads the scores once
    bad = ~torch.isfinite(best)
    if not bool(bad.any()):
        return {}
    problems: dict[Request, ValueError] = {}
    for row in bad.nonzero()[:, 0].tolist():
        kv, chunk, _ = entries[0]
        position = chunk.branch.position - 1
        if found:
            kv = found[row].kv
            position = kv.thread.position - (kv.thread.length - found[row].nth)
        request, value = kv.thread.request, float(best[row])
        if request in problems or request.samplers.base.config.remove_invalid_values:
            continue
        what = "NaN" if value != value else "+inf" if value > 0 else "only −inf"
        problems[request] = ValueError(
            f"{model} returned {what} scores in step {request.spent.steps + 1} for prompt {request.index}, "
            f"thread {kv.thread.id}, position {position}; check the weights for NaN or infinite values, or load the "
            "model in a wider dtype (float16 overflows where bfloat16 does not)"
        )
    return problems


def rows(held: Sequence[tuple[torch.Tensor, int]]) -> torch.Tensor:
    """The logits of several threads, [threads, vocabulary]; no copy where they are a step's own, in order."""
    tensor = held[0][0]
    at = [row for _, row in held]
    if all(t is tensor for t, _ in held):
        return tensor if at == list(range(tensor.shape[0])) else tensor[torch.tensor(at, device=tensor.device)]
    return torch.stack([t[row] for t, row in held])


def stats(logits: torch.Tensor, threads: Sequence[EngineThread], tokens: Sequence[int]) -> dict[int, float]:
    """Record what decodes asked to know of their tokens; log-probabilities, by number among `threads`.

    logits: raw, [threads, vocabulary].
    """
    decodes = [t.running.op for t in threads]
    asked = [i for i, t in enumerate(threads) if decodes[i].topk is not None or t.request.logprobs]
    if not asked:
        return {}
    raw = logits if len(asked) == len(threads) else logits[asked]
    found = token_stats(raw, [tokens[i] for i in asked], [decodes[i].topk or 0 for i in asked])
    for i, stat in zip(asked, found, strict=True):
        if decodes[i].topk is not None:
            decodes[i].stats.append(stat)
    return {i: stat.logprob for i, stat in zip(asked, found, strict=True)}


def within_budget(ready: list[EngineThread]) -> list[EngineThread]:
    """Those of `ready` that their prompt's ``max_total_tokens`` has a token left for, in order of their paths; the
    others end before the next step."""
    if all(t.request.max_total_tokens is None for t in ready):
        return ready
    kept: list[EngineThread] = []
    taken: dict[Request, int] = {}
    for thread in sorted(ready, key=lambda t: t.path):
        request = thread.request
        n = taken.get(request, 0)
        if request.max_total_tokens is None or request.sampled + n < request.max_total_tokens:
            taken[request] = n + 1
            kept.append(thread)
    return kept
