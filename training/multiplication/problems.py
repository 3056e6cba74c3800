"""Held-out problems for ``anabranch eval``: ``python -m training.multiplication.problems`` writes problems.jsonl."""

from __future__ import annotations

import json
import random
from pathlib import Path

from training.multiplication.traces import draw, problem

PROBLEMS = Path(__file__).with_name("problems.jsonl")
COUNT = 600


def main() -> None:
    """Write it anew: distinct problems of the test split, one JSON object a line; a family is the operands' lengths."""
    rng = random.Random("test")
    pairs: dict[tuple[int, int], None] = {}
    while len(pairs) < COUNT:
        pairs[draw(rng, "test")] = None
    lines = []
    for a, b in pairs:
        question = problem(a, b)
        line = {"prompt": f"{a} * {b}", "answer": question.answer, "threads": question.threads}
        lines.append(json.dumps(line | {"family": f"{len(str(a))}x{len(str(b))}"}))
    PROBLEMS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
