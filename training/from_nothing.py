"""What the models made from nothing have in common: a small Llama, Muon for its matrices and AdamW for the rest, and
a rate that is constant and then falls to zero; a file ``decay`` in the output folder starts that at once.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from anabranch.training import Layout


def options(about: str | None, minutes: float, decay: float, ramp: float, every: float) -> argparse.ArgumentParser:
    """The command line that their trainers share, with the defaults that differ."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--out", type=Path, required=True, help="folder for log.jsonl and the model")
    parser.add_argument("--minutes", type=float, default=minutes)
    parser.add_argument("--decay", type=float, default=decay, help="share of the time in which the rate falls")
    parser.add_argument("--ramp", type=float, default=ramp, help="share of the time in which problems grow")
    parser.add_argument("--lr", type=float, default=0.02, help="of the matrices (Muon)")
    parser.add_argument("--adam-lr", type=float, default=0.004, help="of the rest (AdamW)")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--every", type=float, default=every, help="seconds between checks")
    parser.add_argument("--seed", type=int, default=0)
    return parser


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


def make_model(tokenizer: Any, args: argparse.Namespace) -> LlamaForCausalLM:
    """A small Llama with random weights; args: width, layers, heads and hidden of `options`."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.width,
        intermediate_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
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


def load(model: Any, folder: Path) -> None:
    """The weights of a folder that a trainer wrote."""
    model.load_state_dict(load_file(folder / "model.safetensors"))


def logits_of(model: Any, row: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, vocabulary] for the N tokens with loss, and those tokens."""
    batch = row.batch()
    targets, _ = batch.pop("shift_labels")[0], batch.pop("labels")
    return model(**batch, use_cache=False).logits[0], targets


class Clock:
    """How far training has come, by the time since this was made; args: minutes, decay, ramp and out of `options`."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._start, self._total, self._ramp = time.monotonic(), args.minutes * 60, args.ramp
        self._falling, self._file = self._total * args.decay, args.out / "decay"
        self._falls_at, self._ends_at = self._total - self._falling, self._total

    def now(self) -> float:
        """Seconds."""
        return time.monotonic() - self._start

    @property
    def ramped(self) -> float:
        """From 0 to 1 in the share `ramp` of the time."""
        return min(1.0, self.now() / (self._total * self._ramp)) if self._ramp > 0 else 1.0

    @property
    def over(self) -> bool:
        return self.now() >= self._ends_at

    def rate(self, step: int) -> float:
        """Of the full learning rates, for a step counted from 0."""
        now = self.now()
        if self._falls_at > now and self._file.exists():
            self._falls_at, self._ends_at = now, now + self._falling
        return min(1.0, (step + 1) / 50, max(0.0, (self._ends_at - now) / (self._ends_at - self._falls_at)))


def train(
    model: Any,
    batches: Iterable[list[Layout]],
    args: argparse.Namespace,
    clock: Clock,
    counts: Callable[[int, int], dict[str, Any]],
    check: Callable[[], dict[str, Any]],
    autocast: bool = False,
) -> None:
    """Trains until the clock says so; writes log.jsonl, and the model with each of its lines.

    counts: what a line tells of (tokens, rows) so far. check: what it tells of the model. autocast: matrix products in
        bfloat16.
    """
    matrices = [w for n, w in model.named_parameters() if w.ndim == 2 and "layers" in n]
    rest = [w for n, w in model.named_parameters() if not (w.ndim == 2 and "layers" in n)]
    muon, adam = Muon(matrices), torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, foreach=True)
    print(f"{sum(w.numel() for w in model.parameters())} parameters", flush=True)
    step = tokens = rows = 0
    checked_at, losses = 0.0, []
    model.train()
    with open(args.out / "log.jsonl", "a") as log:
        for batch in batches:
            factor = clock.rate(step)
            packed = Layout.pack(batch)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits, targets = logits_of(model, packed)
            loss = F.cross_entropy(logits.float(), targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                muon.step(args.lr * factor, 0.01)
            for group in adam.param_groups:
                group["lr"] = args.adam_lr * factor
            adam.step()
            model.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
            step, tokens, rows = step + 1, tokens + packed.num_tokens, rows + len(batch)
            over = clock.over
            if over or clock.now() - checked_at >= args.every:
                line = {"step": step, "minutes": round(clock.now() / 60, 2), **counts(tokens, rows)}
                line |= {"loss": round(float(np.mean(losses)), 5), "rate": round(factor, 3), **check()}
                checked_at, losses = clock.now(), []
                print(json.dumps(line), file=log, flush=True)
                print(json.dumps(line), flush=True)
                model.save_pretrained(args.out)
            if over:
                break
