"""Tasks by name: problems with a way to judge an answer. Most are reasoning-gym's, with its own verifiers.

A task is named with its options as in Python, ``chain_sum(max_terms=3)``; a path that ends in ``.jsonl`` is a file of
one's own, with one ``{"prompt", "answer"}`` a line. ``buried(TASK,filler=250)`` is a task whose problems stand among so
many words that have nothing to do with them.
"""

from __future__ import annotations

import ast
import random
import re
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from anabranch._check import nearest
from anabranch.answers import final_answer, is_right
from anabranch.evaluation.comparison.buried import BillsTask, BuriedTask, WhereaboutsTask
from anabranch.evaluation.comparison.items import Item
from anabranch.evaluation.evaluate import read_problems
from anabranch.strategies.option_values import split

__all__ = ["GYM", "FileTask", "GymTask", "Item", "MultiplicationTask", "Task", "find_task", "task_names"]

# What `compare` offers by name; every other data set of reasoning-gym is found as well.
GYM = (
    "leg_counting", "products", "chain_sum", "letter_counting", "spell_backward", "number_filtering", "base_conversion",
    "prime_factorization", "countdown", "needle_haystack", "word_sorting", "time_intervals",
)  # fmt: skip
NUMBER = re.compile(r"-?\d+(\.\d+)?")


class Task(Protocol):
    """Problems that a seed draws."""

    @property
    def name(self) -> str:
        """As it is stored and listed, options included."""

    def items(self, count: int, seed: int) -> list[Item]:
        """`count` problems, the same for the same seed; fewer where there are no more."""


@dataclass(frozen=True)
class MultiplicationTask:
    """Products of two numbers of up to four digits: all that the model in the package reads."""

    name: str = "multiplication"

    def items(self, count: int, seed: int) -> list[Item]:
        rng = random.Random(seed)
        pairs = [tuple(rng.randrange(10 ** rng.randrange(1, 4), 10**4) for _ in range(2)) for _ in range(count)]
        return [_judged(f"{a} * {b}", str(a * b)) for a, b in pairs]


@dataclass(frozen=True)
class FileTask:
    """A file of problems; where it has more than are asked for, the seed draws them."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    def items(self, count: int, seed: int) -> list[Item]:
        problems = read_problems(self.path)
        if count < len(problems):
            problems = random.Random(seed).sample(problems, count)
        return [_judged(problem.prompt, problem.answer) for problem in problems]


@dataclass(frozen=True)
class GymTask:
    """A data set of reasoning-gym. A number is judged as maths (`anabranch.answers`), anything else by its verifier."""

    dataset: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        inside = ",".join(f"{key}={value}" for key, value in sorted(self.options.items()))
        return f"{self.dataset}({inside})" if inside else self.dataset

    def items(self, count: int, seed: int) -> list[Item]:
        import reasoning_gym

        try:
            data = reasoning_gym.create_dataset(self.dataset, size=count, seed=seed, **self.options)
        except (TypeError, AssertionError, ValueError) as error:
            raise ValueError(f"task {self.name!r}: reasoning-gym does not take these options ({error})") from None
        return [self._item(data, data[i]) for i in range(count)]

    @staticmethod
    def _item(data: Any, entry: dict[str, Any]) -> Item:
        prompt, answer = entry["question"].strip(), str(entry["answer"])
        if NUMBER.fullmatch(answer):
            return _judged(prompt, answer)

        def score(text: str) -> float:
            try:
                return float(data.score_answer(given_answer(text), entry))
            except Exception:
                data.score_answer(entry["answer"], entry)  # raises again where the verifier itself is broken
                return 0.0  # else it is this answer that it cannot read

        return Item(prompt, answer, score)


def _judged(prompt: Any, answer: str) -> Item:
    return Item(prompt, answer, lambda text: float(is_right(text, answer)))


def given_answer(text: str) -> str:
    """What a verifier is shown: what stands in <answer> tags, else behind "Answer:" or in a box, else the last line.

    >>> given_answer("Let me see.\\nThe answer is noremopyh.")
    'noremopyh'
    """
    tagged = re.findall(r"<answer>\s*(.*?)\s*</answer>", text, re.DOTALL)
    if tagged:
        return str(tagged[-1])
    found, marked = final_answer(text)
    if not marked:
        found = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    return found.strip().rstrip(".").strip()


OURS: dict[str, type[Any]] = {
    "multiplication": MultiplicationTask, "bills": BillsTask, "whereabouts": WhereaboutsTask,
}  # fmt: skip


def task_names() -> list[str]:
    """Names that `compare` offers."""
    return ["multiplication", *GYM, "bills", "whereabouts"]


def find_task(text: str) -> Task:
    """The task of a name, with options if there are any, or of a file.

    >>> find_task("chain_sum(max_terms=3)").name
    'chain_sum(max_terms=3)'
    >>> find_task("buried(bills, filler=250)").name
    'buried(bills,filler=250)'

    Raises:
        ValueError: there is no such task (the nearest names are given) or file, or reasoning-gym is not installed.
    """
    if text.endswith(".jsonl"):
        path = Path(text).expanduser()
        if not path.is_file():
            raise ValueError(f"task {text!r}: no such file")
        read_problems(path)  # so that its mistakes are told now
        return FileTask(path)
    match = re.fullmatch(r"\s*([\w-]+)\s*(?:\((.*)\))?\s*", text, re.DOTALL)
    if match is None:
        raise ValueError(f"task {text!r}: expected a name, name(option=value, …) or a .jsonl file")
    name, inside = match[1].replace("-", "_").lower(), match[2] or ""
    if name == "buried":
        return _buried(text, inside)
    if name in OURS:
        return _ours(text, name, _options(text, inside))
    installed = find_spec("reasoning_gym") is not None
    known = list(GYM)
    if installed and name not in known:
        from reasoning_gym.factory import DATASETS

        known = sorted(DATASETS)
    if name not in known:
        close = nearest(name, [*OURS, "buried", *known])
        near = f"did you mean {' or '.join(close)}? " if close else ""
        raise ValueError(f"no task {match[1]!r}; {near}Tasks: {', '.join(task_names())}, or a .jsonl file")
    options = _options(text, inside)
    if not installed:
        raise ValueError(
            f"task {name!r} is one of reasoning-gym, which is not installed: pip install 'anabranch[compare]' (or "
            f"pip install reasoning-gym); {' and '.join(OURS)} and .jsonl files need nothing"
        )
    return GymTask(name, options)


def _ours(text: str, name: str, options: dict[str, Any]) -> Task:
    takes = [option.name for option in fields(OURS[name]) if option.name != "name"]
    if unknown := [option for option in options if option not in takes]:
        what = f"pass {', '.join(f'{option}=NUMBER' for option in takes)}" if takes else "it takes none"
        raise ValueError(f"task {text!r}: no option {unknown[0]!r}; {what}")
    task: Task = OURS[name](**options)
    return task


def _buried(text: str, inside: str) -> BuriedTask:
    parts = split(inside)
    if len(parts) == 2 and (match := re.fullmatch(r"filler\s*=\s*(\d+)", parts[1])):
        return BuriedTask(find_task(parts[0]), int(match[1]))
    raise ValueError(f"task {text!r}: expected buried(TASK,filler=WORDS), such as buried(bills,filler=250)")


def _options(text: str, inside: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for part in split(inside):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not key.isidentifier():
            raise ValueError(f"task {text!r}: {part!r} is not option=value")
        try:
            options[key] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            options[key] = value
    return options
