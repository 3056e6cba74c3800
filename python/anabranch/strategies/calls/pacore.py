"""PaCoRe (arXiv 2601.05593): rounds of answers, each round given the answers of the one before as references."""

from __future__ import annotations

import random
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from anabranch._check import number, whole, whole_fields
from anabranch.strategies.api.asking import ask, check_fills, fill, question_of
from anabranch.strategies.api.strategy import Strategy
from anabranch.strategies.api.thread import Thread

# Word for word what its models were trained on.
REQUEST = (
    "You are given a problem and a list of reference responses. Your job is to analyze these references and provide "
    "your own response.\n\nOriginal Problem:\n{question}\n\nReference Responses:\n{references}\n\nNow, based on the "
    "original problem and reference responses above, please provide your own comprehensive solution."
)


@dataclass(frozen=True, kw_only=True)
class PaCoRe(Strategy):
    """Parallel coordinated reasoning: `rounds` of sampled answers, then one answer that is the result.

    Of every answer of a round only what follows its last ``</think>`` goes on (all of it where there is none). These
    references are shuffled, numbered and put into a new prompt, in place of the chat's last user message, and every
    thread of the next round answers that, without a look at the prompt or the thoughts before. ``result.answers`` lists
    the references of each round, in the order in which they were given.

    rounds: answers of each round, as released (4,), (16,) or (32, 4).
    answer_tokens: most tokens sampled in an answer; None leaves the answer's own limit.
    temperature, top_p: answers are sampled with them; None: with the generation config's own.
    request: what a round is asked; ``{question}`` and ``{references}`` are filled in.
    shuffle_seed: of the order of the references: by length, then shuffled, as in the released code.

    An empty reference is left out, and counted as malformed. A round without any asks the question again.

    >>> engine.generate(prompt, strategy=ab.PaCoRe(rounds=(4, 2), answer_tokens=64), max_new_tokens=64).text
    """

    rounds: tuple[int, ...] = (4,)
    answer_tokens: int | None = None
    temperature: float | None = 1.0
    top_p: float | None = 1.0
    request: str = REQUEST
    shuffle_seed: int = 42

    def __post_init__(self) -> None:
        if not isinstance(self.rounds, (tuple, list)) or not self.rounds:
            raise ValueError(f"PaCoRe: rounds={self.rounds!r}; pass the answers of each round, such as (32, 4)")
        counts = tuple(whole(n, f"PaCoRe: rounds[{i}]", 1) for i, n in enumerate(self.rounds))
        object.__setattr__(self, "rounds", counts)
        whole_fields(self, ("answer_tokens",), optional=("answer_tokens",))
        for name in ("temperature", "top_p"):
            if getattr(self, name) is not None:
                number(getattr(self, name), f"PaCoRe: {name}", positive=True, hint=", or None")
        check_fills(self, "request", ("question", "references"))

    def run(self, trunk: Thread) -> Generator[Any, Any, list[list[str]]]:
        question = question_of(trunk, "PaCoRe")
        chosen = {"temperature": self.temperature, "top_p": self.top_p}
        sampling = {"do_sample": True, **{k: v for k, v in chosen.items() if v is not None}}
        asked, given = trunk, list[list[str]]()
        for count in self.rounds:
            kids = asked.fork(count)  # one prompt, computed once
            ends = yield [kid.decode(self.answer_tokens, sampling=sampling) for kid in kids]
            references = [end.text.rpartition("</think>")[2] for end in ends]
            for kid, reference in zip(kids, references, strict=True):
                if not reference:
                    kid.malformed("an answer with nothing behind its thoughts; left out")
            asked.join(kids, "discard")
            references = sorted(filter(None, references), key=len)
            random.Random(self.shuffle_seed).shuffle(references)
            given.append(references)
            listed = "".join(f"\nReference {i}:\n{text}\n" for i, text in enumerate(references, 1))
            request = fill(self.request, question=question, references=listed) if references else question
            nxt = trunk.spawn(ask(trunk, request))
            if asked is not trunk:
                yield trunk.join(asked, "summary", text="")  # what follows waits for it; nothing of it stays
            asked = nxt
        yield asked.decode(self.answer_tokens, sampling=sampling)
        yield trunk.join(asked, "reprefill")
        return given
