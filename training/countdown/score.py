"""Score card of a Countdown model: right answers within equal contexts, sub-searches against one serial search.

    python -m training.countdown.score runs/countdown --save card.json

Both ways run the same model under `ab.APR`; the prompt of the serial one begins with ``Sub Call Budget: 0``. Answers
are scored by reasoning-gym's verifier. One is found within a context of so many tokens when it is right and no thread
saw more than that: in greedy decoding, a limit there would have changed nothing before. Beside each share stands what
the written-out searches of training reach, which make no mistakes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import typer

import anabranch as ab
from anabranch.evaluation.evaluate import bootstrap, wilson
from training.countdown.problems import FILE, read
from training.countdown.search import Problem, is_right
from training.countdown.tokens import make_tokenizer
from training.countdown.traces import row, search
from training.countdown.train import LONGEST

CONTEXTS = (64, 96, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, LONGEST)
MODES = {"sub-searches": None, "serial": 0}  # the prompt's budget of calls


@dataclass(frozen=True)
class Run:
    """One problem in one way of running; the tokens are None for a written-out search."""

    right: bool
    longest_context: int
    threads: int
    malformed: bool = False
    total_tokens: int | None = None
    critical_path_tokens: int | None = None

    def within(self, context: int) -> bool:
        return self.right and self.longest_context <= context


def answered(engine: ab.Engine, problems: Sequence[Problem], budget: int | None, batch: int) -> Iterator[Run]:
    """Greedy answers, `batch` at a time; a search stops writing at a context of `LONGEST` tokens."""
    for begin in range(0, len(problems), batch):
        part = problems[begin : begin + batch]
        prompts = [ab.APR.prompt(p.target, p.numbers, budget) for p in part]
        room = LONGEST - max(len(engine.tokenizer(p)["input_ids"]) for p in prompts)
        strategy = ab.APR(call_tokens=room)
        results = engine.generate(prompts, strategy=strategy, max_new_tokens=2 * LONGEST, do_sample=False)
        for problem, result in zip(part, results, strict=True):
            m = result.metrics
            yield Run(is_right(result.answers, problem), m.longest_context, m.num_threads, bool(result.malformed),
                      m.total_tokens, m.critical_path_tokens)  # fmt: skip


def written_out(problem: Problem, serially: bool, tokenizer: Any) -> Run:
    """The search that training shows for a problem."""
    found = search(problem, serially)
    rows = [row(x, tokenizer) for x in (found, *found.children)]
    longest = max(int(x.position_ids.max()) + 1 for x in rows)
    return Run(found.path is not None, longest, len(found.children))


def shares(runs: Sequence[Run], perfect: Sequence[Run]) -> dict[str, Any]:
    """One family in one way of running, ready for JSON."""
    n = len(runs)
    right = sum(r.right for r in runs)
    return {
        "problems": n,
        "right": right,
        "accuracy": right / n,
        "accuracy_95": wilson(right, n),
        "threads_right": sum(r.threads == p.threads for r, p in zip(runs, perfect, strict=True)),
        "malformed": sum(r.malformed for r in runs),
        "total_tokens": mean(r.total_tokens or 0 for r in runs),
        "critical_path_tokens": mean(r.critical_path_tokens or 0 for r in runs),
        "longest_context": {
            "median": median(r.longest_context for r in runs), "max": max(r.longest_context for r in runs)
        },
        "within": {c: sum(r.within(c) for r in runs) / n for c in CONTEXTS},
        "written_out_within": {c: sum(r.within(c) for r in perfect) / n for c in CONTEXTS},
    }  # fmt: skip


def gap(ours: Sequence[Run], other: Sequence[Run], context: int) -> tuple[float, ...]:
    """How many more of the same problems `ours` finds within a context, as a share, with its 95 % interval."""
    pairs = [(float(a.within(context)), float(b.within(context))) for a, b in zip(ours, other, strict=True)]

    def more(drawn: Sequence[tuple[float, float]]) -> float:
        return mean(a - b for a, b in drawn)

    return (more(pairs), *(bootstrap(pairs, more) or ()))


def card(engine: ab.Engine, problems: list[tuple[str, Problem]], batch: int) -> dict[str, Any]:
    """Everything, ready for JSON."""
    tokenizer = make_tokenizer()
    only = [p for _, p in problems]
    runs: dict[str, list[Run]] = {}
    perfect: dict[str, list[Run]] = {}
    for mode, budget in MODES.items():
        perfect[mode] = [written_out(p, budget is not None, tokenizer) for p in only]
        runs[mode] = []
        for run in answered(engine, only, budget, batch):
            runs[mode].append(run)
            done = len(runs[mode])
            if done % batch == 0 or done == len(only):
                print(f"{mode}: {sum(r.right for r in runs[mode])} of {done} right", flush=True)
    out: dict[str, Any] = {"problems": len(only), "modes": {m: {} for m in MODES}, "gap_within": {}}
    for family in dict.fromkeys(f for f, _ in problems):
        at = [i for i, (f, _) in enumerate(problems) if f == family]
        of = {mode: ([runs[mode][i] for i in at], [perfect[mode][i] for i in at]) for mode in MODES}
        for mode in MODES:
            out["modes"][mode][family] = shares(*of[mode])
        out["gap_within"][family] = {c: gap(of["sub-searches"][0], of["serial"][0], c) for c in CONTEXTS}
    return out


def main(
    model: Annotated[Path, typer.Argument(help="Folder of a trained model.")],
    file: Annotated[Path, typer.Option(help="Problems, as training.countdown.problems writes them.")] = FILE,
    limit: Annotated[int | None, typer.Option(help="So many problems, evenly spaced.")] = None,
    batch: Annotated[int, typer.Option(help="Problems at a time.")] = 40,
    save: Annotated[Path | None, typer.Option(help="Where the card goes, as JSON.")] = None,
) -> None:
    """Score a model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ab.hf.register()
    weights = AutoModelForCausalLM.from_pretrained(model, attn_implementation="anabranch").eval()
    engine = ab.Engine(weights, AutoTokenizer.from_pretrained(model), num_pages=6000, compile=False)
    problems = read(file)
    if limit is not None:
        problems = [problems[i * len(problems) // limit] for i in range(min(limit, len(problems)))]
    result = card(engine, problems, batch) | {
        "parameters": sum(w.numel() for w in weights.parameters()),
        "dtype": str(weights.dtype).removeprefix("torch."),
    }
    for mode, families in result["modes"].items():
        for family, x in families.items():
            kept = ", ".join(f"{100 * x['within'][c]:.0f} % in {c}" for c in (256, 384, 512, LONGEST))
            print(f"{mode:>13}, {family}: {x['right']} of {x['problems']} right; {kept}")
    if save is not None:
        save.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
