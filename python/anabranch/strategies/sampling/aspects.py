"""A fork in mid-answer that needs no training: aspects of one answer, written side by side, then a conclusion."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from anabranch.strategies.api.strategy import Strategy
from anabranch.strategies.api.thread import Thread


@dataclass(frozen=True)
class Aspects(Strategy):
    """Begin an answer, fork it in the middle into one thread a header, join them, conclude.

    The trunk decodes an introduction until `after` (or `intro_tokens`). There its live cache is forked, the unfinished
    page included: each child continues the same text with its own header and sees nothing of its siblings. They are
    joined by splicing their KV side by side (positions shared, nothing computed again), and the trunk, which now sees
    all of them, goes on behind `conclusion`. An answer that ends before the fork stays as it is.

    headers: how each child begins. conclusion: how the trunk goes on after the join; may not be empty, since the first
    token after the join must be computed with all children in sight.
    after: text that ends the introduction; aspect_stop: text that ends a child. White space and EOS
    at a child's end are dropped.

    >>> engine.generate("Is the sea salty?", strategy=ab.Aspects(aspect_tokens=32), max_new_tokens=128).text
    """

    headers: tuple[str, ...] = ("\n\nOn the one hand,", "\n\nOn the other hand,", "\n\nFor example,")
    conclusion: str = "\n\nIn conclusion,"
    after: str | tuple[str, ...] = ("\n", ".")
    intro_tokens: int = 48
    aspect_tokens: int = 64
    aspect_stop: str | tuple[str, ...] = "\n\n"
    conclusion_tokens: int | None = None

    needs = ("concat joins",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "headers", tuple(self.headers))
        if isinstance(self.headers, str) or not self.headers or not all(self.headers):
            raise ValueError(f"Aspects: headers={self.headers!r}; pass one non-empty text for each thread")
        if not self.conclusion:
            raise ValueError("Aspects: conclusion is empty; pass the text that the trunk goes on with after the join")

    def run(self, trunk: Thread) -> Generator[Any, Any, Any]:
        intro = yield trunk.decode(self.intro_tokens, stop=self.after)
        if intro.reason in ("eos", "budget"):
            return
        kids = trunk.fork(self.headers)
        yield [kid.decode(self.aspect_tokens, stop=self.aspect_stop) for kid in kids]
        for kid in kids:
            kid.rstrip()  # an EOS or a paragraph break must not stand in the middle of the joined text
        trunk.join(kids)
        trunk.insert(self.conclusion)
        yield trunk.decode(self.conclusion_tokens)
