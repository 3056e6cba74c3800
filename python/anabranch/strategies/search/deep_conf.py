"""DeepConf: traces that lose confidence are ended early, and the sure ones vote (Fu et al. 2025, arXiv 2508.15260)."""

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
from anabranch.strategies.search.confidence import MEASURES, Confidence, falls_below, percentile
from anabranch.strategies.search.scoring import one_of


@dataclass(frozen=True, kw_only=True)
class DeepConf(Strategy):
    """Sample `n` traces, drop the unsure, and let the others vote, each with the weight of its confidence.

    mode "online": the first `warmup` traces run to their end. The percentile of their confidences that leaves `keep` of
    them is the bar: each further trace is ended, and its pages are free, as soon as its last `window` tokens fall under
    it (not before it has so many). Traces under the bar, warm-up ones included, do not vote. "offline": all traces run
    to their end, and those under the same percentile of all of them do not vote.

    The trunk becomes the surest trace with the winning answer; the surest trace of all where none may vote or holds an
    answer. ``result.answers``: each trace's answer, in order, None for one that was ended early or holds none.

    n: traces in all, warm-up ones included. keep: 0.9 ("DeepConf-high") or 0.1 ("DeepConf-low").
    window, k: tokens a group; likeliest tokens that make up a token's confidence.
    measure: what a trace weighs: "lowest" group (the only one online), or offline also "mean", "tail" (its last group),
        "bottom" (mean of the lowest tenth of its groups).
    vote: what an answer is, as for `SelfConsistency`. temperature, top_p, top_k, max_new_tokens: of a trace.

    >>> engine.generate(prompt, strategy=ab.DeepConf(n=8, warmup=2, keep=0.9, window=16), max_new_tokens=64).answers
    """

    n: int = 16
    mode: str = "online"
    keep: float = 0.9
    warmup: int = 16
    window: int = 2048
    k: int = 20
    measure: str = "lowest"
    vote: Vote = "boxed"
    temperature: float | None = 0.6
    top_p: float | None = 0.95
    top_k: int | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        whole_fields(self, ("n", "warmup", "window", "k", "max_new_tokens"), optional=("max_new_tokens",))
        one_of("DeepConf", "mode", self.mode, ("online", "offline"))
        one_of("DeepConf", "measure", self.measure, tuple(MEASURES))
        if self.mode == "online" and self.measure != "lowest":
            raise ValueError(
                f"DeepConf: measure={self.measure!r} online; the bar is of lowest groups: drop one of them"
            )
        if not 0 < number(self.keep, "DeepConf: keep") <= 1:
            raise ValueError(f"DeepConf: keep={self.keep!r}; pass a share above 0, up to 1 (0.9 keeps 90 %)")
        if self.vote is None:
            raise ValueError("DeepConf: vote=None, but the traces vote; pass a function, a pattern or a name")
        check_vote("DeepConf", self.vote)

    def run(self, trunk: Thread) -> Generator[Any, Any, list[Any]]:
        bar = float("-inf")
        first = self.n if self.mode == "offline" else min(self.warmup, self.n)
        kids = trunk.fork(first)
        traces, ends = yield from self._write(kids, bar)
        bar = percentile([MEASURES[self.measure](t) for t in traces], 100 * (1 - self.keep))
        if first < self.n:
            more = trunk.fork(self.n - first)
            further = yield from self._write(more, bar)
            kids, traces, ends = kids + more, traces + further[0], ends + further[1]
        weights = [MEASURES[self.measure](trace) for trace in traces]
        answers = [None if e.reason == "until" else answer_in(e.text, self.vote, "DeepConf") for e in ends]
        winner = self._elect([a if w >= bar else None for a, w in zip(answers, weights, strict=True)], weights, ends)
        if losers := [kid for i, kid in enumerate(kids) if i != winner and kid.alive]:
            trunk.join(losers, "discard")
        trunk.join(kids[winner])
        return answers

    def _write(self, kids: list[Thread], bar: float) -> Generator[Any, Any, tuple[list[Confidence], list[Ended]]]:
        """Each kid's trace, to its end or until it falls; a fallen one is killed."""
        traces = [Confidence(self.window) for _ in kids]

        def write(kid: Thread, trace: Confidence) -> Generator[Any, Any, Ended]:
            until = falls_below(bar, trace)
            end: Ended = yield kid.decode(self.max_new_tokens, sampling=sampling_of(self), stats=self.k, until=until)
            for stats in end.stats[len(trace.tokens) :]:  # of the token that ended it otherwise
                trace.push(stats)
            if end.reason == "until":
                kid.kill()
            return end

        ends: list[Ended] = yield [write(kid, trace) for kid, trace in zip(kids, traces, strict=True)]
        return traces, ends

    def _elect(self, votes: list[Any], weights: list[float], ends: list[Ended]) -> int:
        """Index of the trace that the trunk becomes."""
        classes = Ballot(votes, self.vote).classes
        total: dict[int, float] = {}
        for name, weight in zip(classes, weights, strict=True):
            if name is not None:
                total[name] = total.get(name, 0.0) + weight
        best = max(total, key=lambda name: total[name]) if total else None
        may = [i for i, name in enumerate(classes) if name == best and ends[i].reason != "until"]
        return max(may, key=lambda i: weights[i])
