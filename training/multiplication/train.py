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
from training.layout import FORKED, IGNORE, PLAIN, Layout, thread_layout
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
    model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        max_new_tokens=512,
    )
    return model


def layout_of(question: Problem, tokenizer: Any) -> Layout:
    prompt = tokenizer(question.prompt)["input_ids"]
    return thread_layout(prompt, question.items, tokenizer, eos_id=tokenizer.eos_token_id)


def drill_layout(rng: random.Random, tokenizer: Any) -> Layout:
    """A drill as a chain of rows: columns with loss on their sums, or the beginning of an answer and of a thread with
    loss on what the model writes, or a join with loss on all of it."""
    kind = rng.random()
    if kind < 0.4:
        size, count = rng.randint(4, 8), rng.randint(2, 4)
        text, _ = columns([[rng.randrange(10) for _ in range(size)] for _ in range(count)])
        ids = tokenizer("<bos></Parallel>" + text, add_special_tokens=False)["input_ids"]
        placed = [len(token) > 1 and token[0] in PLACES for token in tokenizer.convert_ids_to_tokens(ids)]
        targets = [t if yes else IGNORE for t, yes in zip(ids[1:], placed[1:], strict=True)] + [IGNORE]
    elif kind < 0.75:
        question = problem(*draw(rng, "train", LATE, zeros=0.6))
        parts = [("", f"<bos>{question.prompt}")]
        if question.threads:
            name, text = rng.choice(question.items[1])  # type: ignore[arg-type]
            parts += [(question.items[0], ""), ("", ThreadWeaver().header.replace("{id}", name))]
        else:
            text = question.items[0]
        parts.append((text[: text.index(";") + 1], ""))
        ids, targets = [], []
        for learnt, given in parts:
            new = tokenizer(learnt + given, add_special_tokens=False)["input_ids"]
            targets += new if learnt else [IGNORE] * len(new)
            ids += new
        targets = [*targets[1:], IGNORE]
    else:
        given, said = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in drill(rng))
        ids = [tokenizer.bos_token_id, *given, *said]
        targets = [IGNORE] * len(given) + [*said, tokenizer.eos_token_id]
    return Layout(ids, list(range(-1, len(ids) - 1)), list(range(len(ids))), targets, [0] * len(ids))


def beside(first: Layout, second: Layout) -> Layout:
    """Two examples in one, neither in sight of the other."""
    at = len(first.token_ids)
    return Layout(
        first.token_ids + second.token_ids,
        first.parents + [p + at if p >= 0 else p for p in second.parents],
        first.positions + second.positions,
        first.targets + second.targets,
        first.written + second.written,
    )


def collate(layouts: list[Layout]) -> dict[str, torch.Tensor]:
    """Padded [B, T] tensors and the additive mask [B, 1, T, T]; padding sees itself alone and has no loss."""
    size = max(len(x.token_ids) for x in layouts)
    ids, positions, written = (np.zeros((len(layouts), size), dtype=np.int64) for _ in range(3))
    targets = np.full((len(layouts), size), IGNORE, dtype=np.int64)
    allowed = np.tile(np.eye(size, dtype=bool), (len(layouts), 1, 1))
    for i, x in enumerate(layouts):
        n = len(x.token_ids)
        ids[i, :n], positions[i, :n], targets[i, :n], written[i, :n] = x.token_ids, x.positions, x.targets, x.written
        allowed[i, :n, :n] = x.mask()
    mask = torch.zeros(allowed.shape).masked_fill_(~torch.from_numpy(allowed), -1e9)[:, None]
    tensors = {"ids": ids, "positions": positions, "targets": targets, "written": written}
    return {name: torch.from_numpy(value) for name, value in tensors.items()} | {"mask": mask}


def logits_of(model: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, vocabulary] at the N rows that have a target, and the targets."""
    hidden = model.model(
        input_ids=batch["ids"], position_ids=batch["positions"], attention_mask=batch["mask"], use_cache=False
    ).last_hidden_state
    rows = batch["targets"] != IGNORE
    return model.lm_head(hidden[rows]), batch["targets"][rows]


def batches(rng: random.Random, tokenizer: Any, rows: int, weights: Any, drills: float) -> Any:
    """Endless batches of about `rows` padded rows, examples of like length together, with drills beside them."""
    while True:
        now = weights()
        pool = []
        for _ in range(96):
            x = layout_of(problem(*draw(rng, "train", now, zeros=0.35)), tokenizer)
            for _ in range(int(drills + rng.random())):
                x = beside(x, drill_layout(rng, tokenizer))
            pool.append(x)
        pool.sort(key=lambda x: len(x.token_ids))
        ready: list[list[Layout]] = [[]]
        for x in pool:
            if ready[-1] and len(x.token_ids) * (len(ready[-1]) + 1) > rows:
                ready.append([])
            ready[-1].append(x)
        rng.shuffle(ready)
        yield from ready


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
def check(model: LlamaForCausalLM, tokenizer: Any, dev: list[tuple[Problem, Layout]], show: int = 0) -> dict[str, Any]:
    """Shares of dev problems right; wrong rows by skill, each a share of those rows."""
    model.eval()
    right: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    good: Counter[str] = Counter()
    for at in range(0, len(dev), 8):
        part = dev[at : at + 8]
        batch = collate([x for _, x in part])
        logits, targets = logits_of(model, batch)
        miss = torch.zeros_like(batch["targets"], dtype=torch.bool)
        guess = torch.zeros_like(batch["targets"])
        rows = batch["targets"] != IGNORE
        guess[rows] = logits.argmax(-1)
        miss[rows] = logits.argmax(-1) != targets
        for i, (question, x) in enumerate(part):
            forked = not (miss[i] & (batch["written"][i] & FORKED > 0)).any()
            plain = not (miss[i] & (batch["written"][i] & PLAIN > 0)).any()
            right["forked"] += forked
            right["plain"] += plain
            size = f"{len(str(question.a))}x{len(str(question.b))}"
            sizes[size] += 1
            good[size] += forked
            for row in torch.nonzero(miss[i]).flatten().tolist():
                path, up = [], row
                while up >= 0:
                    path.append(x.token_ids[up])
                    up = x.parents[up]
                text, target = tokenizer.decode(path[::-1]), tokenizer.decode([x.targets[row]])
                wrong[part_of(text, target)] += 1
                if show > 0:
                    show -= 1
                    print(f"   {text[:12]}…{text[-40:]!r} wants {target!r}, got {tokenizer.decode([guess[i, row]])!r}")
            seen["rows"] += int(rows[i].sum())
    model.train()
    out = {name: right[name] / len(dev) for name in ("forked", "plain")}
    return out | {
        "rows_wrong": sum(wrong.values()) / seen["rows"],
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
    parser.add_argument("--rows", type=int, default=3000, help="rows of a batch")
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
    checked = [(q, layout_of(q, tokenizer)) for q in dev]
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
    for layouts in batches(rng, tokenizer, args.rows, weights, args.drills):
        if falls_at > now() and (args.out / "decay").exists():
            falls_at, ends_at = now(), now() + total * args.decay
        factor = min(1.0, (step + 1) / 50, max(0.0, (ends_at - now()) / (ends_at - falls_at)))
        batch = collate(layouts)
        logits, targets = logits_of(model, batch)
        loss = F.cross_entropy(logits, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step(args.lr * factor, 0.01)
        for group in adam.param_groups:
            group["lr"] = args.adam_lr * factor
        adam.step()
        model.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        step, rows, examples = step + 1, rows + sum(len(x.token_ids) for x in layouts), examples + len(layouts)
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
