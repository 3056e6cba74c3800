"""Self-consistency: sample the same prompt n times, then vote (Wang et al. 2022, arXiv 2203.11171)."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from anabranch._check import whole_fields
from anabranch.strategies.api.awaitable import first
from anabranch.strategies.api.ops import Decode, Ended
from anabranch.strategies.api.strategy import Strategy
from anabranch.strategies.api.thread import Thread
from anabranch.strategies.api.voting import Vote, answer_in, check_vote, decided, majority


@dataclass(frozen=True)
class SelfConsistency(Strategy):
    """Fork after the prompt into `n` sampled branches; the trunk becomes the winning one.

    The prompt is computed once, and its KV exists once. ``result.answers`` lists what each branch answered, in order.

    vote: what an answer is, to be counted — a function of a branch's text (None: it has no answer), a regular
    expression (its last match, the first group if there is one), or a name (below). The most frequent answer wins, the
    earlier branch among equals; who has no answer does not vote. None: no vote, the answers are the texts (token ids
    without a tokenizer), and the branch whose tokens the model found likeliest (mean log-probability) wins.

    ==========  ========================================================================================================
    "number"    the last number of the text, as an exact decimal without groups of digits or unit: "1,234 m" is "1234",
                "1/2" is "0.5". A "-" between two numbers is no sign: "3-5" ends in 5
    "boxed"     what the last ``\\boxed{…}`` holds, as it is written; none where that box never closes. Counted by what
                it means: equal numbers, lists and expressions are one answer (``\\frac12``, 0.5 and 50 %), "5 cm" and
                "5 m" are two, and "5" goes with the one of them that is there
    "letter"    the option A to J that the text chooses: in a box, behind "answer is" or "answer:", else in the
                last line that has one: at its beginning, or the last that stands alone
    "line"      the last line that is not blank
    ==========  ========================================================================================================

    temperature, top_p, top_k: None leaves the generation config's own value.
    max_new_tokens: of a branch; None leaves the answer's own limit.
    early_stop: stop as soon as no branch still writing can change which answer wins; those are killed, their pages are
    free at once, and their answers are None. The winning answer is the same as without. (Which branches were cut
    depends on who was done first, so on page shortages as well.)

    >>> engine.generate(prompt, strategy=ab.SelfConsistency(n=8, vote="number"), max_new_tokens=64).answers
    """

    n: int = 8
    vote: Vote = None
    temperature: float | None = 0.8
    top_p: float | None = None
    top_k: int | None = None
    max_new_tokens: int | None = None
    early_stop: bool = False

    def __post_init__(self) -> None:
        whole_fields(self, ("n",))
        check_vote("SelfConsistency", self.vote)
        if self.early_stop and self.vote is None:
            raise ValueError("SelfConsistency: early_stop=True without a vote that could be decided; pass vote=…")

    def run(self, trunk: Thread) -> Generator[Any, Any, list[Any]]:
        chosen = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        sampling = {"do_sample": True} | {k: v for k, v in chosen.items() if v is not None}
        kids = trunk.fork(self.n)
        decodes = [
            kid.decode(self.max_new_tokens, sampling=sampling, stats="logprob" if self.vote is None else False)
            for kid in kids
        ]
        if self.early_stop:
            answers = yield from self._until_decided(kids, decodes)
            winner = kids[majority(answers, self.vote)]
        else:
            ends = yield decodes
            answers = [self.answer(end) for end in ends]
            winner = kids[self.elect(answers, ends)]
        if losers := [kid for kid in kids if kid is not winner and kid.alive]:
            trunk.join(losers, "discard")
        trunk.join(winner)
        return answers

    def _until_decided(self, kids: list[Thread], decodes: list[Decode]) -> Generator[Any, Any, list[Any]]:
        answers: list[Any] = [None] * len(kids)
        writing = list(range(len(kids)))
        while writing and not decided(answers, len(writing), self.vote):
            at, end = yield first(*(decodes[i] for i in writing))
            index = writing.pop(at)
            answers[index] = self.answer(end)
        for i in writing:
            if decodes[i].done:  # in the same step
                answers[i] = self.answer(decodes[i].value)
            else:
                kids[i].kill()
        return answers

    def answer(self, end: Ended) -> Any:
        """The answer a branch gave, None when its text holds none."""
        if self.vote is None:
            return end.token_ids if end.text is None else end.text
        return answer_in(end.text, self.vote, "SelfConsistency")

    def elect(self, answers: list[Any], ends: list[Ended]) -> int:
        """Index of the winning branch."""
        if self.vote is None:
            return max(
                range(len(ends)), key=lambda i: sum(s.logprob for s in ends[i].stats) / max(1, len(ends[i].stats))
            )
        return majority(answers, self.vote)
