"""Trains the packaged multiplication model from nothing, on one core: ``python -m training.multiplication.train``.

Examples are made on the fly and never twice on purpose; problems of the dev and test splits are left out. The rate is
constant, then falls to zero over the last part of the time; a file ``decay`` in the output folder starts that at
once. Every line of log.jsonl is a check on held-out dev problems: a problem is right when the model prefers the right
token at each row that it writes itself, which is the same as greedy decoding getting the whole trace right.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from anabranch.strategies import ThreadWeaver
from anabranch.training import Layout, trie
from training.layout import Lesson, lesson
from training.multiplication.tokens import make_tokenizer
from training.multiplication.traces import PLACES, Problem, columns, draw, drill, problem

EARLY, LATE = (3.0, 4.0, 2.0, 1.0), (1.0, 2.0, 4.0, 10.0)  # weights of 1- to 4-digit operands


class Muon:
    """Momentum whose update is made orthogonal (Jordan et al. 2024), for the weight matrices, like shapes together."""

    def __init__(self, weights: list[torch.nn.Parameter], momentum: float = 0.95):
        shapes = sorted({tuple(w.shape) for w in weights})
        self.groups = [[w for w in weights if tuple(w.shape) == s] for s in shapes]
        self.state = [torch.zeros(len(g), *g[0].shape) for g in self.groups]
        self.momentum = momentum

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float) -> None:
        for group, buffer in zip(self.groups, self.state, strict=True):
            grad = torch.stack([w.grad for w in group])  # type: ignore[misc]
            buffer.lerp_(grad, 1 - self.momentum)
            update = orthogonal(grad.lerp_(buffer, self.momentum))
            rows, columns = update.shape[-2:]
            update *= -lr * max(1.0, rows / columns) ** 0.5
            for weight, change in zip(group, update, strict=True):
                weight.mul_(1 - lr * weight_decay).add_(change)


def orthogonal(x: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """About U Vᵀ of each matrix of a batch, by Newton-Schulz steps."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


def make_model(tokenizer: Any, width: int, layers: int, heads: int, hidden: int) -> LlamaForCausalLM:
    """A small Llama with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.02,
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation="anabranch")
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        max_new_tokens=512,
    )
    return model


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


def logits_of(model: LlamaForCausalLM, row: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, vocabulary] for the N tokens with loss, and those tokens."""
    batch = row.batch()
    targets, _ = batch.pop("shift_labels")[0], batch.pop("labels")
    return model(**batch, use_cache=False).logits[0], targets


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
def check(model: LlamaForCausalLM, tokenizer: Any, dev: list[tuple[Problem, Lesson]], show: int = 0) -> dict[str, Any]:
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for log.jsonl and the model")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--decay", type=float, default=0.4, help="share of the time in which the rate falls")
    parser.add_argument("--ramp", type=float, default=0.15, help="share of the time in which problems grow")
    parser.add_argument("--drills", type=float, default=1.0, help="drills beside each problem")
    parser.add_argument("--rows", type=int, default=3000, help="tokens of a batch")
    parser.add_argument("--lr", type=float, default=0.02, help="of the matrices (Muon)")
    parser.add_argument("--adam-lr", type=float, default=0.004, help="of the rest (AdamW)")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--every", type=float, default=60.0, help="seconds between checks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init", type=Path, help="weights to start from")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    model: Any = make_model(tokenizer, args.width, args.layers, args.heads, args.hidden)
    if args.init is not None:
        from safetensors.torch import load_file

        model.load_state_dict(load_file(args.init / "model.safetensors"))
    matrices = [w for n, w in model.named_parameters() if w.ndim == 2 and "layers" in n]
    rest = [w for n, w in model.named_parameters() if not (w.ndim == 2 and "layers" in n)]
    muon, adam = Muon(matrices), torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, foreach=True)
    drawn = random.Random("dev")
    dev = [problem(a, b) for a, b in dict.fromkeys(draw(drawn, "dev", LATE) for _ in range(96))]
    checked = [(q, lesson_of(q, tokenizer)) for q in dev]
    count = sum(w.numel() for w in model.parameters())
    print(f"{count} parameters, {len(dev)} dev problems", flush=True)

    start, total = time.monotonic(), args.minutes * 60
    falls_at, ends_at = total * (1 - args.decay), total

    def now() -> float:
        return time.monotonic() - start

    def weights() -> tuple[float, ...]:
        share = min(1.0, now() / (total * args.ramp)) if args.ramp > 0 else 1.0
        return tuple(e + (late - e) * share for e, late in zip(EARLY, LATE, strict=True))

    rng = random.Random(args.seed)
    step = rows = examples = 0
    checked_at, losses = 0.0, []
    log = open(args.out / "log.jsonl", "a")
    model.train()
    for batch in batches(rng, tokenizer, args.rows, weights, args.drills):
        if falls_at > now() and (args.out / "decay").exists():
            falls_at, ends_at = now(), now() + total * args.decay
        factor = min(1.0, (step + 1) / 50, max(0.0, (ends_at - now()) / (ends_at - falls_at)))
        row = Layout.pack(batch)
        logits, targets = logits_of(model, row)
        loss = F.cross_entropy(logits, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step(args.lr * factor, 0.01)
        for group in adam.param_groups:
            group["lr"] = args.adam_lr * factor
        adam.step()
        model.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        step, rows, examples = step + 1, rows + row.num_tokens, examples + len(batch)
        over = now() >= ends_at
        if over or now() - checked_at >= args.every:
            line = {
                "step": step,
                "minutes": round(now() / 60, 2),
                "examples": examples,
                "rows": rows,
                "loss": round(float(np.mean(losses)), 5),
                "rate": round(factor, 3),
            } | check(model, tokenizer, checked, show=4)
            checked_at, losses = now(), []
            print(json.dumps(line), file=log, flush=True)
            print(json.dumps(line), flush=True)
            model.save_pretrained(args.out)
        if over:
            break
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
