"""Countdown searches written out: in APR's format, and the same search in one context; and their training rows.

A search of three numbers, alone or called, fits its context. ``6+2=8,11:+19-3`` is one of its lines: 6 + 2 makes 8,
which leaves it with the 11; their sum is 19, their difference 3. It ends with the target or after the last line
(everything but the prompt is the model's)::

    Moving to Node #0,1
    Current State: 30:[6, 2, 11], Operations: ['13-2=11']
    6+2=8,11:+19-3
    6-2=4,11:+15-7
    6*2=12,11:+23-1
    6/2=3,11:+14-8
    11+6=17,2:+19-15
    11-6=5,2:+7-3*10
    11+2=13,6:+19-7
    11-2=9,6:+15-3
    11*2=22,6:+28-16
    No solution found.                           or: Goal Reached, and the whole path with Goal Reached behind it

A search of four numbers writes every first step and calls a sub-search for each; `ab.APR` puts what they found in place
of the calls, and the model reads off the path::

    Exploring Operation: 13-2=11
    Generated Node #0,0: 30:[6, 2, 11] Operation: 13-2=11
    …
    <Calling Sub Searches>
    <Start Sub Search 0 at level 1> Moving to Node #0,0
    …
    <End Calling Sub Searches>

Told to make no calls (``Sub Call Budget: 0`` in front of the prompt), it goes through the first steps one after another
in the one context, each with the same lines below it, until it finds an answer: ``Exploring Operation: 13-2=11,
Resulting Numbers: [6, 2, 11]``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from anabranch.strategies import APR
from anabranch.strategies.calls.apr import CALLING, END_CALLING, END_RESULTS, GOAL, RESULTS
from anabranch.strategies.calls.countdown import State, begin_at
from anabranch.training import Layout, trie
from training.countdown.search import LARGEST, Problem, Step, combine, steps

FAILED = "\nNo solution found."
SMALL = 3  # numbers that a search tries by itself; with more it calls


@dataclass(frozen=True)
class Search:
    """One context: what the runtime begins it with, what the model writes, and the path that it finds.

    calls: where the model stops to call: what it wrote up to there is `written`, the block is `calls`; then `results`
    is the runtime's and `rest` the model's. Empty where it calls nobody.
    """

    prompt: str
    written: str
    path: str | None
    calls: str = ""
    results: str = ""
    rest: str = ""
    children: tuple[Search, ...] = ()


def ending(path: str | None) -> str:
    return FAILED if path is None else f"\n{GOAL}\n{path}"


def lines(numbers: Sequence[int], target: int, before: tuple[str, ...]) -> tuple[str, str | None]:
    """The lines of a search of three numbers up to an answer, and its path behind the steps `before`."""
    text = ""
    for step in steps(numbers):
        other, value = step.rest
        text += f"\n{step},{other}:"
        for op, reached in combine(other, value):
            text += f"{op}{reached}"
            if reached == target:
                last = Step(max(other, value), op, min(other, value), reached, (reached,))
                return text, ", ".join([*before, str(step), str(last)]) + f" {GOAL}"
    return text, None


def small(problem: Problem, node: str = "0", before: tuple[str, ...] = (), budget: int | None = None) -> Search:
    """A search of three numbers."""
    shown = State(str(problem.target), ", ".join(map(str, problem.numbers)), before)
    prompt = begin_at(node, shown) if budget is None else APR.prompt(problem.target, problem.numbers, budget)
    text, path = lines(problem.numbers, problem.target, before)
    return Search(prompt, text + ending(path), path)


def called(problem: Problem) -> Search:
    """A search of four numbers that calls one of three for each first step."""
    prompt = APR.prompt(problem.target, problem.numbers)
    text, calls, results, path, children = "", CALLING, RESULTS, None, []
    for i, step in enumerate(steps(problem.numbers)):
        text += f"\nExploring Operation: {step}"
        text += f"\nGenerated Node #0,{i}: {problem.target}:{list(step.rest)} Operation: {step}"
        calls += f"\n<Start Sub Search {i} at level 1> Moving to Node #0,{i}"
        child = small(Problem(step.rest, problem.target), f"0,{i}", (str(step),))
        how = "No Solution" if child.path is None else GOAL
        results += f"\n<{how} in Sub Search {i} at level 1 at Node #0,{i}>"
        results += "" if child.path is None else f"\n{child.path}"
        path = path or child.path
        children.append(child)
    return Search(
        prompt, text + "\n", path, f"{calls}\n{END_CALLING}", f"{results}\n{END_RESULTS}\n",
        ending(path).removeprefix("\n"), tuple(children),
    )  # fmt: skip


def serial(problem: Problem) -> Search:
    """A search of four numbers in one context, up to its first answer."""
    text, path = "", None
    for step in steps(problem.numbers):
        text += f"\nExploring Operation: {step}, Resulting Numbers: {list(step.rest)}"
        inner, path = lines(step.rest, problem.target, (str(step),))
        text += inner
        if path:
            break
    return Search(APR.prompt(problem.target, problem.numbers, sub_call_budget=0), text + ending(path), path)


def search(problem: Problem, serially: bool = False) -> Search:
    """The whole search of a problem, as the engine meets it under `ab.APR`."""
    if len(problem.numbers) == SMALL:
        return small(problem, budget=0 if serially else None)
    return serial(problem) if serially else called(problem)


# ------------------------------------------------------------------------------------------------ training rows


def row(found: Search, tokenizer: Any, longest: int | None = None) -> Layout:
    """The row of one context; that of a parent holds both of its contexts: up to the calls, and with their results.

    longest: tokens behind which it is cut off.
    """

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    prompt, written, eos = encode(found.prompt), encode(found.written), [tokenizer.eos_token_id]
    if not found.calls:
        written = [*written, *eos][: None if longest is None else longest - len(prompt)]
        return trie([[(prompt, False, False), (written, True, True)]])
    front = [(prompt, False, False), (written, True, True)]
    return trie(
        [
            [*front, (encode(found.calls), True, True)],
            [*front, (encode(found.results), False, False), ([*encode(found.rest), *eos], True, True)],
        ]
    )


def drill(rng: random.Random, tokenizer: Any, count: int) -> Layout:
    """Lines of searches of random numbers, with loss on what is to be calculated."""
    runs: list[tuple[list[int], bool, bool]] = []
    for _ in range(count):
        while not (found := list(steps([rng.randint(1, LARGEST), rng.randint(1, LARGEST), rng.randint(1, LARGEST)]))):
            pass
        step = rng.choice(found)
        made = "".join(f"{op}{value}" for op, value in combine(*step.rest))
        for text, learnt in (
            (f"\n{step.a}{step.op}{step.b}=", False),
            (f"{step.value}", True),
            (f",{step.rest[0]}:", False),
            (made, True),
        ):
            runs.append((tokenizer(text, add_special_tokens=False)["input_ids"], learnt, learnt))
    return trie([runs])
