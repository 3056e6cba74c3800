"""A worked problem as ThreadWeaver text, and as the row that training sees; an ordinary question as such a row."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import anabranch as ab
from anabranch.models import adaptive
from training.layout import Lesson, lesson

from .families import Problem

# The control tags take over special tokens of SmolLM2 that no ordinary text uses (ids 3 to 10), one each.
TAG_IDS = dict(zip(ab.ThreadWeaver().tags, range(3, 11), strict=True))
# No system message: every token of it would be computed each time.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def tokenizer() -> Any:
    """SmolLM2's, with the tags."""
    made = adaptive.tokenizer(ab.models.path("smollm2"), TAG_IDS, TEMPLATE)
    chat = [{"role": "user", "content": "x"}]
    assert made.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == CHAT.format(prompt="x")
    return made


def prompt_text(problem: Problem) -> str:
    return CHAT.format(prompt=problem.prompt)


def opening(problem: Problem) -> str:
    """What the model writes up to the fork: the block's beginning and its outlines."""
    lines = "".join(f"<Outline>{i}: {p.outline}</Outline>\n" for i, p in enumerate(problem.parts, 1))
    return f"<Parallel>\n<Outlines>\n{lines}</Outlines>"


def ending(problem: Problem) -> str:
    """What it writes after the join (after the work, where there is nothing to join)."""
    return f"{problem.join}The answer is {problem.answer}.<|im_end|>"


def lesson_of(problem: Problem, tokenizer: Any) -> Lesson:
    """One problem's row; a single chain where there is nothing to do side by side."""
    prompt = tokenizer(prompt_text(problem), add_special_tokens=False)["input_ids"]
    if not problem.threads:
        return lesson(prompt, [problem.parts[0].work[1:] + "\n" + ending(problem)], tokenizer)
    works = [(str(i), part.work) for i, part in enumerate(problem.parts, 1)]
    return lesson(prompt, [opening(problem), works, closing(problem)], tokenizer)


def closing(problem: Problem) -> str:
    return "</Parallel>\n" + ending(problem)


# ------------------------------------------------------------------------------------------------ ordinary questions


@dataclass(frozen=True)
class Answered:
    """A chat and what the stock model says to it; ended: whether it said all of it, or was cut short."""

    kind: str
    chat: list[dict[str, str]]
    answer: str
    ended: bool


def ordinary_lesson(answered: Answered, tokenizer: Any) -> Lesson:
    """The row of an ordinary question: the chat as the model gets it, the answer without any tag, the turn's end."""
    prompt = chat_ids(answered.chat, tokenizer)
    return lesson(prompt, [answered.answer + ("<|im_end|>" if answered.ended else "")], tokenizer)


def chat_ids(chat: list[dict[str, str]], tokenizer: Any) -> list[int]:
    """Token ids of a chat, up to where the assistant begins to write."""
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def read_answers(file: Path) -> list[Answered]:
    return [Answered(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


def write_answers(file: Path, answers: list[Answered]) -> None:
    file.write_text("".join(json.dumps(asdict(a), ensure_ascii=False) + "\n" for a in answers), encoding="utf-8")
