"""Problems and score card of the adaptive SmolLM2.

    python -m training.adaptive.score write                         training/adaptive/problems.jsonl anew
    python -m training.adaptive.score write --wider                 problems_wider.jsonl: the families of wider.py
    python -m training.adaptive.score run --save results.json       the card: forked, sequential, plain, wall clock
    python -m training.adaptive.score run --model smollm2           the stock model on the same problems

As ``anabranch eval``, but the two families of reasoning-gym are scored by its own verifiers.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from anabranch.cli import evaluate as cli
from anabranch.evaluation.evaluate import Problem, final_answer, is_right

FILE = Path(__file__).with_name("problems.jsonl")
FILE_WIDER = FILE.with_name("problems_wider.jsonl")
RG = {"legs": "leg_counting", "sums": "chain_sum"}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__, rich_markup_mode="rich")


@app.command()
def write(
    count: int = 440, file: Path | None = None, split: str = "test", seed: int = 0, wider: bool = False
) -> None:  # fmt: skip
    """Write unique held-out problems, one JSON object a line: of the five families, or of those in wider.py."""
    from .families import MAKERS, problems
    from .wider import WIDER

    makers = WIDER if wider else MAKERS
    with (file or (FILE_WIDER if wider else FILE)).open("w", encoding="utf-8") as out:
        for p in itertools.islice(problems(split, seed, makers, makers=makers), count):
            line: dict[str, Any] = {"prompt": p.prompt, "answer": p.answer, "threads": p.threads, "family": p.family,
                                    "parts": len(p.parts), "unseen_words": p.unseen_words}  # fmt: skip
            if p.entries:
                line["answers"] = [e["answer"] for e in p.entries]
            out.write(json.dumps(line, ensure_ascii=False) + "\n")


def verified(problem: Problem, text: str) -> bool:
    """reasoning-gym's verdict on each part of its families (all must be right); ours on the others."""
    answers = problem.more.get("answers")
    if problem.family not in RG or answers is None:
        return is_right(text, problem.answer)
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(RG[problem.family], size=1)
    given = final_answer(text)[0].strip().rstrip(".")
    parts = [piece.strip() for piece in given.split(",")]
    if len(answers) > 1:  # "A 57, B 12"
        letters = [piece.split(" ")[0] for piece in parts]
        if letters != list("ABCDEF")[: len(answers)]:
            return False
        parts = [piece.partition(" ")[2] for piece in parts]
    return len(parts) == len(answers) and all(
        dataset.score_answer(answer=part, entry={"answer": answer, "metadata": {}}) == 1.0
        for part, answer in zip(parts, answers, strict=True)
    )


@app.command()
def run(
    model: Annotated[str, typer.Option(help="A model's name or a folder.")] = "smollm2-adaptive",
    file: Path = FILE,
    mode: Annotated[
        list[str] | None, typer.Option(help="forked, sequential, plain; default all the model can.")
    ] = None,
    batch: int = 16,
    timed: Annotated[int, typer.Option(help="Problems timed one by one.")] = 60,
    limit: int | None = None,
    dtype: str = "auto",
    save: Path | None = None,
    max_new_tokens: int = 700,
) -> None:
    """Score a model on the problem file."""
    cli.run(
        cli.Options(
            problems=file, model=model, modes=tuple(mode or ()), limit=limit, batch=batch, timed=timed,
            max_new_tokens=max_new_tokens, save=save, dtype=dtype,
        ),
        verified,
    )  # fmt: skip


if __name__ == "__main__":
    app()
