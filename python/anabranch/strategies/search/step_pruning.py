"""STEP: a scorer reads each branch's last hidden state, step by step, and hopeless branches are pruned."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from anabranch._check import whole_fields
from anabranch.strategies.api.strategy import Strategy
from anabranch.strategies.api.thread import Thread
from anabranch.strategies.api.voting import Ballot, Vote, answer_in, check_vote
from anabranch.strategies.search.best_of_n import sampling_of
from anabranch.strategies.search.pool import answer_of
from anabranch.strategies.search.scoring import judged


@dataclass(frozen=True, kw_only=True)
class STEP(Strategy):
    """Sample `n` branches; behind each step, `scorer` reads the model's hidden state at its last token, and the `prune`
    worst of those still writing are killed, as long as more than `least` branches are left.

    A branch's score is the mean over its steps. Those that come to their end vote, each with the weight of its score
    above the lowest one; without a vote, or an answer, the best becomes the trunk's. ``result.answers``: each branch's
    answer (its text without a vote), in order, None for one that was killed.

    scorer: a function of the hidden state, a tuple of floats: what the language head reads. Usually a small trained
        head, such as the released one.
    stop, step_tokens: a step ends with one of these texts, or after so many tokens.

    >>> longest = ab.STEP(scorer=lambda hidden: sum(x * x for x in hidden), n=4, step_tokens=16)
    >>> engine.generate(prompt, strategy=longest, max_new_tokens=64).text
    """

    scorer: Callable[[tuple[float, ...]], float]
    n: int = 8
    prune: int = 1
    least: int = 2
    stop: str | tuple[str, ...] = "\n\n"
    step_tokens: int | None = 256
    vote: Vote = None
    temperature: float | None = 0.6
    top_p: float | None = 0.95
    top_k: int | None = None

    needs = ("hidden states",)

    def __post_init__(self) -> None:
        whole_fields(self, ("n", "least", "step_tokens"), optional=("step_tokens",))
        whole_fields(self, ("prune",), least=0)
        if not callable(self.scorer):
            raise TypeError(f"STEP: scorer={self.scorer!r}; pass a function of a hidden state (a tuple of floats)")
        check_vote("STEP", self.vote)

    def run(self, trunk: Thread) -> Generator[Any, Any, list[Any]]:
        kids = trunk.fork(self.n)
        seen: list[list[float]] = [[] for _ in kids]
        over = [False] * self.n
        while writing := [i for i, kid in enumerate(kids) if kid.alive and not over[i]]:
            ends = yield [kids[i].decode(self.step_tokens, stop=self.stop, sampling=sampling_of(self)) for i in writing]
            for i, end in zip(writing, ends, strict=True):
                stopped = end.reason == "stop" and isinstance(end.stop, str)
                over[i] = kids[i].room <= 0 or not (stopped or end.reason == "length")
            asked = [i for i, end in zip(writing, ends, strict=True) if end.token_ids]
            hidden = yield [kids[i].hidden() for i in asked]
            for i, state in zip(asked, hidden, strict=True):
                written = [answer_of(kid) for kid in kids if kid.alive]
                seen[i].append(round(judged("STEP", self.scorer, ([state], {}), f"branch {i}", written), 4))
            worst = sorted((i for i in writing if not over[i]), key=lambda i: (_mean(seen[i]), -i))
            for i in worst[: min(self.prune, max(0, sum(kid.alive for kid in kids) - self.least))]:
                kids[i].kill()
        return (yield from self._elect(trunk, kids, [_mean(scores) for scores in seen]))

    def _elect(self, trunk: Thread, kids: list[Thread], scores: list[float]) -> Generator[Any, Any, list[Any]]:
        left = [i for i, kid in enumerate(kids) if kid.alive]
        answers: list[Any] = [None] * self.n
        for i in left:
            answers[i] = answer_of(kids[i]) if self.vote is None else answer_in(kids[i].text, self.vote, "STEP")
        if self.vote is not None:
            classes = Ballot(answers, self.vote).classes
            lowest = min(scores[i] for i in left)
            total: dict[int, float] = {}
            for i in left:
                if (name := classes[i]) is not None:
                    total[name] = total.get(name, 0.0) + scores[i] - lowest
            if total:
                best = max(total, key=lambda name: total[name])
                left = [i for i in left if classes[i] == best]
        winner = max(left, key=lambda i: scores[i])
        if losers := [kid for i, kid in enumerate(kids) if i != winner and kid.alive]:
            trunk.join(losers, "discard")
        yield trunk.join(kids[winner])
        return answers


def _mean(scores: list[float]) -> float:
    return sum(scores) / len(scores) if scores else 0.0
