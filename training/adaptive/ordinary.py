"""What the adapted model keeps of the stock model: answers to ordinary questions, and the card.

    python -m training.adaptive.ordinary answers --out runs/ordinary         the stock model's answers, to train with
    python -m training.adaptive.ordinary run --save card.json                the held-out questions through both models

Both models get the very same tokens: the chat in the adapted model's template, which has no system message of its own
(three in ten questions bring the stock model's). The card has

    same        share of questions whose greedy answer is the stock model's, token for token
    perplexity  of the stock model's answers under the adapted model, and under itself
    forks       how often the adapted model, decoding with ``ThreadWeaver()``, opens a thread (none is called for)
"""

from __future__ import annotations

import itertools
import json
import math
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import anabranch as ab
from anabranch.evaluation.evaluate import bootstrap, ratio_of_sums, wilson

from .questions import questions
from .text import Answered, chat_ids, ordinary_lesson, write_answers
from .text import tokenizer as adaptive_tokenizer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__, rich_markup_mode="rich")


def answer_all(
    engine: Any, chats: list[tuple[str, Any]], tokenizer: Any, strategy: Any = None, batch: int = 64, most: int = 80
) -> list[tuple[Answered, Any]]:
    """(what the model says to each chat, greedily; the engine's `Result`)."""
    out = []
    for at in range(0, len(chats), batch):
        some = chats[at : at + batch]
        prompts = [chat_ids(chat, tokenizer) for _, chat in some]
        results = engine.generate(prompts, strategy=strategy, do_sample=False, max_new_tokens=most)
        for (kind, chat), result in zip(some, results, strict=True):
            ended = bool(result.token_ids) and result.token_ids[-1] == tokenizer.eos_token_id
            said = tokenizer.decode(result.token_ids[:-1] if ended else result.token_ids)
            out.append((Answered(kind, chat, said, ended), result))
    return out


def stock_engine(dtype: Any) -> Any:
    model, _ = ab.models.load("smollm2", dtype=dtype)
    return ab.Engine(model, adaptive_tokenizer())


@app.command()
def answers(
    out: Annotated[Path, typer.Option(help="Folder for train.jsonl and dev.jsonl.")] = Path("runs/ordinary"),
    count: Annotated[int, typer.Option(help="Questions to train with.")] = 1900,
    dev: int = 48,
    seed: int = 0,
    batch: int = 64,
    most: Annotated[int, typer.Option(help="Tokens an answer has at most.")] = 80,
    threads: int = 2,
) -> None:
    """Ask the stock model, greedily; a few minutes on two cores. Files grow as answers come."""
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    engine, tokenizer = stock_engine(torch.bfloat16), adaptive_tokenizer()
    for split, many in (("dev", dev), ("train", count)):
        asked = list(itertools.islice(questions(split, seed), many))
        done: list[Answered] = []
        for at in range(0, many, batch):
            done += [a for a, _ in answer_all(engine, asked[at : at + batch], tokenizer, batch=batch, most=most)]
            write_answers(out / f"{split}.jsonl", done)
            print(f"{split}: {len(done)} of {many}", flush=True)


def surprise(model: Any, answered: Answered, tokenizer: Any) -> tuple[float, int]:
    """(negative log-likelihood of an answer in nats, its tokens)."""
    row = ordinary_lesson(answered, tokenizer).row
    with torch.inference_mode():
        logprobs = row.logprobs(model)
    return -float(logprobs.sum()), len(logprobs)


def _shares(pairs: list[tuple[str, bool]]) -> dict[str, str]:
    groups: dict[str, list[bool]] = {}
    for kind, good in pairs:
        groups.setdefault(kind, []).append(good)
    return {kind: f"{sum(v)}/{len(v)}" for kind, v in sorted(groups.items())}


@app.command()
def run(
    model: Annotated[str, typer.Option(help="The adapted model: a name or a merged folder.")] = "smollm2-adaptive",
    count: int = 160,
    seed: int = 0,
    batch: int = 64,
    most: Annotated[int, typer.Option(help="Tokens an answer has at most.")] = 80,
    dtype: str = "float32",
    threads: int = 2,
    save: Path | None = None,
) -> None:
    """Ask both models the held-out questions and print the card."""
    from anabranch.cli.common import load_model
    from anabranch.viz.console import machine_note

    torch.set_num_threads(threads)
    asked = list(itertools.islice(questions("test", seed), count))
    tokenizer = adaptive_tokenizer()
    begin = time.perf_counter()
    stock = stock_engine(getattr(torch, dtype))
    before = [a for a, _ in answer_all(stock, asked, tokenizer, batch=batch, most=most)]
    itself = [surprise(stock.model, a, tokenizer) for a in before]
    del stock
    adapted, own, kind_of = load_model(model, dtype)
    found = answer_all(ab.Engine(adapted, own), asked, own, ab.ThreadWeaver(), batch, most)
    after = [a for a, _ in found]
    under = [surprise(adapted, a, own) for a in before]
    same = [(a.answer, a.ended) == (b.answer, b.ended) for a, b in zip(before, after, strict=True)]
    # Log-ratio of the perplexities: nats a token that the adapted model is worse.
    worse = [(a - b, n) for (a, n), (b, _) in zip(under, itself, strict=True)]
    low, high = bootstrap(worse, ratio_of_sums) or (0.0, 0.0)
    tokens = sum(n for _, n in itself)
    forks = sum(result.metrics.num_threads > 0 for _, result in found)
    card = {
        "schema": "anabranch.ordinary", "version": 1, "model": model, "dtype": str(kind_of).removeprefix("torch."),
        "questions": count, "seed": seed, "max_new_tokens": most, "answer_tokens": tokens, "machine": machine_note(),
        "anabranch": ab.__version__,
        "same": sum(same), "same_share": sum(same) / count, "same_95": wilson(sum(same), count),
        "same_by_kind": _shares([(a.kind, s) for a, s in zip(before, same, strict=True)]),
        "within_5_percent": sum(d <= n * math.log(1.05) for d, n in worse),
        "same_or_within_5_percent": sum(s or d <= n * math.log(1.05) for s, (d, n) in zip(same, worse, strict=True)),
        "perplexity_stock": math.exp(sum(x for x, _ in itself) / tokens),
        "perplexity_adapted": math.exp(sum(x for x, _ in under) / tokens),
        "perplexity_ratio": math.exp(ratio_of_sums(worse)),
        "perplexity_ratio_95": [math.exp(low), math.exp(high)],
        "forks": forks, "malformed": sum(bool(result.malformed) for _, result in found),
        "tags_written": sum(any(tag in a.answer for tag in ab.ThreadWeaver().tags) for a in after),
        "seconds": time.perf_counter() - begin,
        "different": [
            {"kind": a.kind, "chat": a.chat, "stock": a.answer, "adapted": b.answer}
            for a, b, s in zip(before, after, same, strict=True)
            if not s
        ],
    }  # fmt: skip
    if save is not None:
        save.write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in card.items() if k != "different"}, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    app()
