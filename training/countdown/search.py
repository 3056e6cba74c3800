"""Countdown: reach a target with all of 3 or 4 numbers; problems, their split, and the search that finds an answer.

Each number is used once; each step takes two numbers and puts the result of ``+ - * /`` in their place. Numbers, steps'
results and targets are whole and from 1 to 30. The larger operand stands first; steps that change nothing (times or
divided by 1) are left out.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

LARGEST = 30  # of all numbers
DRAWN = (1, 20)  # the numbers that a problem gives
TARGETS = (10, LARGEST)
HELD_OUT = 20  # one problem in so many is for dev, one for test
STEP = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")


@dataclass(frozen=True)
class Problem:
    """Reach `target` with all of `numbers`."""

    numbers: tuple[int, ...]
    target: int


@dataclass(frozen=True)
class Step:
    """``a op b = value``; `rest`: the numbers that are left then, the result last."""

    a: int
    op: str
    b: int
    value: int
    rest: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.a}{self.op}{self.b}={self.value}"


def combine(x: int, y: int) -> list[tuple[str, int]]:
    """What two numbers make: (operator, result), in the order in which a search tries them."""
    a, b = max(x, y), min(x, y)
    made = [("+", a + b), ("-", a - b)]
    if b > 1:
        made += [("*", a * b)] + ([("/", a // b)] if a % b == 0 else [])
    return [(op, value) for op, value in made if 1 <= value <= LARGEST]


def steps(numbers: Sequence[int]) -> Iterator[Step]:
    """All first steps, pair by pair in the order of `numbers`."""
    for i, j in combinations(range(len(numbers)), 2):
        x, y = numbers[i], numbers[j]
        left = tuple(n for k, n in enumerate(numbers) if k not in (i, j))
        for op, value in combine(x, y):
            yield Step(max(x, y), op, min(x, y), value, (*left, value))


# ------------------------------------------------------------------------------------------------ problems


def split_of(problem: Problem) -> str:
    """One of "train", "dev" and "test", by a hash of the target and the numbers in any order."""
    digest = hashlib.sha256(f"{problem.target}:{sorted(problem.numbers)}".encode()).digest()
    return {0: "dev", 1: "test"}.get(int.from_bytes(digest[:4], "big") % HELD_OUT, "train")


def targets(numbers: Sequence[int]) -> dict[int, set[int]]:
    """What `numbers` (3 or more) can reach: target → which of their first steps, counted from 0, lead there."""
    found: dict[int, set[int]] = defaultdict(set)
    for i, step in enumerate(steps(numbers)):
        ends = [value for _, value in combine(*step.rest)] if len(step.rest) == 2 else targets(step.rest)
        for target in ends:
            found[target].add(i)
    return found


def draw(rng: random.Random, split: str, size: int, ways: int | None = None) -> Problem:
    """A problem of one split that has an answer; `size` numbers, 3 or more.

    ways: at most so many first steps lead to an answer, so that a search is long. None: the target is what random
        steps come to, which most often many ways lead to.
    """
    while True:
        numbers = tuple(rng.randint(*DRAWN) for _ in range(size))
        if ways is None:
            left = numbers
            while len(left) > 1:
                found = list(steps(left))
                left = rng.choice(found).rest if found else (0,)
            target = left[0]
        else:
            rare = sorted(t for t, first in targets(numbers).items() if len(first) <= ways)
            target = rng.choice(rare) if rare else 0
        problem = Problem(numbers, target)
        if TARGETS[0] <= target <= TARGETS[1] and target not in numbers and split_of(problem) == split:
            return problem


# ------------------------------------------------------------------------------------------------ verdict


def expression(path: str, problem: Problem) -> str | None:
    """The expression that a path of steps (``53-22=31, 31-4=27``) builds out of the problem's numbers.

    None for a path whose steps use a number that is not there, or are wrong; whether the expression reaches the target
    is `is_right`'s to say.
    """
    left = [(n, str(n)) for n in problem.numbers]
    for a, op, b, value in STEP.findall(path):
        taken = []
        for number in (int(a), int(b)):
            at = next((i for i, (n, _) in enumerate(left) if n == number), None)
            if at is None:
                return None
            taken.append(left.pop(at)[1])
        left.append((int(value), f"({taken[0]}{op}{taken[1]})"))
    return left[0][1] if len(left) == 1 else None


@cache
def _verifier() -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset("countdown", size=1)


def is_right(path: str | None, problem: Problem) -> bool:
    """reasoning-gym's verdict on a path: an expression that uses each number once and equals the target."""
    built = None if path is None else expression(path, problem)
    if built is None:
        return False
    metadata = {"numbers": list(problem.numbers), "target": problem.target}
    return bool(_verifier().score_answer(answer=built, entry={"metadata": metadata}) == 1.0)
