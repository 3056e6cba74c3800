"""Serving: requests that arrive at random, and how long each waits for its first token and between two.

Arrivals are a Poisson process, the same for everybody. Prompts are problems of the adaptive model's training set, as
chats: answered plainly (greedy), by four branches, or plainly where eight requests each share a long beginning. Ours is
one loop over `Engine.add` and `Engine.step`, with and without the prefix cache; `serve_peers` has the others. Nobody
goes through HTTP, everybody writes exactly as many tokens, and all have room for as many.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import anabranch as ab
from anabranch.engine import Token

from .e2e import PASSAGE
from .engines import compiled_engine
from .programs import Ended
from .serve_peers import PAGES, ContinuousBatching, OneAfterAnother, VLLMArrivals

TITLES = {
    "anabranch": "anabranch",
    "no_prefix_cache": "anabranch, prefix_cache=False",
    "vllm": "vLLM, CPU build",
    "continuous": "Transformers continuous batching",
    "generate": "Transformers generate, one after another",
}
PROBLEMS = Path(__file__).resolve().parents[1] / "training" / "adaptive" / "problems.jsonl"


@dataclass(frozen=True)
class Case:
    """How requests are answered: branches of each; `of` of them share a beginning of some `shared` tokens."""

    branches: int = 1
    shared: int = 0
    of: int = 1


CASES = {"plain": Case(), "4 branches": Case(branches=4), "8 share a beginning": Case(shared=1024, of=8)}


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


Serve = Callable[[list[Request], int, int], tuple[float, float]]
"""(requests, branches, new tokens) → (seconds until all are answered, share of the prompts' tokens that was found);
notes each token's time in the requests."""


def arrivals(prompts: list[list[int]], rate: float, seed: int = 0) -> list[Request]:
    """A Poisson process of `rate` requests a second."""
    rng, at, found = random.Random(seed), 0.0, []
    for ids in prompts:
        found.append(Request(at, ids))
        at += rng.expovariate(rate)
    return found


class Ours:
    """An engine of ours as a server runs it (`anabranch serve --compile now`): its memory claimed, and compiled where
    a compiler is there, before the first arrival. Nothing of an earlier load is in its cache."""

    def __init__(self, model: Any, **options: Any) -> None:
        self.engine = compiled_engine(model, **options)
        self.engine.cache.populate()
        self.engine.generate(list(range(5, 13)), do_sample=False, min_new_tokens=8, max_new_tokens=8)

    def __call__(self, requests: list[Request], branches: int, new_tokens: int) -> tuple[float, float]:
        self.engine.clear_prefix_cache()
        before = self.engine.stats()
        seconds = serve(self.engine, requests, branches, new_tokens)
        after = self.engine.stats()
        asked = after.prefix_tokens - before.prefix_tokens
        return seconds, (after.cached_tokens - before.cached_tokens) / max(1, asked)


def serve(engine: ab.Engine, requests: list[Request], branches: int, new_tokens: int) -> float:
    """Notes each token's time; seconds until all are answered."""
    strategy = None if branches == 1 else ab.SelfConsistency(n=branches, temperature=1.0, top_p=1.0, top_k=0)
    waiting: list[Request] = list(requests)
    there: list[list[Any]] = []
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


def prompts(tokenizer: Any, count: int, case: Case, shared: int | None = None) -> list[list[int]]:
    """Problems as chats, in the order of their arrival; those that share a system message are spread at random.

    shared: tokens of the system message, about; default: the case's.
    """
    length = case.shared if shared is None else min(shared, case.shared)
    passage = tokenizer(PASSAGE)["input_ids"]
    system = tokenizer.decode((passage * (length // len(passage) + 1))[:length])
    found = []
    for i, line in enumerate(PROBLEMS.read_text(encoding="utf-8").splitlines()[:count]):
        chat = [{"role": "user", "content": json.loads(line)["prompt"]}]
        if length:
            chat.insert(0, {"role": "system", "content": f"Text {i // case.of}. {system}"})
        found.append(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
    random.Random(0).shuffle(found)
    return found


def run(
    quick: bool, dtype: str, rates: Sequence[float], count: int, cases: Sequence[str] = (), peer: Path | None = None,
    compile_peer: bool = False, report: Callable[[str], None] = lambda _: None, contenders: Sequence[str] = (),
) -> Iterator[dict[str, object]]:  # fmt: skip
    """Everybody under every load; one dict a line of the table.

    Args:
        rates: requests a second.
        count: requests of each load.
        cases: names in `CASES`; none: all.
        peer: the Python of an environment with vLLM, or None.
        compile_peer: let vLLM compile the model (default: eager).
        contenders: names in `TITLES`; none: all.
    """
    new_tokens = 8 if quick else 32
    report(f"loading the model in {dtype}")
    kind = getattr(torch, dtype)
    model, tokenizer = ab.models.load("smollm2", dtype=kind)
    plain, _ = ab.models.load("smollm2", dtype=kind, attn_implementation="sdpa")
    texts = {name: prompts(tokenizer, count, CASES[name], 128 if quick else None) for name in cases or CASES}
    loads = [(name, rate) for name in texts for rate in rates]
    wanted = contenders or list(TITLES)
    makers: dict[str, Callable[[], Serve]] = {
        "anabranch": lambda: Ours(model, num_pages=PAGES),
        "no_prefix_cache": lambda: Ours(model, num_pages=PAGES, prefix_cache=False),
        "continuous": lambda: ContinuousBatching(plain),
        "generate": lambda: OneAfterAnother(plain),
    }
    there = {name: make() for name, make in makers.items() if name in wanted}
    left_out: dict[str, str] = {}
    vllm = None
    if peer is not None and "vllm" in wanted:
        report("starting vLLM")
        longest = max(len(ids) for of_case in texts.values() for ids in of_case)
        try:
            vllm = VLLMArrivals(peer, ab.models.path("smollm2"), dtype, longest + new_tokens, compile_peer)
            there["vllm"] = vllm
        except (OSError, Ended) as error:
            left_out["vllm"] = str(error)
    try:
        for name, rate in loads:
            for who in [who for who in TITLES if who in there or who in left_out]:
                report(f"{TITLES[who]}: {name}, {rate:g} requests a second")
                why = left_out.get(who)
                if why is None:
                    try:
                        requests = arrivals(texts[name], rate)
                        yield _measured(who, there[who], name, rate, requests, new_tokens, dtype)
                        continue
                    except Ended as error:
                        why = left_out[who] = str(error)
                    except RuntimeError as error:
                        why = str(error)
                yield {"contender": who, "title": TITLES[who], "answers": name, "rate": rate, "requests": count,
                       "dtype": dtype, "left_out": why}  # fmt: skip
    finally:
        if vllm is not None:
            vllm.close()


def _measured(
    who: str, contender: Serve, case: str, rate: float, requests: list[Request], new_tokens: int, dtype: str
) -> dict[str, object]:
    branches = CASES[case].branches
    seconds, found = contender(requests, branches, new_tokens)
    got = sorted(len(times) for request in requests for times in request.times.values())
    if got != [new_tokens] * (branches * len(requests)):
        raise RuntimeError(f"{len(got)} answers of {got[:1]} to {got[-1:]} tokens, not of {new_tokens}: no comparison")
    title = getattr(contender, "title", TITLES[who])
    compiled = isinstance(contender, Ours) and bool(contender.engine.compiled)
    return {
        **entry(who, case, rate, requests, seconds, dtype=dtype, hit_rate=found),
        "title": title,
        "compiled": compiled,
    }
