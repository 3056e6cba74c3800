"""Next-token scores on their way from a forward to whoever needs them: sampling, statistics, tokens to be scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from anabranch.engine.sampling import token_logprobs, token_stats
from anabranch.engine.thread_state import Feed, Live
from anabranch.strategies.api.ops import Score
from anabranch.strategies.api.thread import Thread


class Head(NamedTuple):
    """A row that needs the model's head: token `nth` of a thread's context, row `row` of the step."""

    live: Live
    nth: int
    row: int


def heads(entries: Sequence[tuple[Live, Feed, int]]) -> list[Head]:
    """Rows of a step whose scores are needed: the last of each thread that is whole now, and those in front of tokens
    to be scored. Branches already have this step's rows."""
    found: list[Head] = []
    end = 0
    for live, feed, n in entries:
        end += n
        if feed.branch is not live.branch:
            continue  # computes again what a joined sibling wrote
        length, op = feed.branch.length, _scoring(live)
        if op is not None:
            last = min(length, op.begin + len(op.token_ids) - 1)  # type: ignore[operator]
            at = range(max(length - n, op.begin), last)  # type: ignore[type-var]
            found += [Head(live, nth, end - length + nth) for nth in at]
        if length == live.thread.length:
            found.append(Head(live, length - 1, end - 1))
    return found


def _scoring(live: Live) -> Score | None:
    """The tokens of this thread that are being scored."""
    op = live.thread._ops[0] if live.thread._ops else None
    return op if isinstance(op, Score) and op.begin is not None else None


def record(logits: torch.Tensor, found: Sequence[Head]) -> None:
    """Note the log-probabilities of tokens that are being scored; `logits` [heads, vocabulary]."""
    scored: list[tuple[int, Score, int]] = []
    for at, head in enumerate(found):
        op = _scoring(head.live)
        if op is not None and 0 <= (nth := head.nth + 1 - op.begin) < len(op.token_ids):  # type: ignore[operator]
            scored.append((at, op, nth))
    if scored:
        rows = logits[torch.tensor([at for at, _, _ in scored], device=logits.device)].float()
        logprobs = token_logprobs(rows, [op.token_ids[nth] for _, op, nth in scored])
        for (_, op, nth), logprob in zip(scored, logprobs, strict=True):
            op.logprobs[nth] = logprob


def refuse_invalid(
    logits: torch.Tensor, found: Sequence[Head], entries: Sequence[tuple[Live, Feed, int]], model: str, step: int
) -> None:
    """ValueError that names the first row with a NaN or +inf, or with nothing but −inf."""
    best = logits.amax(-1)  # hands a NaN on, and reads the scores once
    bad = ~torch.isfinite(best)
    if not bool(bad.any()):
        return
    first = float(best[int(bad.nonzero()[0, 0])])
    what = f"{model} returned {'NaN' if first != first else '+inf' if first > 0 else 'only −inf'} scores in step {step}"
    live, feed, _ = entries[0]
    position = feed.branch.position - 1
    if found:
        head = found[int(bad.nonzero()[0, 0])]
        live, position = head.live, head.live.thread._position - (head.live.thread.length - head.nth)
    raise ValueError(
        f"{what} for prompt {live.age()[0]}, thread {live.thread.id}, position {position}; check the weights for NaN "
        "or infinite values, or load the model in a wider dtype (float16 overflows where bfloat16 does not)"
    )


def rows(scores: Sequence[Any]) -> torch.Tensor:
    """The score rows of several threads, [threads, vocabulary]; no copy where they are a step's own, in order."""
    tensor = scores[0][0]
    at = [row for _, row in scores]
    if all(t is tensor for t, _ in scores):
        return tensor if at == list(range(tensor.shape[0])) else tensor[torch.tensor(at, device=tensor.device)]
    return torch.stack([t[row] for t, row in scores])


def stats(logits: torch.Tensor, threads: Sequence[Thread], tokens: Sequence[int]) -> dict[int, float]:
    """Record what decodes asked to know of their tokens; log-probabilities, by number among `threads`.

    logits: raw, [threads, vocabulary], float32.
    """
    asked = [i for i, t in enumerate(threads) if t._ops[0].topk is not None or t._host.logprobs]
    if not asked:
        return {}
    raw = logits if len(asked) == len(threads) else logits[asked]
    found = token_stats(raw, [tokens[i] for i in asked], [threads[i]._ops[0].topk or 0 for i in asked])
    for i, stat in zip(asked, found, strict=True):
        if threads[i]._ops[0].topk is not None:
            threads[i]._ops[0].stats.append(stat)
    return {i: stat.logprob for i, stat in zip(asked, found, strict=True)}


def within_budget(ready: list[Thread]) -> list[Thread]:
    """Those of `ready` that their prompt's ``max_total_tokens`` has a token left for, in order of their paths; the
    others end before the next step."""
    if all(t._host.max_total_tokens is None for t in ready):
        return ready
    kept: list[Thread] = []
    taken: dict[Any, int] = {}
    for thread in sorted(ready, key=lambda t: t.path):
        request = thread._host
        n = taken.get(request, 0)
        if request.max_total_tokens is None or request.sampled + n < request.max_total_tokens:
            taken[request] = n + 1
            kept.append(thread)
    return kept
