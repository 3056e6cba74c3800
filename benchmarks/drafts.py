"""Speculative decoding: steps and seconds of the adapted model's answers with drafts and without, in turns."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

import anabranch as ab

from .engines import compiled_engine
from .environment import load_average

PROBLEMS = Path(__file__).resolve().parent.parent / "training" / "adaptive" / "problems.jsonl"
PRODUCTS = ("7308 * 4406", "2194 * 3875", "9081 * 1234")  # for the embedded model


def contenders(draft_model: Any = None) -> dict[str, ab.Strategy]:
    """What is compared; the first is what the others are measured by."""
    weaver = ab.ThreadWeaver()
    models: dict[str, ab.Strategy] = {}
    if draft_model is not None:
        models["model"] = ab.DraftTree(weaver, draft_model, width=1)
        models["model, rows free"] = ab.DraftTree(weaver, draft_model, width=1, row_cost=0)
    return {
        "plain": weaver,
        "ngram": ab.DraftTree(weaver, "ngram"),
        "siblings": ab.DraftTree(weaver, "siblings"),
        "siblings, one path": ab.DraftTree(weaver, "siblings", width=1),
        "siblings, rows free": ab.DraftTree(weaver, "siblings", row_cost=0),
        **models,
    }


def prompts(model: str, count: int) -> list[Any]:
    """Problems with several threads, evenly spaced over those there are."""
    if model == "multiplication":
        return list(PRODUCTS[:count])
    problems = [json.loads(line) for line in PROBLEMS.read_text().splitlines()]
    forked = [p["prompt"] for p in problems if p.get("threads", 0) > 2]
    return [[{"role": "user", "content": text}] for text in forked[5 :: len(forked) // count][:count]]


def run(models: tuple[str, ...], count: int, rounds: int, draft_model: Path | None = None) -> Iterator[dict[str, Any]]:
    """One entry a model and contender; trees are compared, `rounds` are interleaved, each answer runs alone.

    draft_model: folder of one for these models (training/drafts); None: only what needs no model is compared.
    """
    for name in models:
        model, tokenizer = ab.models.load(name)
        engine = compiled_engine(model, tokenizer=tokenizer)
        guessing = None
        if draft_model is not None:
            guessing = AutoModelForCausalLM.from_pretrained(
                draft_model, dtype=model.dtype, attn_implementation="anabranch"
            )
        asked, strategies = prompts(name, count), contenders(guessing)
        results: dict[str, list[ab.Result]] = {}
        seconds: dict[str, list[float]] = {label: [] for label in strategies}
        for round_ in range(rounds + 1):  # the first one warms up, and counts steps
            for label, strategy in strategies.items():
                begin = time.perf_counter()
                found = [engine.generate(prompt, strategy=strategy, max_new_tokens=512) for prompt in asked]
                if round_:
                    seconds[label].append(time.perf_counter() - begin)
                results.setdefault(label, found)
        plain = results["plain"]
        for label, found in results.items():
            total = {
                key: sum(result.metrics[key] for result in found)
                for key in (
                    "sampled_tokens",
                    "critical_path_tokens",
                    "steps",
                    "rows",
                    "draft_tokens",
                    "accepted_tokens",
                )
            }
            took = seconds[label]
            yield {
                "model": name, "draft": label, "prompts": len(asked), **total,
                "same_trees": [r.tree for r in found] == [r.tree for r in plain],
                "compiled": bool(engine.compiled),
                "fewer_steps": round(sum(r.metrics.steps for r in plain) / total["steps"], 3),
                "seconds": [round(s, 3) for s in took],
                "faster": round(statistics.median(a / b for a, b in zip(seconds["plain"], took, strict=True)), 3)
                if took else None,
                "load": load_average(),
            }  # fmt: skip
