"""Trains the packaged multiplication model from nothing, on one core: ``python -m training.multiplication.train``.

Examples are made on the fly and never twice on purpose; problems of the dev and test splits are left out. The rate is
constant, then falls to zero over the last part of the time; a file ``decay`` in the output folder starts that at
once. Every line of log.jsonl is a check on held-out dev problems: a problem is right when the model prefers the right
token at each row that it writes itself, which is the same as greedy decoding getting the whole trace right.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from anabranch.strategies import ThreadWeaver
from anabranch.training import Layout, trie
from training.from_nothing import Clock, load, logits_of, make_model, options, train
from training.layout import Lesson, lesson
from training.multiplication.tokens import make_tokenizer
from training.multiplication.traces import PLACES, Problem, columns, draw, drill, problem

EARLY, LATE = (3.0, 4.0, 2.0, 1.0), (1.0, 2.0, 4.0, 10.0)  # weights of 1- to 4-digit operands


def lesson_of(question: Problem, tokenizer: Any) -> Lesson:
    prompt = tokenizer(question.prompt)["input_ids"]
    return lesson(prompt, question.items, tokenizer, eos_id=tokenizer.eos_token_id)


def drill_row(rng: random.Random, tokenizer: Any) -> Layout:
    """A drill as a chain of tokens: columns with loss on their sums, or the beginning of an answer and of a thread with
    loss on what the model writes, or a join with loss on all of it."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    kind, runs = rng.random(), []
    if kind < 0.4:
        size, count = rng.randint(4, 8), rng.randint(2, 4)
        text, _ = columns([[rng.randrange(10) for _ in range(size)] for _ in range(count)])
        for i in encode("<bos></Parallel>" + text):
            token = tokenizer.convert_ids_to_tokens(i)
            runs.append(([i], len(token) > 1 and token[0] in PLACES))
    elif kind < 0.75:
        question = problem(*draw(rng, "train", LATE, zeros=0.6))
        runs.append((encode(f"<bos>{question.prompt}"), False))
        if question.threads:
            name, text = rng.choice(question.items[1])  # type: ignore[arg-type]
            runs.append((encode(question.items[0]), True))  # type: ignore[arg-type]
            runs.append((encode(ThreadWeaver().header.replace("{id}", name)), False))
        else:
            text = question.items[0]  # type: ignore[assignment]
        runs.append((encode(text[: text.index(";") + 1]), True))
    else:
        given, said = drill(rng)
        runs = [
            ([tokenizer.bos_token_id, *encode(given)], False),
            ([*encode(said), tokenizer.eos_token_id], True),
        ]
    return trie([[(ids, learnt, learnt) for ids, learnt in runs]])


def batches(rng: random.Random, tokenizer: Any, tokens: int, weights: Any, drills: float) -> Any:
    """Endless batches of about `tokens` tokens: problems, and drills beside them, each blind to all others."""
    while True:
        now, batch, size = weights(), [], 0
        while size < tokens:
            rows = [lesson_of(problem(*draw(rng, "train", now, zeros=0.35)), tokenizer).row]
            rows += [drill_row(rng, tokenizer) for _ in range(int(drills + rng.random()))]
            size += sum(x.num_tokens for x in rows)
            batch += rows
        yield batch


def part_of(path: str, target: str) -> str:
    """Which skill a row asks for, by the text before it."""
    if re.search(r";([a-h]\d)*(=\d*)?$", path) and re.search(r"[a-h]\d'*;[a-h0-9=]*$", path):
        if target[0] not in "ABCD" and not re.search(r":[a-h0]*;$", path):
            return "number" if "=" in path.rpartition(";")[2] else "usual way round"
    if "</Parallel>" in path:
        return "column's digit" if target.isdigit() else "column's sum"
    for name, end in (("product", r"\*\d=\d?"), ("total", r"\+\d=\d?"), ("carry", r"\+"), ("digit", r"[A-D]\d\*")):
        if re.search(end + "$", path):
            return name
    if target[0] in "ABCD":
        return "operand" if ";" in path[-12:] else "operand restated"
    if re.fullmatch(r"[a-h]\d", target):
        return "result" if re.search(r"\+\d=\d\d$", path) else "zero or top"
    return "format" if "<Outlines>" not in path else "outline or tag"


@torch.no_grad()
def check(model: Any, tokenizer: Any, dev: list[tuple[Problem, Lesson]], show: int = 0) -> dict[str, Any]:
    """Shares of dev problems right; wrong tokens by skill, each a share of all tokens with loss."""
    model.eval()
    right: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    good: Counter[str] = Counter()
    count = 0
    for question, x in dev:
        logits, targets = logits_of(model, x.row)
        guess, learnt = logits.argmax(-1), x.row.learnt
        ids, previous = x.row.input_ids.tolist(), x.row.mask.previous.tolist()
        miss = guess != targets
        forked, plain = (not bool((miss & way[learnt]).any()) for way in (x.forked, x.plain))
        right["forked"] += forked
        right["plain"] += plain
        size = f"{len(str(question.a))}x{len(str(question.b))}"
        sizes[size] += 1
        good[size] += forked
        for i in miss.nonzero()[:, 0].tolist():
            path, up = [], previous[int(learnt[i])]
            while up >= 0:
                path.append(ids[up])
                up = previous[up]
            text, target = tokenizer.decode(path[::-1]), tokenizer.decode([int(targets[i])])
            wrong[part_of(text, target)] += 1
            if show > 0:
                show -= 1
                print(f"   {text[:12]}…{text[-40:]!r} wants {target!r}, got {tokenizer.decode([int(guess[i])])!r}")
        count += len(learnt)
    model.train()
    out = {name: right[name] / len(dev) for name in ("forked", "plain")}
    return out | {
        "rows_wrong": sum(wrong.values()) / count,
        "wrong": dict(wrong.most_common()),
        "by_size": {s: f"{good[s]}/{sizes[s]}" for s in sorted(sizes)},
    }


def main() -> None:
    parser = options(__doc__, minutes=60.0, decay=0.4, ramp=0.15, every=60.0)
    parser.add_argument("--drills", type=float, default=1.0, help="drills beside each problem")
    parser.add_argument("--rows", type=int, default=3000, help="tokens of a batch")
    parser.add_argument("--init", type=Path, help="weights to start from")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    model: Any = make_model(tokenizer, args)
    if args.init is not None:
        load(model, args.init)
    drawn = random.Random("dev")
    dev = [problem(a, b) for a, b in dict.fromkeys(draw(drawn, "dev", LATE) for _ in range(96))]
    checked = [(q, lesson_of(q, tokenizer)) for q in dev]
    print(f"{len(dev)} dev problems", flush=True)
    clock = Clock(args)

    def weights() -> tuple[float, ...]:
        share = clock.ramped
        return tuple(e + (late - e) * share for e, late in zip(EARLY, LATE, strict=True))

    train(
        model,
        batches(random.Random(args.seed), tokenizer, args.rows, weights, args.drills),
        args,
        clock,
        counts=lambda tokens, examples: {"examples": examples, "rows": tokens},
        check=lambda: check(model, tokenizer, checked, show=4),
    )
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
