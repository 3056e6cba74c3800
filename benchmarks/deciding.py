"""What strategies take: time inside their generators and queues, as a share of a step's, on a real model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import anabranch as ab
from anabranch.records.metrics import summary
from anabranch.strategies import registry

from .environment import load_average

PROMPT = "Question: Why do rivers bend?\nAnswer:"
# Fewer tokens a part, so that a short answer gets to every part of its strategy.
SHORT: dict[str, dict[str, Any]] = {
    "aspects": {"intro_tokens": 8, "aspect_tokens": 12},
    "best-of-n": {"n": 4},
    "deepconf": {"n": 4, "warmup": 2, "window": 16},
    "draft-tree": {"strategy": ab.SelfConsistency(4), "draft": "siblings"},
    "group-think": {"tokens": 24, "room": 64},
    "hogwild": {"tokens": 24, "check_every": 12},
    "leap": {"turns": 2, "turn_tokens": 12, "summary_tokens": 8},
    "pacore": {"rounds": (2,), "answer_tokens": 16},
    "parallel-probe": {"n": 4, "every": 12, "probe_tokens": 4},
    "prune-refork": {"n": 4, "every": 12, "swap": 1},
    "self-consistency": {"n": 4},
    "sequential": {"strategy": ab.SelfConsistency(4)},
    "skeleton-of-thought": {"skeleton_tokens": 24, "point_tokens": 12},
    "slim-sc": {"n": 4, "thought_tokens": 12},
    "step": {"n": 4, "scorer": lambda hidden: hidden[0], "step_tokens": 12},
    "step-beam-search": {"width": 2, "samples": 2, "step_tokens": 12},
    "tree-of-thoughts": {"thought_tokens": 12, "depth": 2},
    "parathinker": {"biased": False, "path_tokens": 16},
}


def _with_tags(tokenizer: Any, model: Any) -> None:
    """Give a model, untrained, every tag that some strategy needs."""
    tags: dict[str, None] = {}
    for name in registry.names():
        tags |= dict.fromkeys(getattr(registry.find(name), "tags", ()))
    tags |= dict.fromkeys(f"<{slash}think{i}>" for i in range(1, 7) for slash in ("", "/"))
    tags |= dict.fromkeys(
        f"<{slash}{tag}>" for tag in ("Parallel", "Path", "Summary", "summary") for slash in ("", "/")
    )
    tokenizer.add_special_tokens({"extra_special_tokens": list(tags)})
    model.resize_token_embeddings(len(tokenizer))


def run(model: str, tokens: int, only: tuple[str, ...] = (), cores: int = 1) -> Iterator[dict[str, Any]]:
    """One entry a strategy: the second of two answers of full length.

    cores: that torch and the kernels have. With one, time is the processor's, of the thread that does all the work, so
    that the machine may be busy otherwise; with more it is the wall clock's.
    """
    loaded, tokenizer = ab.models.load(model)
    _with_tags(tokenizer, loaded)
    engine = ab.Engine(loaded, tokenizer, compile=False)
    engine.generate(PROMPT, max_new_tokens=2)
    for name in only or registry.names():
        strategy = registry.build(name, SHORT.get(name))
        options: dict[str, Any] = {"strategy": strategy, "max_new_tokens": tokens, "eos_token_id": None}
        engine.generate(PROMPT, **options)  # what is done once in a process
        engine.clear_prefix_cache()
        with patch("time.perf_counter", time.thread_time) if cores == 1 else nullcontext():
            result = engine.generate(PROMPT, **options)
        told = summary([result])
        whole = sum(result.metrics.seconds.values())
        yield {
            "model": model, "strategy": name, "cores": cores, "steps": result.metrics.steps,
            "rows": result.metrics.rows, "threads": result.metrics.num_threads, "seconds": round(whole, 3),
            "strategy_share": round(told["strategy_seconds"] / whole, 5),
            "overhead": round(told["overhead"], 5), "load": load_average(),
        }  # fmt: skip
