"""What Hogwild! tells its workers, and the marks by which a worker's text is cut into steps: data, to be replaced."""

from __future__ import annotations

import re
from dataclasses import dataclass

from anabranch.strategies.api.thread import Thread

NAMES = ("Alice", "Bob", "Carol", "Dave", "Erin", "Frank", "Grace", "Heidi")

RULES = """# Working together

You solve the problem below together with other assistants, all at the same time: {names}. Each writes in steps of its \
own, marked like this: {mark}

Finished steps of everybody stand under '{past}', in the order in which they were finished. Behind '{others}' you see \
the steps that the others are writing right now; they end at {pivot} and grow while you write. Behind '{own}' stands \
your own.

Divide the work, say what you are going to do, answer one another, and check one another's results. When you see that \
another is doing, or has done, what you are at, stop in the middle of your step and do something else.

Whoever has the final answer writes it as \\boxed{answer}.

# The problem"""

CONTIGUOUS_RULES = """

I solve this together with {others}, and we all write at the same time: each in a workspace of its own, mine at the \
bottom, the others' above, where they grow while I write. I look there before I begin anything, say what I am going to \
do, and never repeat what is already there; if I notice that I do, I stop and take on something else."""


@dataclass(frozen=True)
class HogwildPrompts:
    """Texts of `Hogwild`; those with names in braces are filled in.

    rules: asked in front of the question ({names}, {mark}, {past}, {others}, {own}, {pivot}); "": the prompt as it is.
    behind: told behind the prompt, by the assistant itself ({others}: the other workers; {names}: all).
    openings: how each worker begins ({name}); of more workers than texts, the last holds for the rest.
    step: what each further step begins with ({name}, {number}). past, others, own, pivot: headings and the mark of an
    unfinished step. history: in front of the first step; in_progress: in front of what others are writing; in_front:
    in front of a worker's own.
    check: text inserted into a new step every so often. finisher: asks for the answer when the budget is used up.

    >>> engine.generate(prompt, strategy=ab.Hogwild(workers=2, tokens=64, prompts=ab.HogwildPrompts())).text
    """

    rules: str = RULES
    behind: str = ""
    openings: tuple[str, ...] = ("Hi, I'm {name}. Here's how we can", "Hi, I'm {name}.")
    step: str = "**{name} [{number}]:** "
    past: str = "### Past steps"
    others: str = "### Work in progress (others)"
    own: str = "### Work in progress (own)"
    pivot: str = "<...>"
    separator: str = "\n\n"
    in_progress: str = "\n\n### Work in progress (others)\n\n"
    in_front: str = "<...>\n\n### Work in progress (own)\n\n"
    check: str = "Quick check: am I doing redundant work? (yes/no): "
    finisher: str = (
        "\n\nWait, given the limited time, I have to give an answer right now. Considering all my previous attempts, "
        "I have to conclude that the final answer is \\boxed{"
    )


COMBINED = HogwildPrompts()
INTERLEAVED = HogwildPrompts(in_progress="", in_front="")
CONTIGUOUS = HogwildPrompts(
    rules="",
    behind=CONTIGUOUS_RULES,
    openings=(
        "\n\n# {name} workspace\n\nI am {name}. Let's solve this together. Here's how we should collaborate:",
        "\n\n# {name} workspace\n\nI am {name}. Let's solve this together.",
    ),
    step="",
    in_progress="",
    in_front=" <the assistant will continue here>\n\n",
)


def filled_rules(texts: HogwildPrompts, names: list[str]) -> str:
    """The rules with their names filled in."""
    known = {
        "names": ", ".join(names), "mark": texts.step, "past": texts.past, "others": texts.others, "own": texts.own,
        "pivot": texts.pivot,
    }  # fmt: skip
    return re.sub(r"\{(\w+)\}", lambda match: known.get(match.group(1), match.group(0)), texts.rules)


def asked(trunk: Thread, rules: str) -> list[int]:
    """Token ids of the prompt with the rules in front of its question: of a chat's last user message, else of all."""
    prompt = trunk.prompt
    if isinstance(prompt, str):
        return trunk.encode_prompt(f"{rules}\n\n{prompt}")
    if not isinstance(prompt[0], dict):
        return [*trunk.encode(f"{rules}\n\n"), *prompt]
    at = max((i for i, message in enumerate(prompt) if message["role"] == "user"), default=None)
    if at is None:
        raise ValueError("Hogwild: the chat holds no message of the user, so no question")
    message = {**prompt[at], "content": f"{rules}\n\n{prompt[at]['content']}"}
    return trunk.encode_prompt([*prompt[:at], message, *prompt[at + 1 :]])
