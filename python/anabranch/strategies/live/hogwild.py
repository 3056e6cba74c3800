"""Hogwild! Inference (Rodionov et al. 2025, arXiv 2504.06261): workers over one cache that all of them write to."""

from __future__ import annotations

import re
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from anabranch._check import whole_fields
from anabranch.strategies.api.strategy import Strategy
from anabranch.strategies.api.thread import Thread
from anabranch.strategies.live.prompts import COMBINED, CONTIGUOUS, INTERLEAVED, HogwildPrompts
from anabranch.strategies.live.room import Room

LAYOUTS = {"combined": COMBINED, "contiguous": CONTIGUOUS, "interleaved": INTERLEAVED}


@dataclass(frozen=True)
class Hogwild(Strategy):
    r"""Workers that write at the same time, each with its own text last and the others', as it grows, before it.

    Every block of text (the prompt, each step, each heading) is computed once, where it was written; a worker sees the
    blocks one behind another as if they were one sequence, its own last. See docs/systems/hogwild.md.

    workers: how many.
    layout: "combined": finished steps of all in a common history, then what the others are writing, then one's own (the
        released code's); "contiguous": each worker's whole text is one block; "interleaved": finished steps only, what
        the others are writing is not seen.
    tokens: most tokens each worker samples, over all its steps. prompts: what they are told; None: the layout's own.
    check_every: a new step begins with ``prompts.check`` when so many tokens have been fed since the last one.
    answer: a pattern; a finished step that holds it ends the work. finisher_tokens: most tokens of the answer that is
        asked for when none was found; 0: do not ask.
    step_ends: characters one of which stands before the separator that ends a step. suppress: texts of single tokens
        that no worker may sample; EOS is never sampled either unless `may_end`.

    >>> engine.generate(prompt, strategy=ab.Hogwild(workers=2, tokens=64, check_every=32)).text
    """

    workers: int = 2
    layout: str = "combined"
    tokens: int = 1024
    prompts: HogwildPrompts | None = None
    check_every: int = 256
    answer: str = r"\\boxed\{([^{}]+)\}"
    finisher_tokens: int = 16
    step_ends: str = ".?!。۔؟।॥…‽"
    suppress: tuple[str, ...] = ("#", "</think>")
    may_end: bool = False

    needs = ("live sharing",)

    def __post_init__(self) -> None:
        whole_fields(self, ("workers", "tokens", "check_every"))
        whole_fields(self, ("finisher_tokens",), least=0)
        if self.layout not in LAYOUTS:
            raise ValueError(f"Hogwild: layout={self.layout!r}; pass one of {', '.join(map(repr, LAYOUTS))}")
        if self.prompts is not None and not isinstance(self.prompts, HogwildPrompts):
            raise TypeError(f"Hogwild: prompts={self.prompts!r}; pass HogwildPrompts(…) or None")
        try:
            re.compile(self.answer)
        except re.error as error:
            raise ValueError(f"Hogwild: answer={self.answer!r} is no pattern ({error})") from None

    @property
    def texts(self) -> HogwildPrompts:
        return LAYOUTS[self.layout] if self.prompts is None else self.prompts

    def run(self, trunk: Thread) -> Generator[Any, Any, str | None]:
        return (yield from Room(self, trunk).run())

    def found(self, text: str) -> str | None:
        """The last answer in a text."""
        matches = list(re.finditer(self.answer, text))
        return matches[-1].group(matches[-1].lastindex or 0) if matches else None
