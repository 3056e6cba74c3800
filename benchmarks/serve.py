"""Serving: requests that arrive at random, and how long each waits for its first token and between two.

Arrivals are a Poisson process, the same for everybody. All prompts begin with the same instructions and end in a
question of their own; they are answered plainly (greedy) or by four branches. Ours is one loop over `Engine.add` and
`Engine.step`, with and without the prefix cache; the peer is Transformers' `generate`, one request after another in the
order of arrival, as a server without continuous batching does it. Everybody writes exactly as many tokens.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from transformers import LogitsProcessor, LogitsProcessorList

import anabranch as ab
from anabranch.engine import Token

from .e2e import PASSAGE, SAMPLING

TITLES = {
    "anabranch": "anabranch",
    "no_prefix_cache": "anabranch, prefix_cache=False",
    "generate": "Transformers generate, one after another",
}
BRANCHES = 4


@dataclass
class Request:
    """One arrival: seconds after the start, the prompt's token ids, and when each token was there, by thread."""

    at: float
    ids: list[int]
    times: dict[str, list[float]] = field(default_factory=dict)

    @property
    def first(self) -> float:
        return min(times[0] for times in self.times.values()) - self.at

    @property
    def gaps(self) -> list[float]:
        return [b - a for times in self.times.values() for a, b in pairwise(times)]


def arrivals(prompts: list[list[int]], rate: float, seed: int = 0) -> list[Request]:
    """A Poisson process of `rate` requests a second."""
    rng, at, found = random.Random(seed), 0.0, []
    for ids in prompts:
        found.append(Request(at, ids))
        at += rng.expovariate(rate)
    return found


def serve(engine: ab.Engine, requests: list[Request], branches: int, new_tokens: int) -> float:
    """Ours: notes each token's time; seconds until all are answered."""
    strategy = None if branches == 1 else ab.SelfConsistency(n=branches, temperature=1.0, top_p=1.0, top_k=0)
    waiting, there = list(requests), []
    start = time.perf_counter()
    while waiting or there:
        while waiting and waiting[0].at <= time.perf_counter() - start:
            request = waiting.pop(0)
            options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
            if strategy is None:
                options["do_sample"] = False
            there.append([request, engine.add(request.ids, strategy, **options), 0])
        if not engine.step() and not there and waiting:
            time.sleep(max(0.0, waiting[0].at - (time.perf_counter() - start)))
        now = time.perf_counter() - start
        for entry in there:
            request, handle, seen = entry
            entry[2] = len(handle.so_far)
            for event in handle.so_far[seen : entry[2]]:
                if isinstance(event, Token) and not event.inserted and event.token_ids:
                    request.times.setdefault(event.thread, []).append(now)
        for _, handle, _ in there:
            if handle.done:
                handle.result()  # raises what went wrong
        there = [entry for entry in there if not entry[1].done]
    return time.perf_counter() - start


class _Times(LogitsProcessor):
    """Notes when the scores of each token arrive."""

    def __init__(self, times: list[float], start: float) -> None:
        self.times, self.start = times, start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(time.perf_counter() - self.start)
        return scores


def one_after_another(model, requests: list[Request], branches: int, new_tokens: int) -> float:
    """The peer: notes each token's time; seconds until all are answered."""
    start = time.perf_counter()
    for request in requests:
        time.sleep(max(0.0, request.at - (time.perf_counter() - start)))
        times: list[float] = []
        ids = torch.tensor([request.ids])
        how = {"do_sample": False} if branches == 1 else {**SAMPLING, "num_return_sequences": branches}
        model.generate(
            ids, attention_mask=torch.ones_like(ids), logits_processor=LogitsProcessorList([_Times(times, start)]),
            max_new_tokens=new_tokens, min_new_tokens=new_tokens, **how,
        )  # fmt: skip
        request.times = {str(i): times for i in range(branches)}
    return time.perf_counter() - start


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]


def entry(name: str, answers: str, rate: float, requests: list[Request], seconds: float, **more) -> dict[str, object]:
    first, gaps = [r.first for r in requests], [gap for r in requests for gap in r.gaps]
    tokens = sum(len(times) for r in requests for times in r.times.values())
    return {
        "contender": name, "title": TITLES[name], "answers": answers, "rate": rate, "requests": len(requests),
        "prompt_tokens": round(statistics.mean(len(r.ids) for r in requests)), "tokens": tokens,
        "tokens_per_s": tokens / seconds, "seconds": seconds,
        "first_p50": percentile(first, 0.5), "first_p99": percentile(first, 0.99),
        "gap_p50": percentile(gaps, 0.5), "gap_p99": percentile(gaps, 0.99), **more,
    }  # fmt: skip


def prompts(tokenizer, count: int, shared: int) -> list[list[int]]:
    """Instructions of `shared` tokens, the same in all, and a question each."""
    passage = tokenizer(PASSAGE)["input_ids"]
    head = (passage * (shared // len(passage) + 1))[:shared]
    questions = [f" Question {i}: how much is {17 + i} times {5 + i % 7}, and why?" for i in range(count)]
    return [head + tokenizer(question)["input_ids"] for question in questions]


def run(
    quick: bool, dtype: str, rates: list[float], count: int, report: Callable[[str], None] = lambda _: None
) -> Iterator[dict[str, object]]:
    """Everybody under every load; one dict a line of the table."""
    kind, new_tokens = getattr(torch, dtype), 8 if quick else 32
    report(f"loading the model in {dtype}")
    model, tokenizer = ab.models.load("smollm2", dtype=kind)
    plain, _ = ab.models.load("smollm2", dtype=kind, attn_implementation="sdpa")
    texts = prompts(tokenizer, count, 64 if quick else 256)
    for rate in rates:
        for answers, branches in (("plain", 1), (f"{BRANCHES} branches", BRANCHES)):
            for name in TITLES:
                report(f"{TITLES[name]}: {answers}, {rate:g} requests a second")
                requests = arrivals(texts, rate)
                if name == "generate":
                    seconds, saved = one_after_another(plain, requests, branches, new_tokens), 0.0
                else:
                    engine = ab.Engine(model, tokenizer, num_pages=4096, prefix_cache=name == "anabranch")
                    engine.generate(texts[0][:8], max_new_tokens=2)  # kernels are loaded
                    seconds = serve(engine, requests, branches, new_tokens)
                    saved = engine.stats().hit_rate
                yield entry(name, answers, rate, requests, seconds, dtype=dtype, hit_rate=saved)
