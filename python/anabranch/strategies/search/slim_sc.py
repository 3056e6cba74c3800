"""Slim-SC: self-consistency that prunes chains whose thoughts repeat another's (arXiv 2509.13990)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass
from math import sqrt
from typing import Any

from anabranch._check import number, whole_fields
from anabranch.strategies.api.strategy import Strategy
from anabranch.strategies.api.thread import Thread
from anabranch.strategies.api.voting import Vote, answer_in, check_vote, majority
from anabranch.strategies.search.best_of_n import sampling_of
from anabranch.strategies.search.scoring import judged, one_of


@dataclass(frozen=True, kw_only=True)
class SlimSC(Strategy):
    """Sample `n` chains by thoughts; where a new thought of one is much like another's, one of the two is killed.

    A thought ends at `boundary`. All chains write their next thought side by side; then each pair of new thoughts, or a
    new and an earlier thought, of two chains is compared. Over `threshold`, one of the two chains goes: with prune
    "diversity" the one whose own thoughts are more alike one another, with "later" the one that stands behind the
    other. The last chain is never killed. Those that come to their end vote.

    The trunk becomes the first chain with the winning answer. ``result.answers``: each chain's answer, in order, None
    for one that was killed or holds none.

    similarity: a function of two texts, from 0 to 1 (embeddings of a model of one's own, for instance); None: cosine of
        their counts of three letters in a row, which needs no other model. (The paper embeds thoughts with a sentence
        encoder; its thresholds are of that scale.)
    warmup: thoughts a chain may have before any is compared. vote: as for `SelfConsistency`.
    thought_tokens: most tokens of a thought; None: no limit but the answer's own.

    >>> engine.generate(prompt, strategy=ab.SlimSC(n=4, threshold=0.8, boundary="."), max_new_tokens=64).answers
    """

    n: int = 8
    threshold: float = 0.9
    boundary: str | tuple[str, ...] = "\n\n"
    similarity: Callable[[str, str], float] | None = None
    prune: str = "diversity"
    warmup: int = 0
    vote: Vote = "boxed"
    thought_tokens: int | None = None
    temperature: float | None = 0.6
    top_p: float | None = 0.95
    top_k: int | None = None

    def __post_init__(self) -> None:
        whole_fields(self, ("n", "thought_tokens"), optional=("thought_tokens",))
        whole_fields(self, ("warmup",), least=0)
        number(self.threshold, "SlimSC: threshold")
        one_of("SlimSC", "prune", self.prune, ("diversity", "later"))
        if self.similarity is not None and not callable(self.similarity):
            raise TypeError(f"SlimSC: similarity={self.similarity!r}; pass a function of two texts, or None")
        if self.vote is None:
            raise ValueError("SlimSC: vote=None, but the chains vote; pass a function, a pattern or a name")
        check_vote("SlimSC", self.vote)

    def run(self, trunk: Thread) -> Generator[Any, Any, list[Any]]:
        kids = trunk.fork(self.n)
        thoughts: list[list[str]] = [[] for _ in kids]
        over = [False] * self.n
        while writing := [i for i, kid in enumerate(kids) if kid.alive and not over[i]]:
            ends = yield [
                kids[i].decode(self.thought_tokens, stop=self.boundary, sampling=sampling_of(self)) for i in writing
            ]
            for i, end in zip(writing, ends, strict=True):
                stopped = end.reason == "stop" and isinstance(end.stop, str)
                over[i] = kids[i].room <= 0 or not (stopped or end.reason == "length")
                if end.text is None:
                    raise ValueError("SlimSC: thoughts are text, but the engine has no tokenizer; pass one")
                thoughts[i].append(end.text)
            self._drop_alike(kids, thoughts, writing)
        answers = [answer_in(kid.text, self.vote, "SlimSC") if kid.alive else None for kid in kids]
        winner = majority(answers, self.vote)
        if not kids[winner].alive:  # no chain holds an answer
            winner = next(i for i, kid in enumerate(kids) if kid.alive)
        if losers := [kid for i, kid in enumerate(kids) if i != winner and kid.alive]:
            trunk.join(losers, "discard")
        trunk.join(kids[winner])
        return answers

    def _drop_alike(self, kids: list[Thread], thoughts: list[list[str]], writing: list[int]) -> None:
        """Compare each new thought with all thoughts of the other chains."""
        for i in writing:
            for j, other in enumerate(kids):
                if i == j or not (kids[i].alive and other.alive) or min(map(len, (thoughts[i], thoughts[j]))) == 0:
                    continue
                if len(thoughts[i]) <= self.warmup or not thoughts[i][-1].strip():
                    continue
                if max(self._alike(thoughts[i][-1], thought) for thought in thoughts[j]) >= self.threshold:
                    worse = self._worse(i, j, thoughts)
                    if worse in writing:  # a chain that has come to its end keeps its vote
                        kids[worse].kill()
                    elif i in writing:
                        kids[i].kill()

    def _worse(self, i: int, j: int, thoughts: list[list[str]]) -> int:
        if self.prune == "diversity" and (own := [self._inner(thoughts[c]) for c in (i, j)])[0] != own[1]:
            return i if own[0] > own[1] else j
        return max(i, j)

    def _inner(self, thoughts: list[str]) -> float:
        """How alike a chain's own thoughts are, on average."""
        pairs = [(a, b) for at, a in enumerate(thoughts) for b in thoughts[at + 1 :]]
        return round(sum(self._alike(a, b) for a, b in pairs) / len(pairs), 4) if pairs else 0.0

    def _alike(self, a: str, b: str) -> float:
        if self.similarity is None:
            return letters_alike(a, b)
        return judged("SlimSC", self.similarity, ([a, b], {}), f"the thoughts {a[:40]!r} and {b[:40]!r}")


def letters_alike(a: str, b: str) -> float:
    """Cosine of the counts of three letters in a row, case and white space aside; 1 for equal texts."""
    first, second = (_counts(" ".join(text.casefold().split())) for text in (a, b))
    norm = sqrt(sum(n * n for n in first.values()) * sum(n * n for n in second.values()))
    return sum(n * second[key] for key, n in first.items()) / norm if norm else float(a.split() == b.split())


def _counts(text: str) -> Counter[str]:
    padded = f" {text} " if text else ""
    return Counter(padded[at : at + 3] for at in range(len(padded) - 2))
