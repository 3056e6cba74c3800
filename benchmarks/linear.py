"""What `Engine(batch_invariant=True)` costs: SmolLM2's linear layers and whole forwards, with it and without."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

import anabranch as ab
from anabranch.runner.eager import forward
from anabranch.runner.invariant import Invariant
from anabranch.runner.linear import linear, linear_context

from .timing import Timing, interleaved

ROWS = (1, 16, 64, 512)
SHAPES = ((576, 576), (1536, 576), (576, 1536), (49152, 576))  # [N, K]: attention, up, down, head


def _entry(case: str, dtype: torch.dtype, rows: int, mine: Timing, theirs: Timing) -> dict[str, Any]:
    return {
        "case": case,
        "dtype": str(dtype).removeprefix("torch."),
        "rows": rows,
        "invariant": mine.as_dict(),
        "default": theirs.as_dict(),
        "ratio": round(mine.median / theirs.median, 2),
    }


def products(dtype: torch.dtype, rounds: int) -> Iterator[dict[str, Any]]:
    """Our linear kernel beside torch's, one layer at a time."""
    rng = torch.Generator().manual_seed(0)
    for n, k in SHAPES:
        weight = torch.randn(n, k, generator=rng).to(dtype)
        for rows in ROWS:
            x = torch.randn(rows, k, generator=rng).to(dtype)
            calls = [partial(linear, x, weight), partial(torch.nn.functional.linear, x, weight)]
            for call in calls:
                call()
            ours, torchs = interleaved(calls, rounds=rounds)
            yield _entry(f"linear {n}×{k}", dtype, rows, ours, torchs)


def forwards(dtype: torch.dtype, rounds: int) -> Iterator[dict[str, Any]]:
    """Whole forwards: 1, 16 and 64 branches of one trunk of 300 tokens that decode, and 512 rows of a prompt."""
    model, _ = ab.models.load("smollm2", dtype=dtype, device="cpu")
    ab.hf.enable(model)
    contexts = {True: Invariant(model), False: linear_context(model)}
    for rows in ROWS:
        calls = []
        for invariant, context in contexts.items():
            cache = ab.TreeCache.for_model(model, num_pages=128 + 4 * rows)
            cache.batch_invariant = invariant
            trunk = cache.branch()
            decoding = rows < 512

            def run(cache: ab.TreeCache, counts: dict[Any, int], context: Any = context) -> None:
                step = cache.step(counts)
                ids = torch.arange(step.num_rows) % 1000 + 5
                with torch.inference_mode(), context:
                    forward(model, ids, step, keep=step.last_rows)

            if decoding:
                run(cache, {trunk: 300})
            kids = cache.fork(trunk, rows) if decoding else []

            def call(cache: Any = cache, kids: Any = kids, run: Any = run) -> None:
                if kids:
                    return run(cache, dict.fromkeys(kids, 1))
                branch = cache.branch()
                run(cache, {branch: 512})
                cache.release(branch)

            call()
            calls.append(call)
        ours, others = interleaved(calls, rounds=rounds)
        yield _entry("forward of SmolLM2-135M", dtype, rows, ours, others)


def run(quick: bool = False) -> Iterator[dict[str, Any]]:
    """Every measurement, one dict each; `ratio` is the time with batch_invariant over the time without."""
    rounds = 5 if quick else 15
    for dtype in (torch.float32, torch.bfloat16):
        yield from products(dtype, rounds)
        yield from forwards(dtype, rounds)
