"""Skeleton-of-Thought (Ning et al. 2023, arXiv 2307.15337): an outline first, then all its points at once."""

from __future__ import annotations

import re
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from anabranch._check import whole_fields
from anabranch.strategies.api.asking import ask, check_fills, fill, question_of
from anabranch.strategies.api.strategy import Strategy
from anabranch.strategies.api.thread import Thread

SKELETON = (
    "Plan the answer to the question below; do not write the answer itself yet. List its points only: {least} to "
    "{most} of them, numbered 1., 2., 3. and so on, one a line, each of three to five words.\n\nQuestion: {question}"
)
POINT = (
    "Question: {question}\n\nThe answer to it is written point by point:\n{skeleton}\n\n"
    "Write point {number} only, in one or two sentences, and leave the other points to others."
)


@dataclass(frozen=True)
class SkeletonOfThought(Strategy):
    r"""Ask for an outline of 3 to 10 points, then write each point in a thread with a *new* prompt, all side by side.

    Works with any instruction-tuned model, untrained. A chat is asked through the tokenizer's chat template: its last
    user message is the question, what stands before it (a system message, say) is kept. A prompt that is text or token
    ids is the question as it stands, and is asked without a template.

    Every point sees the question, the outline and its own number, and no other point's text. The answer is the points
    one after another, as ``1. title`` and what its thread wrote; nothing reads them again (no synthesis).

    least, most: points of an outline. What stands behind the last is dropped; an outline with too few or too many, or
    one cut off by its limit, counts as malformed. Without any point the prompt is answered plainly.
    skeleton_tokens, point_tokens: most tokens sampled for the outline and for a point.
    point_stop: text that ends a point (EOS does as well); white space at a point's end is dropped.
    skeleton_request, point_request: what is asked; ``{question}``, ``{least}``, ``{most}`` and ``{question}``,
        ``{skeleton}``, ``{number}``, ``{point}`` are filled in. The model goes on from "1." and from "{number}.
        {point}:" respectively.

    >>> engine.generate(prompt, strategy=ab.SkeletonOfThought(skeleton_tokens=48, point_tokens=32)).text
    """

    least: int = 3
    most: int = 10
    skeleton_tokens: int = 160
    point_tokens: int = 128
    point_stop: str | tuple[str, ...] = "\n\n"
    skeleton_request: str = SKELETON
    point_request: str = POINT

    def __post_init__(self) -> None:
        whole_fields(self, ("least", "most", "skeleton_tokens", "point_tokens"))
        if self.least > self.most:
            raise ValueError(f"SkeletonOfThought: least={self.least!r}, most={self.most!r}; pass 1 ≤ least ≤ most")
        check_fills(self, "skeleton_request", ("question",))
        check_fills(self, "point_request", ("question", "number"))

    def run(self, trunk: Thread) -> Generator[Any, Any, list[str]]:
        question = question_of(trunk, "SkeletonOfThought")
        asked = fill(self.skeleton_request, question=question, least=self.least, most=self.most)
        outline = trunk.spawn(ask(trunk, asked, "1."))
        end = yield outline.decode(self.skeleton_tokens, stop=f"\n{self.most + 1}.")
        points = self.points(f"1.{end.text}")
        if end.reason != "eos":
            outline.malformed(f"the outline was ended by {end.reason}")
        if not self.least <= len(points) <= self.most:
            outline.malformed(f"an outline of {len(points)} points; asked for {self.least} to {self.most}")
        yield trunk.join(outline, "summary", text="")  # what follows waits for it; nothing of it stays
        if not points:
            yield trunk.decode()
            return []
        titles = [f"{number}. {point}" for number, point in enumerate(points[: self.most], 1)]
        kids = []
        for number, title in enumerate(titles, 1):
            about = {"number": number, "point": points[number - 1], "skeleton": "\n".join(titles)}
            kids.append(trunk.spawn(ask(trunk, fill(self.point_request, question=question, **about), f"{title}:")))
        ends = yield [kid.decode(self.point_tokens, stop=self.point_stop) for kid in kids]
        for kid in kids:
            kid.rstrip()
        heads = [f"{title}:" if i == 0 else f"\n{title}:" for i, title in enumerate(titles)]
        yield trunk.join(kids, "reprefill", headers=heads)
        return [f"{title}:{end.text}".rstrip() for title, end in zip(titles, ends, strict=True)]

    @staticmethod
    def points(outline: str) -> list[str]:
        """What the points of an outline say, by number; of a number given twice the first."""
        found: dict[int, str] = {}
        for number, point in re.findall(r"^[ \t*-]*(\d+)[.):][ \t]*(\S[^\n]*)$", outline, re.MULTILINE):
            found.setdefault(int(number), point.strip().rstrip(":"))
        return [found[number] for number in sorted(found)]
