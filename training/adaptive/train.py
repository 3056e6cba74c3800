"""Teach SmolLM2-135M-Instruct to fork: LoRA on every linear layer and the eight tags' embedding rows.

    python -m training.adaptive.ordinary answers --out runs/ordinary
    python -m training.adaptive.train --minutes 100 --out runs/adaptive --ordinary runs/ordinary

On a worked problem the loss is cross entropy. On an ordinary question it is the divergence from the stock model, which
is the same model with the adapter switched off: what it could do before it keeps.

The learning rate follows the clock: warm-up, flat, then down to nothing over the last --down of it, so that a run ends
when it was meant to. Ctrl-C saves; --resume goes on. log.jsonl has a line a minute, and a line a check on held-out
problems.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from safetensors.torch import load_file, save_file

import anabranch as ab
from anabranch.models.adaptive import TAG_ROWS
from anabranch.training import Layout

from .families import Problem, problems
from .text import TAG_IDS, TEMPLATE, Answered, closing, lesson_of, ordinary_lesson, read_answers
from .text import tokenizer as adaptive_tokenizer
from .wider import ALL

PLAIN_WEIGHT = 0.6  # of what only plain decoding writes: headers, and threads in sight of the earlier ones
ASKED_WEIGHT = 0.5  # of an ordinary chat's own tokens: they are read already, and a drift shows in them as well
JOIN_WEIGHT = 2.0  # of what is written after the join: few tokens, and each of them counts
LONGEST_STEP = 20.0  # seconds: a process that was stopped for a while (kill -STOP) goes on with its schedule


@dataclass(frozen=True)
class Example:
    """A row, and what each token with loss weighs; the targets are `row.learnt`, in order.

    weights: float32 [targets]. forked: bool [targets], those that the model writes in a forked run. kept: an ordinary
    question, which the stock model teaches.
    """

    family: str
    row: Layout
    weights: torch.Tensor
    forked: torch.Tensor
    kept: bool = False

    def __len__(self) -> int:
        return self.row.num_tokens


def example(problem: Problem, tokenizer: Any) -> Example:
    made = lesson_of(problem, tokenizer)
    learnt = made.row.learnt
    forked = made.forked[learnt]
    weights = torch.where(forked, 1.0, PLAIN_WEIGHT)
    if problem.threads:
        join = len(tokenizer(closing(problem), add_special_tokens=False)["input_ids"])
        ends = int(made.plain.nonzero()[-1]) + 1  # of the flat answer
        weights[(learnt >= ends - join) & (learnt < ends)] *= JOIN_WEIGHT
    return Example(problem.family, made.row, weights, forked)


def ordinary_example(answered: Answered, tokenizer: Any) -> Example:
    """The stock model is followed in what it answers and in what it expects of the chat before."""
    row = ordinary_lesson(answered, tokenizer).row
    asked = len(row.input_ids) - len(row.learnt)
    whole = replace(row, written=torch.ones(len(row.input_ids), dtype=torch.bool), labels=None)
    answer = whole.learnt >= asked
    return Example("ordinary", whole, torch.where(answer, 1.0, ASKED_WEIGHT), answer, kept=True)


class LoRA(torch.nn.Module):
    """A frozen linear layer plus scale · B A (Hu et al. 2021); `on` False: the layer alone."""

    def __init__(self, base: torch.nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.weight = base.weight
        self.scale = alpha / rank
        self.a = torch.nn.Parameter(torch.randn(rank, base.in_features) / math.sqrt(base.in_features))
        self.b = torch.nn.Parameter(torch.zeros(base.out_features, rank))
        self.on = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.on:
            return F.linear(x, self.weight)
        return F.linear(x, self.weight) + F.linear(F.linear(x, self.a), self.b * self.scale)


class Student(torch.nn.Module):
    """SmolLM2 with adapters; the loss is taken where there is one, over the tokens of the data and some others."""

    def __init__(self, rank: int, alpha: float, autocast: bool = False):
        super().__init__()
        self.autocast = autocast
        self.model, _ = ab.models.load("smollm2", dtype=torch.float32, attn_implementation="anabranch")
        self.model.requires_grad_(False)
        kind = torch.bfloat16 if autocast else torch.float32  # as they are stored: nothing is lost, nothing cast a step
        self.rank, self.alpha = rank, alpha
        self.loras: dict[str, LoRA] = {}
        for name, module in list(self.model.model.named_modules()):
            if isinstance(module, torch.nn.Linear):
                parent, _, leaf = name.rpartition(".")
                lora = LoRA(module.to(kind), rank, alpha)
                setattr(self.model.model.get_submodule(parent), leaf, lora)
                self.loras[name] = lora
        embedding = self.model.model.embed_tokens.weight
        ids = torch.tensor(list(TAG_IDS.values()))
        self.register_buffer("tag_ids", ids)
        self.register_buffer("head", embedding.to(kind), persistent=False)
        self.tags = torch.nn.Parameter(embedding.mean(0) + 0.02 * torch.randn(len(ids), embedding.shape[1]))
        self.register_buffer("row_of", torch.full((embedding.shape[0],), -1))
        self.row_of[ids] = torch.arange(len(ids))

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self.row_of[ids]
        return torch.where(
            (rows >= 0)[..., None], self.tags[rows.clamp_min(0)], self.model.model.embed_tokens.weight[ids]
        )

    def hidden(self, batch: dict[str, Any]) -> torch.Tensor:
        """Last hidden states [targets, width] of the rows that predict the targets."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            out = self.model.model(
                inputs_embeds=self.embed(batch["input_ids"]),
                position_ids=batch["position_ids"],
                branch_mask=batch["branch_mask"],
                use_cache=False,
            )
            return out.last_hidden_state[0, batch["logits_to_keep"]]

    def scores(self, hidden: torch.Tensor, vocabulary: torch.Tensor) -> torch.Tensor:
        """float32 [targets, len(vocabulary)]."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return F.linear(hidden, self.embed(vocabulary)).float()

    def forward(self, batch: dict[str, Any], vocabulary: torch.Tensor) -> torch.Tensor:
        """Scores [targets, len(vocabulary)]."""
        return self.scores(self.hidden(batch), vocabulary)

    def all_scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [targets, whole vocabulary]."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            of_tags = F.linear(hidden, self.tags).float()
            return F.linear(hidden, self.head).float().index_copy(1, self.tag_ids, of_tags)

    @torch.no_grad()
    def stock_scores(self, batch: dict[str, Any]) -> torch.Tensor:
        """Scores [targets, whole vocabulary] of the stock model; the rows must be free of tags."""
        for lora in self.loras.values():
            lora.on = False
        try:
            hidden = self.hidden(batch)
        finally:
            for lora in self.loras.values():
                lora.on = True
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return F.linear(hidden, self.head).float()

    def begin_from(self, path: Path) -> None:
        """The weights of a state.pt, or of an adapter (a folder, such as the package's data/smollm2_adaptive)."""
        if path.is_file():
            self.load_state_dict(torch.load(path, weights_only=True)["student"], strict=False)
            return
        weights = load_file(path / "adapter_model.safetensors")
        with torch.no_grad():
            self.tags.copy_(weights[TAG_ROWS])
            for name, lora in self.loras.items():
                lora.a.copy_(weights[f"base_model.model.model.{name}.lora_A.weight"])
                lora.b.copy_(weights[f"base_model.model.model.{name}.lora_B.weight"])

    def adapter(self) -> dict[str, torch.Tensor]:
        """As peft names them, in bfloat16."""
        out = {TAG_ROWS: self.tags}
        for name, lora in self.loras.items():
            out[f"base_model.model.model.{name}.lora_A.weight"] = lora.a
            out[f"base_model.model.model.{name}.lora_B.weight"] = lora.b
        return {k: v.detach().to(torch.bfloat16).contiguous() for k, v in out.items()}


def collate(examples: list[Example]) -> dict[str, Any]:
    """Several problems in one row, each blind to the others."""
    return {
        **Layout.pack(one.row for one in examples).batch(),
        "weight": torch.cat([one.weights for one in examples]),
        "forked": torch.cat([one.forked for one in examples]),
        "kept": torch.cat([torch.full_like(one.forked, one.kept) for one in examples]),
    }


def batches(examples: list[Example], tokens: int, rng: random.Random) -> list[list[Example]]:
    """About `tokens` tokens each, in random order."""
    order = rng.sample(examples, len(examples))
    out: list[list[Example]] = [[]]
    for one in order:
        if out[-1] and sum(map(len, out[-1])) + len(one) / 2 > tokens:
            out.append([])
        out[-1].append(one)
    return out


def divergence(student: Student, hidden: torch.Tensor, examples: list[Example]) -> torch.Tensor:
    """KL [targets] of the student from the stock model, over the whole vocabulary; `examples` are ordinary ones."""
    before = student.stock_scores(collate(examples)).log_softmax(-1)
    after = student.all_scores(hidden).log_softmax(-1)
    return F.kl_div(after, before, reduction="none", log_target=True).sum(-1)


def loss_of(student: Student, examples: list[Example], vocabulary: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """The loss of one packed row, and the mean of either kind in it (NaN where there is none).

    vocabulary: sorted; the tokens over which the problems' softmax runs.
    """
    batch = collate(examples)
    hidden, kept, weight = student.hidden(batch), batch["kept"], batch["weight"]
    each = torch.zeros(len(kept))
    if not kept.all():
        targets = torch.searchsorted(vocabulary, batch["shift_labels"][0][~kept])
        each[~kept] = F.cross_entropy(student.scores(hidden[~kept], vocabulary), targets, reduction="none")
    if kept.any():
        each[kept] = divergence(student, hidden[kept], [one for one in examples if one.kept])
    told = {"problems": each[~kept].mean().item(), "ordinary": each[kept & batch["forked"]].mean().item()}
    return (each * weight).sum() / weight.sum(), told


@torch.no_grad()
def check(student: Student, dev: list[Example]) -> dict[str, Any]:
    """Share of dev problems whose answer comes out token for token when decoded greedily, forked and plain; of ordinary
    questions the same against the stock model's answer, and the divergence from it in nats a token.

    Given the right tokens so far each next one must be the best: that is what greedy decoding needs, to the token.
    """
    student.eval()
    forked: dict[str, list[bool]] = {}
    plain: list[bool] = []
    same: list[bool] = []
    apart: list[float] = []
    wrong = {"join": 0, "else": 0}
    for one in dev:
        batch = collate([one])
        hidden = student.hidden(batch)
        ok = student.all_scores(hidden).argmax(-1) == batch["shift_labels"][0]
        if one.kept:
            same.append(bool(ok[batch["forked"]].all()))
            apart += divergence(student, hidden, [one])[batch["forked"]].tolist()
            continue
        forked.setdefault(one.family, []).append(bool(ok[batch["forked"]].all()))
        plain.append(bool(ok.all()))
        for w in batch["weight"][~ok & batch["forked"]].tolist():
            wrong["join" if w > 1 else "else"] += 1
    student.train()
    return {
        "forked_exact": round(float(np.mean([x for v in forked.values() for x in v])), 4),
        "plain_exact": round(float(np.mean(plain)), 4),
        "by_family": {f: round(float(np.mean(v)), 3) for f, v in sorted(forked.items())},
        "wrong_tokens": wrong,
        **({"ordinary_exact": round(float(np.mean(same)), 4), "ordinary_kl": round(float(np.mean(apart)), 5)} if same
           else {}),
    }  # fmt: skip


def rate(progress: float, peak: float, down: float, warm: float = 0.01) -> float:
    if progress < warm:
        return peak * progress / warm
    return peak if progress < 1 - down else peak * max(0.02, (1 - progress) / down)


def main(
    out: Annotated[Path, typer.Option(help="Folder for adapter, log and state.")] = Path("runs/adaptive"),
    minutes: Annotated[float, typer.Option(help="How long to train; the schedule follows the clock.")] = 100.0,
    tokens: Annotated[int, typer.Option(help="Padded tokens a step.")] = 1024,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 8e-4,
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 16,
    count: Annotated[int, typer.Option(help="Training problems; more than one pass only if time is left.")] = 8000,
    threads: Annotated[int, typer.Option(help="torch's threads.")] = 2,
    drills: Annotated[float, typer.Option(help="Share of rows that are additions alone.")] = 0.25,
    down: Annotated[float, typer.Option(help="Share of the time in which the learning rate falls to nothing.")] = 0.9,
    autocast: Annotated[
        bool, typer.Option(help="Matrix products in bfloat16: 1.6 x as fast on a CPU with AVX512-BF16, slow on others.")
    ] = False,
    start: Annotated[
        Path | None, typer.Option(help="A state.pt or an adapter's folder to begin from, with a new schedule.")
    ] = None,
    ordinary: Annotated[
        Path | None, typer.Option(help="Folder with the stock model's answers, see ordinary.py; None: problems alone.")
    ] = None,
    ordinary_share: Annotated[float, typer.Option(help="Share of rows that are ordinary questions.")] = 0.5,
    check_minutes: Annotated[float, typer.Option(help="Minutes between checks on dev problems.")] = 12.0,
    seed: int = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the state saved in --out.")] = False,
) -> None:
    """Train; see the module's docstring."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = adaptive_tokenizer()
    drawn = problems("train", seed, ALL, drills=drills, makers=ALL)
    made = [example(p, tokenizer) for p in itertools.islice(drawn, count)]
    dev = [example(p, tokenizer) for p in itertools.islice(problems("dev", seed, ALL, makers=ALL), 48)]
    used = torch.tensor(sorted({t for one in made for t in one.row.input_ids.tolist()}))
    if ordinary is not None:
        answered = [ordinary_example(one, tokenizer) for one in read_answers(ordinary / "train.jsonl")]
        rows = round(count * ordinary_share / (1 - ordinary_share))
        made += itertools.islice(itertools.cycle(answered), rows)
        dev += [ordinary_example(one, tokenizer) for one in read_answers(ordinary / "dev.jsonl")[:32]]
    student = Student(rank, alpha=2.0 * rank, autocast=autocast)
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    spent, step = 0.0, 0
    if start is not None:
        student.begin_from(start)
    if resume:
        state = torch.load(out / "state.pt", weights_only=True)
        student.load_state_dict(state["student"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        spent, step = state["spent"], state["step"]
    for ending in (signal.SIGINT, signal.SIGTERM):  # also where a shell left them ignored: what was learnt is saved
        signal.signal(ending, signal.default_int_handler)
    log = (out / "log.jsonl").open("a")

    def note(**facts: Any) -> None:
        log.write(json.dumps(facts) + "\n")
        log.flush()
        print(facts, flush=True)

    def save() -> None:
        own = {k: v for k, v in student.state_dict().items() if k == "tags" or k.endswith((".a", ".b"))}
        state = {"student": own, "optimizer": optimizer.state_dict(), "spent": spent, "step": step}
        torch.save(state, out / "state.partial")
        (out / "state.partial").replace(out / "state.pt")
        save_file(student.adapter(), out / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "base_model": "SmolLM2-135M-Instruct",
                  "target_modules": sorted({n.rpartition(".")[2] for n in student.loras}), "tag_ids": TAG_IDS,
                  "chat_template": TEMPLATE}  # fmt: skip
        (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")

    note(parameters=sum(p.numel() for p in parameters), problems=len(made), vocabulary=len(used),
         mean_tokens=float(np.mean([len(x) for x in made])), families=list(ALL), lr=lr, rank=rank,
         tokens=tokens, drills=drills, down=down, autocast=autocast,
         ordinary=sum(one.kept for one in made))  # fmt: skip
    rng = random.Random(seed + step)
    todo: list[list[Example]] = []
    last = last_note = last_check = time.monotonic()
    seen, losses, kinds = 0, [], []
    try:
        while spent < minutes * 60:
            todo = todo or batches(made, tokens, rng)
            examples = todo.pop()
            # Tokens that the data never have must stay unlikely: some of them take part in every step.
            others = torch.randint(0, student.row_of.shape[0], (2048,))
            loss, told = loss_of(student, examples, torch.unique(torch.cat([used, others])))
            for group in optimizer.param_groups:
                group["lr"] = rate(spent / (minutes * 60), lr, down)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            step += 1
            seen += sum(map(len, examples))
            losses.append(loss.item())
            kinds.append(list(told.values()))
            now = time.monotonic()
            spent += min(now - last, LONGEST_STEP)
            last = now
            if now - last_note > 60:
                means = dict(zip(told, np.nanmean(kinds, axis=0).round(4).tolist(), strict=True))
                note(step=step, minutes=round(spent / 60, 2), loss=round(float(np.mean(losses)), 4), **means,
                     tokens_per_s=round(seen / (now - last_note)),
                     lr=optimizer.param_groups[0]["lr"])  # fmt: skip
                last_note, seen, losses, kinds = now, 0, [], []
            if now - last_check > check_minutes * 60:
                save()
                note(step=step, minutes=round(spent / 60, 2), **check(student, dev))
                last = last_check = last_note = time.monotonic()
    finally:
        save()
    note(step=step, minutes=round(spent / 60, 2), final=True, **check(student, dev))


if __name__ == "__main__":
    typer.run(main)
