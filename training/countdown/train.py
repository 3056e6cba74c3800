"""Trains the Countdown model from nothing, on one core: ``python -m training.countdown.train --out runs/countdown``.

The recipe is the multiplication model's (`training.from_nothing`). Rows are made on the fly, and as training goes on
more of them are of four numbers. Problems of the dev and test splits are left out. Every line of log.jsonl is a check
on dev problems: a context is right when the model prefers the right token wherever it writes itself, which is the same
as greedy decoding writing all of it.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from anabranch.training import Layout
from training.countdown.search import Problem, draw
from training.countdown.tokens import NUMBERS, make_tokenizer
from training.countdown.traces import SMALL, called, drill, row, search, serial
from training.from_nothing import Clock, load, logits_of, make_model, options, train

PERIODS = (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 17, 20, 25, 33, 50, 100, 200)
LONGEST = 1024  # tokens of a row; a serial search is cut off there


@torch.no_grad()
def begin_with_values(model: Any, tokenizer: Any) -> None:
    """Number tokens begin as waves of their value and its logarithm, in the embedding and in the head, so that sums
    need not be learnt pair by pair."""
    numbers = torch.tensor(NUMBERS, dtype=torch.float32)
    angles = [2 * math.pi * numbers / period for period in PERIODS]
    angles += [2 * math.pi * torch.log(numbers.clamp(min=0.5)) / period for period in (1.0, 2.5, 5.0, 10.0)]
    waves = torch.stack([wave for angle in angles for wave in (angle.cos(), angle.sin())], dim=1)
    ids = torch.tensor(tokenizer.convert_tokens_to_ids([str(n) for n in NUMBERS]))
    for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
        weight[ids, : waves.shape[1]] = waves * weight.std() * 2**0.5


def lesson(rng: random.Random, tokenizer: Any, big_share: float, serial_share: float, drills: int) -> list[Layout]:
    """Rows of one problem of four numbers and of one of three, and drills.

    big_share: how often there is one of four numbers, else two more of three. serial_share: how often it has its serial
    search beside it.
    """
    if rng.random() >= big_share:
        few = [search(draw(rng, "train", SMALL), serially=rng.random() < 0.5) for _ in range(3)]
        return [*(row(x, tokenizer) for x in few), *(drill(rng, tokenizer, 8) for _ in range(drills))]
    big = draw(rng, "train", SMALL + 1, ways=2 if rng.random() < 0.7 else None)
    parent = called(big)
    failed = [child for child in parent.children if child.path is None]
    found = [child for child in parent.children if child.path is not None]
    rows = [parent, *found[:1], *rng.sample(failed, min(2, len(failed)))]
    rows.append(search(draw(rng, "train", SMALL), serially=rng.random() < 0.5))
    layouts = [row(x, tokenizer) for x in rows]
    if rng.random() < serial_share:
        layouts.append(row(serial(big), tokenizer, LONGEST))
    return [*layouts, *(drill(rng, tokenizer, 8) for _ in range(drills))]


def batches(
    rng: random.Random, tokenizer: Any, tokens: int, big_share: Callable[[], float], serial_share: float, drills: int
) -> Iterator[list[Layout]]:
    """Endless batches of about `tokens` tokens."""
    while True:
        batch: list[Layout] = []
        while sum(x.num_tokens for x in batch) < tokens:
            batch += lesson(rng, tokenizer, big_share(), serial_share, drills)
        yield batch


def held_out(rng: random.Random, tokenizer: Any, count: int) -> dict[str, list[Layout]]:
    """Rows of dev problems, by what they ask for."""
    big = [draw(rng, "dev", SMALL + 1, ways=2) for _ in range(count)]
    little: list[Problem] = [draw(rng, "dev", SMALL) for _ in range(count)]
    parents = [called(p) for p in big]
    return {
        "parent": [row(p, tokenizer) for p in parents],
        "child": [row(rng.choice(p.children), tokenizer) for p in parents],
        "small": [row(search(p), tokenizer) for p in little],
        "serial": [row(serial(p), tokenizer, LONGEST) for p in big[: count // 2]],
    }


@torch.no_grad()
def check(model: Any, tokenizer: Any, dev: dict[str, list[Layout]], show: int = 0) -> dict[str, Any]:
    """Share of contexts that are right in whole, by kind, and the share of wrong tokens."""
    model.eval()
    right: dict[str, float] = {}
    wrong = count = 0
    for kind, layouts in dev.items():
        good = 0
        for x in layouts:
            logits, targets = logits_of(model, x)
            miss = logits.argmax(-1) != targets
            good += not bool(miss.any())
            wrong, count = wrong + int(miss.sum()), count + len(targets)
            if show > 0 and bool(miss.any()):
                show -= 1
                at = int(miss.nonzero()[0])
                learnt = int(x.learnt[at])
                before = tokenizer.decode(x.input_ids[max(0, learnt - 12) : learnt])
                got, wants = (tokenizer.decode([int(i)]) for i in (logits[at].argmax(), targets[at]))
                print(f"   {kind}: …{before!r} wants {wants!r}, got {got!r}")
        right[kind] = round(good / len(layouts), 4)
    model.train()
    return {"tokens_wrong": wrong / count, "right": right}


def main() -> None:
    parser = options(__doc__, minutes=55.0, decay=0.5, ramp=0.2, every=240.0)
    parser.add_argument("--tokens", type=int, default=3000, help="of a batch")
    parser.add_argument("--serial", type=float, default=0.5, help="share of problems with their serial search")
    parser.add_argument("--drills", type=int, default=1, help="rows of eight drilled lines beside each problem")
    parser.add_argument("--start", type=Path, help="folder of a model to go on from")
    parser.add_argument("--autocast", action="store_true", help="matrix products in bfloat16, for CPUs that have them")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(args.out)
    model: Any = make_model(tokenizer, args)
    begin_with_values(model, tokenizer)
    if args.start is not None:
        load(model, args.start)
    dev = held_out(random.Random("dev"), tokenizer, 12)
    clock = Clock(args)
    rng = random.Random(args.seed)
    train(
        model,
        batches(rng, tokenizer, args.tokens, lambda: clock.ramped, args.serial, args.drills),
        args,
        clock,
        counts=lambda tokens, _: {"cpu_minutes": round(time.process_time() / 60, 2), "tokens": tokens},
        check=lambda: check(model, tokenizer, dev, show=4),
        autocast=args.autocast,
    )


if __name__ == "__main__":
    main()
