"""A decoding loop of one's own: our kernels between a model's linear layers, which are torch's, steps a second.

Three contenders, in turns: our kernels on whichever threads are at hand (the default), on their own pool alone, and
Transformers with SDPA and a copy of the prompt's cache for each branch. All decode greedily from the same prompt, whose
prefill is not timed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import DynamicCache

import anabranch as ab
from anabranch.backends import threads

from .e2e import prompts
from .timing import once

TITLES = {"auto": "ours", "pool": "ours on its own threads", "transformers": "Transformers"}


def run(
    dtype: str = "float32", branches: tuple[int, ...] = (1, 16), steps: int = 24, rounds: int = 5, quick: bool = False
) -> Iterator[dict[str, Any]]:
    """One entry for each prompt and number of branches.

    steps: decoded in a round, after the prompt.
    """
    load = {"dtype": getattr(torch, dtype)}
    ours, tokenizer = ab.models.load("smollm2", **load)
    peer, _ = ab.models.load("smollm2", attn_implementation="sdpa", **load)
    for prompt in prompts(tokenizer, quick):
        for n in branches:
            rates: dict[str, list[float]] = {name: [] for name in TITLES}
            for turn in range(rounds + 1):
                for name, each in rates.items():
                    before = threads.choose("pool" if name == "pool" else "auto")
                    try:
                        if name == "transformers":
                            decode = _transformers(peer, prompt.ids, n, steps)
                        else:
                            decode = _ours(ours, prompt.ids, n, steps)
                        seconds = once(decode)
                    finally:
                        threads.choose(before)
                    if turn:  # the first one warms up
                        each.append(n * steps / seconds)
            yield {
                "prompt": prompt.name, "prompt_tokens": len(prompt.ids), "branches": n, "dtype": dtype, "steps": steps,
                "rates": {name: [round(x, 2) for x in each] for name, each in rates.items()},
                "over_pool": _ratio(rates, "pool"), "over_transformers": _ratio(rates, "transformers"),
            }  # fmt: skip


def _ratio(rates: dict[str, list[float]], peer: str) -> float:
    """The median over rounds of ours against `peer`'s of the same round."""
    return round(statistics.median(a / b for a, b in zip(rates["auto"], rates[peer], strict=True)), 3)


def _ours(model: Any, ids: list[int], n: int, steps: int) -> Callable[[], Any]:
    """A prefilled cache, forked; the call decodes."""
    cache = ab.TreeCache.for_model(model, num_pages=len(ids) // 16 + 8 + n * (steps // 16 + 2))

    def forward(tokens: torch.Tensor, step: Any) -> torch.Tensor:
        logits: torch.Tensor = model(
            input_ids=tokens[None], position_ids=step.position_ids[None], tree_step=step, use_cache=False,
            logits_to_keep=step.last_rows,
        ).logits[0]  # fmt: skip
        return logits

    trunk = cache.branch()
    with torch.inference_mode():
        first = forward(torch.tensor(ids), cache.step({trunk: len(ids)}))[0].topk(n).indices
    branches = cache.fork(trunk, n)

    @torch.inference_mode()
    def decode() -> None:
        tokens = first
        for _ in range(steps):
            tokens = forward(tokens, cache.step(dict.fromkeys(branches, 1))).argmax(-1)

    return decode


def _transformers(model: Any, ids: list[int], n: int, steps: int) -> Callable[[], Any]:
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        scores = model(input_ids=torch.tensor([ids]), past_key_values=cache, logits_to_keep=1).logits[0, -1]
        cache.batch_repeat_interleave(n)

    @torch.inference_mode()
    def decode() -> None:
        tokens = scores.topk(n).indices
        for _ in range(steps):
            tokens = model(input_ids=tokens[:, None], past_key_values=cache).logits[:, -1].argmax(-1)

    return decode


def line(entry: dict[str, Any]) -> str:
    each = ", ".join(f"{TITLES[name]} {statistics.median(x):.1f}" for name, x in entry["rates"].items())
    return (
        f"{entry['prompt']:6} {entry['prompt_tokens']:5} tokens  n = {entry['branches']:3}  {entry['dtype']:9} {each} "
        f"tokens/s: × {entry['over_pool']}, × {entry['over_transformers']}"
    )
