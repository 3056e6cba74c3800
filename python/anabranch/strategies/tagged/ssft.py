"""SSFT (arXiv 2510.05132): a path for each tag that leads to a mode of thinking of its own, then a vote."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from anabranch._check import whole_fields
from anabranch.strategies.api.strategy import Strategy
from anabranch.strategies.api.thread import Thread
from anabranch.strategies.api.voting import Vote, answer_in, check_vote, majority


@dataclass(frozen=True, kw_only=True)
class SSFT(Strategy):
    """Set supervised fine-tuning's format: ``prompt <think1>…``, ``prompt <think2>…``, …, then a vote.

    The paths share the prompt, and each goes on to its end, answer included. The tags make them differ, with or
    without a temperature: they are decoded as the generation config says. The trunk becomes the path that won.
    ``result.answers`` lists what each path answered, in order; None: no answer.

    paths: how many, ``<think1>`` … ``<think6>`` as trained. path_tokens: most tokens sampled in a path; None leaves the
    answer's own limit. vote: how an answer is read, as in `SelfConsistency`; the most frequent wins, the earlier path
    among equals. A path that ends without an answer is counted as malformed.

    >>> engine.generate(prompt, strategy=ab.SSFT(paths=4, path_tokens=64)).answers
    """

    paths: int = 6
    path_tokens: int | None = None
    vote: Vote = "boxed"

    def __post_init__(self) -> None:
        whole_fields(self, ("paths", "path_tokens"), optional=("path_tokens",))
        check_vote("SSFT", self.vote)
        if self.vote is None:
            raise ValueError('SSFT: vote=None; say how an answer is read, such as "boxed" or "number"')

    def run(self, trunk: Thread) -> Generator[Any, Any, list[Any]]:
        # No generator itself: an unfit tokenizer is told before anything runs.
        tags = [f"<think{i}>" for i in range(1, self.paths + 1)]
        ids = trunk.tag_ids(tags)
        return self._vote(trunk, [[ids[tag]] for tag in tags])

    def _vote(self, trunk: Thread, headers: list[list[int]]) -> Generator[Any, Any, list[Any]]:
        kids = trunk.fork(headers)
        ends = yield [kid.decode(self.path_tokens) for kid in kids]
        answers = [answer_in(end.text, self.vote, "SSFT") for end in ends]
        for kid, answer in zip(kids, answers, strict=True):
            if answer is None:
                kid.malformed("a path without an answer")
        winner = kids[majority(answers, self.vote)]
        if losers := [kid for kid in kids if kid is not winner]:
            trunk.join(losers, "discard")
        trunk.join(winner)
        return answers
