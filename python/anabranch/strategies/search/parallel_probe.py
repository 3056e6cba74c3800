"""Parallel-Probe: ask every branch for its answer on the side, stop on a stable consensus, prune deviants."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from anabranch._check import number, whole_fields
from anabranch.strategies.api.ops import Ended
from anabranch.strategies.api.strategy import Strategy
from anabranch.strategies.api.thread import Thread
from anabranch.strategies.api.voting import Ballot, Vote, answer_in, check_vote
from anabranch.strategies.search.best_of_n import sampling_of


@dataclass(frozen=True, kw_only=True)
class ParallelProbe(Strategy):
    """Sample `n` branches; every `every` tokens each is asked for its answer so far (arXiv 2602.03845).

    Asking forks the branch, inserts `probe`, decodes at most `probe_tokens` greedily, reads the answer with `vote` and
    discards the fork; the branch itself does not notice. One that has ended answers with its own text, or, should that
    hold no answer, as it did when asked last. The answers of all branches but the pruned ones are counted each round:

    - when the leading answer has been the same for `stable` rounds, and `warmup` rounds have passed, all stop;
    - a branch still writing that was against a leading answer with at least `share` of the votes for `deviations`
      rounds in a row is killed, as long as more than `least` branches are left (not before `warmup` rounds).

    The trunk becomes the first branch that gave the winning answer; one that had not come to its end is ended with the
    probe and its answer. ``result.answers``: each branch's last answer, in order. The defaults are the released
    code's, save `n` (there 64).

    >>> engine.generate(prompt, strategy=ab.ParallelProbe(n=4, every=16, probe_tokens=4), max_new_tokens=64).answers
    """

    n: int = 16
    every: int = 500
    probe: str = "\n</think>\n\nThe final answer is"
    probe_tokens: int = 32
    probe_stop: str | tuple[str, ...] = "\n"
    vote: Vote = "number"
    stable: int = 18
    warmup: int = 10
    deviations: int = 3
    share: float = 0.5
    least: int = 3
    temperature: float | None = 0.6
    top_p: float | None = 0.95
    top_k: int | None = None

    def __post_init__(self) -> None:
        whole_fields(self, ("n", "every", "probe_tokens", "stable", "deviations", "least"))
        whole_fields(self, ("warmup",), least=0)
        if not 0 <= number(self.share, "ParallelProbe: share") <= 1:
            raise ValueError(f"ParallelProbe: share={self.share!r}; pass a share of the votes, from 0 to 1")
        if not self.probe:
            raise ValueError("ParallelProbe: probe is empty; pass the text that asks a branch for its answer")
        if self.vote is None:
            raise ValueError("ParallelProbe: vote=None, but answers are compared; pass a function, a pattern or a name")
        check_vote("ParallelProbe", self.vote)

    def run(self, trunk: Thread) -> Generator[Any, Any, list[Any]]:
        kids = trunk.fork(self.n)
        over, against = [False] * self.n, [0] * self.n
        answers: list[Any] = [None] * self.n
        leading: Any = None
        held = rounds = 0
        while True:
            writing = [i for i, kid in enumerate(kids) if kid.alive and not over[i]]
            if not writing:
                break
            ends = yield [kids[i].decode(self.every, sampling=sampling_of(self)) for i in writing]
            for i, end in zip(writing, ends, strict=True):
                over[i] = end.reason != "length" or kids[i].room <= 0
            found = yield [self._own(kids[i]) if over[i] else self._ask(kids[i]) for i in writing]
            for i, answer in zip(writing, found, strict=True):
                if answer is not None or not over[i]:
                    answers[i] = answer
            last = leading
            ballot = Ballot([a if kid.alive else None for a, kid in zip(answers, kids, strict=True)], self.vote)
            votes = [c for c in ballot.classes if c is not None]
            first = ballot.winner()
            leading = answers[first] if votes else None
            same = rounds > 0 and leading is not None and Ballot([last, leading], self.vote).classes == [0, 0]
            held = held + 1 if same else 1
            rounds += 1
            if rounds <= max(1, self.warmup):  # the first asking is no round of its own, as released
                continue
            winning = ballot.classes[first] if votes else -1
            if leading is not None and votes.count(winning or 0) >= self.share * sum(kid.alive for kid in kids):
                self._prune(kids, over, against, [c == winning for c in ballot.classes])
            if leading is not None and held >= self.stable:
                break
        yield from self._end(trunk, kids, over, answers)
        return answers

    def _ask(self, kid: Thread) -> Generator[Any, Any, Any]:
        """A branch's answer so far."""
        asked = kid.fork([self.probe])[0]
        end: Ended = yield asked.decode(self.probe_tokens, stop=self.probe_stop, sampling={"do_sample": False})
        kid.join(asked, "discard")
        return answer_in(end.text, self.vote, "ParallelProbe")

    def _own(self, kid: Thread) -> Generator[Any, Any, Any]:
        """The answer of a branch that has ended."""
        yield kid
        return answer_in(kid.text, self.vote, "ParallelProbe")

    def _prune(self, kids: list[Thread], over: list[bool], against: list[int], agrees: list[bool]) -> None:
        for i, kid in enumerate(kids):
            if kid.alive and not over[i]:
                against[i] = 0 if agrees[i] else against[i] + 1
        for i, kid in enumerate(kids):
            if sum(k.alive for k in kids) > self.least and not over[i] and against[i] >= self.deviations:
                kid.kill()

    def _end(
        self, trunk: Thread, kids: list[Thread], over: list[bool], answers: list[Any]
    ) -> Generator[Any, Any, None]:
        ballot = Ballot([a if kid.alive else None for a, kid in zip(answers, kids, strict=True)], self.vote)
        winner = ballot.winner()
        if not kids[winner].alive:  # nobody left has an answer
            winner = next(i for i, kid in enumerate(kids) if kid.alive)
        if losers := [kid for i, kid in enumerate(kids) if i != winner and kid.alive]:
            trunk.join(losers, "discard")
        yield trunk.join(kids[winner])
        if not over[winner]:
            trunk.insert(self.probe)
            yield trunk.decode(self.probe_tokens, stop=self.probe_stop, sampling={"do_sample": False})
