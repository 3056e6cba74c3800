"""What low-precision KV costs in accuracy: SmolLM2's perplexity, and the adapted model's answers, by `kv_format`.

Nothing here is timed: the figures do not depend on what else the machine does.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import anabranch as ab
from anabranch.answers import is_right
from anabranch.evaluation.evaluate import read_problems

FORMATS = ("auto", "int8", "fp8")
ROOT = Path(__file__).parents[1]
TEXT = ROOT / "docs" / "kernel_contract.md"  # its digest goes into the results
PROBLEMS = ROOT / "training" / "adaptive" / "problems.jsonl"
CONTEXT = 512  # tokens that a window holds


def _bytes(cache: ab.TreeCache) -> int:
    """Of K and V of one token, all layers and heads."""
    return 2 * cache.num_layers * cache.num_kv_heads * cache.kv_format.bytes_per_vector(cache.head_dim)


@torch.no_grad()
def _scores(model: Any, windows: list[list[int]], kept: str) -> tuple[list[Tensor], int]:
    """Log-probabilities [tokens, vocabulary] of each window, its K and V read back from a cache of that format."""
    found = []
    for ids in windows:
        cache = ab.TreeCache.for_model(model, num_pages=-(-CONTEXT // 16), kv_format=kept)
        step = cache.step({cache.branch(): len(ids)})
        logits = model(
            torch.tensor([ids]), position_ids=step.position_ids[None], tree_step=step, use_cache=False
        ).logits[0]
        found.append(torch.log_softmax(logits.float(), -1))
    return found, _bytes(cache)


def perplexity(dtype: torch.dtype, windows: int) -> Iterator[dict[str, Any]]:
    """One entry a format: perplexity on a text of the repository; against the model's own dtype, the mean divergence
    (nats) and how often the likeliest token is another."""
    model, tokenizer = ab.models.load("smollm2", dtype=dtype, device="cpu")
    ab.hf.enable(model)
    text = TEXT.read_text(encoding="utf-8")
    ids = tokenizer(text)["input_ids"]
    parts = [ids[i : i + CONTEXT] for i in range(0, min(len(ids), windows * CONTEXT), CONTEXT)]
    parts = [p for p in parts if len(p) > 1]
    base: list[Tensor] | None = None
    for kept in FORMATS:
        scores, size = _scores(model, parts, kept)
        base = scores if base is None else base
        came = [torch.tensor(ids[1:])[:, None] for ids in parts]
        losses = torch.cat([-s[:-1].gather(1, ids) for s, ids in zip(scores, came, strict=True)])
        pairs = list(zip(base, scores, strict=True))
        divergence = torch.cat([(a.exp() * (a - b)).sum(-1) for a, b in pairs]).mean().item()
        other = torch.cat([a.argmax(-1) != b.argmax(-1) for a, b in pairs]).float().mean().item()
        yield {
            "case": "perplexity",
            "dtype": str(dtype).removeprefix("torch."),
            "kv_format": kept,
            "bytes_per_token": size,
            "perplexity": round(math.exp(losses.mean().item()), 4),
            "divergence": float(f"{divergence:.3g}"),
            "other_likeliest": round(other, 5),
            "tokens": len(losses),
            "text": {"file": TEXT.relative_to(ROOT).as_posix(), "sha256": hashlib.sha256(text.encode()).hexdigest()},
        }  # fmt: skip


def answers(dtype: torch.dtype, count: int) -> Iterator[dict[str, Any]]:
    """One entry a format: the adapted model's answers to problems from all over the file, greedy, forking where it
    wants to; how many are the same text as with the model's own dtype, right or wrong as there, right.

    The second entry is a control: the model's own dtype again, the problems in three calls in place of one. Rows that
    are computed in other company differ in their last bits, and some answers with them.
    """
    problems = read_problems(PROBLEMS)
    problems = problems[:: max(1, len(problems) // count)][:count]
    base: list[str] | None = None
    for kept, calls in (("auto", 1), ("auto", 3), *((kept, 1) for kept in FORMATS[1:])):
        model, tokenizer = ab.models.load("smollm2-adaptive", dtype=dtype, device="cpu")
        engine = ab.Engine(model, tokenizer, kv_format=kept, num_pages=4096)
        chats = [[{"role": "user", "content": p.prompt}] for p in problems]
        results: list[Any] = []
        for part in range(calls):
            some = chats[len(chats) * part // calls : len(chats) * (part + 1) // calls]
            results += engine.generate(some, strategy=ab.ThreadWeaver(), do_sample=False, max_new_tokens=300)
        texts = [result.text or "" for result in results]
        base = texts if base is None else base
        right = [is_right(t, p.answer) for t, p in zip(texts, problems, strict=True)]
        right_before = [is_right(t, p.answer) for t, p in zip(base, problems, strict=True)]
        yield {
            "case": "answers",
            "dtype": str(dtype).removeprefix("torch."),
            "kv_format": kept,
            "bytes_per_token": _bytes(engine.cache),
            "calls": calls,
            "problems": len(problems),
            "right": sum(right),
            "same_text": sum(a == b for a, b in zip(texts, base, strict=True)),
            "same_verdict": sum(a == b for a, b in zip(right, right_before, strict=True)),
        }


def run(quick: bool = False) -> Iterator[dict[str, Any]]:
    """Both, in float32 and bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        yield from perplexity(dtype, 1 if quick else 4)
    for dtype in (torch.bfloat16,) if quick else (torch.float32, torch.bfloat16):
        yield from answers(dtype, 4 if quick else 60)
