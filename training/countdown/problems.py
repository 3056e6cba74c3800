"""The held-out problems: ``python -m training.countdown.problems`` writes problems.jsonl."""

from __future__ import annotations

import json
import random
from pathlib import Path

from anabranch.strategies import APR
from training.countdown.search import Problem, draw
from training.countdown.traces import search

FILE = Path(__file__).with_name("problems.jsonl")
# family → (how many, numbers, at most so many first steps that lead to an answer)
FAMILIES = {"4 numbers, hard": (200, 4, 2), "4 numbers, as drawn": (100, 4, None), "3 numbers": (100, 3, None)}


def read(file: Path = FILE) -> list[tuple[str, Problem]]:
    """(family, problem) of each line."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [(x["family"], Problem(tuple(x["numbers"]), x["target"])) for x in lines]


def main() -> None:
    """Write it anew: different problems of the test split; "threads" are the sub-searches that one calls for."""
    rng = random.Random("test")
    drawn: dict[Problem, str] = {}
    for family, (count, size, ways) in FAMILIES.items():
        while list(drawn.values()).count(family) < count:
            drawn.setdefault(draw(rng, "test", size, ways), family)
    with FILE.open("w", encoding="utf-8") as out:
        for problem, family in drawn.items():
            line = {"prompt": APR.prompt(problem.target, problem.numbers), "answer": str(problem.target)}
            line |= {"threads": len(search(problem).children), "family": family}
            print(json.dumps(line | {"numbers": problem.numbers, "target": problem.target}), file=out)


if __name__ == "__main__":
    main()
