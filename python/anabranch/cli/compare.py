"""The demo's comparison: the same fork once through the engine and once through ``model.generate``, in the same run."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Side:
    """One way to write the branches. Seconds of the whole call, prompt included; CPU seconds are of all threads."""

    name: str
    seconds: float
    cpu_seconds: float
    tokens: int
    prompt_tokens_computed: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Comparison:
    """``branches`` continuations of exactly ``length`` tokens each, sampled, after ``prompt_tokens`` of context."""

    branches: int
    length: int
    prompt_tokens: int
    rounds: int
    engine: Side
    generate: Side

    @property
    def ratio(self) -> float:
        """How many times as fast as ``generate`` the engine was; below 1: slower."""
        return self.generate.seconds / self.engine.seconds

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        sides = {
            name: {**asdict(side), "tokens_per_second": side.tokens_per_second}
            for name, side in (("engine", self.engine), ("generate", self.generate))
        }
        return {
            "branches": self.branches,
            "tokens_each": self.length,
            "prompt_tokens": self.prompt_tokens,
            "rounds": self.rounds,
            "ratio": self.ratio,
            **sides,
        }


SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


def compare(
    engine: Any, context: Sequence[int], branches: int, length: int, rounds: int = 3, patience: float = 20.0
) -> Comparison:
    """Time both, in turns, after a short warm-up; each side's best round counts. From the third round on, none begins
    after `patience` s.

    Both sample from the whole vocabulary at temperature 1 and may not stop early, so both write branches · length
    tokens. The engine computes the context once; ``generate(num_return_sequences=)`` computes it once a branch, and its
    attention is SDPA.
    """
    calls: dict[str, Callable[[int], tuple[float, float]]] = {
        "engine": lambda amount: _ours(engine, context, branches, amount),
        "generate": lambda amount: _generate(engine.model, context, branches, amount),
    }
    for call in calls.values():
        call(2)
    best = dict.fromkeys(calls, (float("inf"), float("inf")))
    begin, done = time.perf_counter(), 0
    while done < min(2, rounds) or (done < rounds and time.perf_counter() - begin < patience):
        for name in sorted(calls, reverse=done % 2 == 1):  # whoever was second begins
            wall, cpu = calls[name](length)
            best[name] = (min(best[name][0], wall), min(best[name][1], cpu))
        done += 1
    tokens = branches * length
    return Comparison(
        branches=branches,
        length=length,
        prompt_tokens=len(context),
        rounds=done,
        engine=Side("anabranch, one shared cache", *best["engine"], tokens, len(context)),
        generate=Side("model.generate, SDPA", *best["generate"], tokens, branches * len(context)),
    )


def _ours(engine: Any, context: Sequence[int], n: int, length: int) -> tuple[float, float]:
    from anabranch.strategies import SelfConsistency

    strategy = SelfConsistency(n=n, temperature=1.0, top_p=1.0, top_k=0)
    begin, cpu = time.perf_counter(), time.process_time()
    result = engine.generate(list(context), strategy=strategy, min_new_tokens=length, max_new_tokens=length)
    seconds = time.perf_counter() - begin, time.process_time() - cpu
    _check(result.metrics.sampled_tokens, n * length)
    return seconds


def _generate(model: Any, context: Sequence[int], n: int, length: int) -> tuple[float, float]:
    import torch

    ids = torch.tensor([list(context)], device=model.device)
    options = {"num_return_sequences": n, "min_new_tokens": length, "max_new_tokens": length, **SAMPLING}
    with _attention(model, "sdpa"), warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(0)
        begin, cpu = time.perf_counter(), time.process_time()
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        if out.is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin, time.process_time() - cpu
    _check(out[:, ids.shape[1] :].numel(), n * length)
    return seconds


@contextmanager
def _attention(model: Any, name: str) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _check(got: int, expected: int) -> None:
    if got != expected:
        raise RuntimeError(f"{got} tokens came out, not {expected}: the comparison would not be fair")
