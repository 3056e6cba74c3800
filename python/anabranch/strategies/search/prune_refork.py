"""Prune and re-fork from a fixed pool: from time to time the worst die and the best are forked where they stand."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from anabranch._check import whole_fields
from anabranch.strategies.api.ops import TokenStats
from anabranch.strategies.api.strategy import Strategy
from anabranch.strategies.api.thread import Thread
from anabranch.strategies.api.voting import Ballot, Vote, answer_in, check_vote
from anabranch.strategies.search.best_of_n import sampling_of
from anabranch.strategies.search.pool import Pool, answer_of
from anabranch.strategies.search.scoring import Scored, Scorer, check_scorer, score


@dataclass(frozen=True, kw_only=True)
class PruneRefork(Strategy):
    """A pool of `n` branches that stays full (Gambit): every `every` tokens the `swap` worst of those still writing
    die, and as many of the best are forked where they stand, into their places.

    With fewer than ``2 * swap`` still writing, half of them. A branch that takes another's place goes on from its KV,
    which both share; what it had written is forgotten. The branches write to their end; then, with a `vote`, the best
    branch with the winning answer becomes the trunk's, without one the best of all. ``result.answers``: what each place
    of the pool answered at last (its text without a vote).

    scorer: how good a branch is: "confidence" (DeepConf's) or "logprob" of its last `every` tokens, or a function of
        all it wrote, as for `BestOfN`.
    temperature, top_p, top_k: of the branches.

    >>> engine.generate(prompt, strategy=ab.PruneRefork(n=8, every=16, swap=4), max_new_tokens=64).text
    """

    n: int = 32
    every: int = 200
    swap: int = 16
    scorer: Scorer = "confidence"
    vote: Vote = None
    temperature: float | None = 0.8
    top_p: float | None = None
    top_k: int | None = None

    def __post_init__(self) -> None:
        whole_fields(self, ("n", "every"))
        whole_fields(self, ("swap",), least=0)
        if 2 * self.swap > self.n:
            raise ValueError(f"PruneRefork: swap={self.swap} of n={self.n} branches; pass at most half of them")
        check_scorer("PruneRefork", self.scorer)
        check_vote("PruneRefork", self.vote)

    def run(self, trunk: Thread) -> Generator[Any, Any, list[Any]]:
        pool = Pool(trunk, self.n)
        kids, scores, over = list(pool.threads), [0.0] * self.n, [False] * self.n
        while writing := [i for i in range(self.n) if not over[i]]:
            stats: Any = True if isinstance(self.scorer, str) else False
            ends = yield [kids[i].decode(self.every, sampling=sampling_of(self), stats=stats) for i in writing]
            for i, end in zip(writing, ends, strict=True):
                over[i] = end.reason != "length" or kids[i].room <= 0
                if end.token_ids:
                    scores[i] = self._score(kids[i], end.stats, f"branch {i}")
            going = sorted((i for i in writing if not over[i]), key=lambda i: (-scores[i], i))
            swap = min(self.swap, len(going) // 2)
            for worst, best in zip(reversed(going[len(going) - swap :]), going[:swap], strict=True):
                kids[worst].become(kids[best])
                scores[worst] = scores[best]
            yield kids
        answers = [
            answer_of(kid) if self.vote is None else answer_in(kid.text, self.vote, "PruneRefork") for kid in kids
        ]
        winner = self._elect(answers, scores)
        yield from pool.settle(kids[winner])
        return answers

    def _score(self, kid: Thread, stats: tuple[TokenStats, ...], name: str) -> float:
        item = Scored(kid.text, kid.token_ids, kid.prompt, stats)
        return score("PruneRefork", self.scorer, item, name, [item.answer])

    def _elect(self, answers: list[Any], scores: list[float]) -> int:
        may = list(range(self.n))
        if self.vote is not None:
            classes = Ballot(answers, self.vote).classes
            if any(name is not None for name in classes):
                winner = classes[Ballot(answers, self.vote).winner()]
                may = [i for i in may if classes[i] == winner]
        return max(may, key=lambda i: scores[i])
