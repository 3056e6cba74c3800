"""Fork where the model is unsure, drop the branches it loses confidence in, and go on with the best."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from anabranch._check import whole_fields
from anabranch.strategies.api.confidence import confidence, rounded
from anabranch.strategies.api.ops import Decode, Ended
from anabranch.strategies.api.strategy import Strategy
from anabranch.strategies.api.thread import Thread
from anabranch.strategies.api.voting import Ballot, Vote, answer_in, check_vote


@dataclass(frozen=True)
class EntropyFork(Strategy):
    """Decode until the entropy of the next token passes `threshold`, or its lead falls under `margin`; there fork into
    `n` sampled branches.

    The doubtful token itself is given up, so that every branch draws its own. A branch whose confidence falls under
    `min_confidence` is killed and its pages are free (DeepConf's rule, Fu et al. 2025, arXiv 2508.15260: a token's
    confidence is minus the mean log-probability of the `k` likeliest tokens, a group's the mean over the last `window`
    tokens; only whole groups count). Should all of them fall, the surest of the fallen goes on.

    The branches write the answer to its end; then, with a `vote` (as in `SelfConsistency`), each answer weighs as much
    as its branches are confident, and the surest branch of the winning one becomes the trunk's. Without a vote the
    branch whose tokens the model found likeliest does. ``result.answers``: what each branch answered (the whole answer,
    what stands before the fork included), None for one that was killed; a single one when there was no doubt.

    threshold: in nats, over the whole next-token distribution (raw scores); None: entropy does not matter.
    margin: fork where the likeliest token's probability is less than this above the second's; None: it does not matter.
    n: branches a fork.
    min_confidence: None: no branch is killed. window, k: see above.
    look_ahead: not to the end, only for so many tokens; then the likeliest branch becomes the trunk's, which may fork
        again, `max_forks` times in all. No vote then, and no answers.
    temperature: of the branches; None leaves the generation config's own.

    >>> engine.generate(prompt, strategy=ab.EntropyFork(threshold=1.5, n=4), max_new_tokens=64).metrics.num_threads
    """

    threshold: float | None = 2.0
    n: int = 4
    vote: Vote = None
    min_confidence: float | None = None
    window: int = 32
    k: int = 20
    look_ahead: int | None = None
    max_forks: int = 8
    temperature: float | None = 1.0
    margin: float | None = None

    needs = ("the entropy of a distribution",)

    def __post_init__(self) -> None:
        check_vote("EntropyFork", self.vote)
        whole_fields(self, ("n", "window", "k", "look_ahead", "max_forks"), optional=("look_ahead",))
        for field, unit in (("threshold", "nats"), ("min_confidence", "nats"), ("margin", "a probability")):
            value = getattr(self, field)
            if value is not None and not isinstance(value, (int, float)):
                raise ValueError(f"EntropyFork: {field}={value!r}; pass a number ({unit})")
        if self.threshold is None and self.margin is None:
            raise ValueError("EntropyFork: threshold=None and margin=None; nothing would ever fork: pass one of them")
        if self.look_ahead is not None and self.vote is not None:
            raise ValueError("EntropyFork: vote with look_ahead: branches that are cut short hold no answers; drop one")

    def run(self, trunk: Thread) -> Generator[Any, Any, list[Any] | None]:
        for _ in range(1 if self.look_ahead is None else self.max_forks):
            ended = yield trunk.decode(stats=True, until=self._doubtful)
            if ended.reason != "until":  # finished without (further) doubt
                return [self._answer(trunk, ())] if self.look_ahead is None else None
            trunk.truncate(trunk.length - 1)  # the doubtful token: every branch draws its own
            kids = trunk.fork(self.n)
            ends = yield from self._branches(kids)
            alive = [i for i, end in enumerate(ends) if end is not None]
            answers = [None if end is None else self._answer(trunk, end.token_ids) for end in ends]
            best = self._best(alive, answers, ends)
            if losers := [kids[i] for i in alive if i != best]:
                trunk.join(losers, "discard")
            yield trunk.join(kids[best])
            if self.look_ahead is None:
                return answers
            if ends[best].reason != "length" or len(ends[best].token_ids) < self.look_ahead:
                return None  # the answer is over, or may not go on
        yield trunk.decode()
        return None

    def _doubtful(self, decode: Decode) -> bool:
        last = decode.stats[-1]
        return (self.threshold is not None and last.entropy > self.threshold) or (
            self.margin is not None and last.margin < self.margin
        )

    def _branches(self, kids: list[Thread]) -> Generator[Any, Any, list[Any]]:
        """Write all branches; how each ended, None for one that was killed."""
        fallen: list[tuple[float, int, Ended]] = []  # at most one: the surest so far (whoever fell first)

        def branch(index: int, kid: Thread) -> Generator[Any, Any, Ended | None]:
            end: Ended = yield self._decode(kid, self._falling())
            if end.reason != "until":
                return end
            fallen.append((rounded(confidence(end.stats)), -index, end))
            fallen.sort()
            if len(fallen) > 1:
                kids[-fallen.pop(0)[1]].kill()
            return None

        ends: list[Any] = yield [branch(i, kid) for i, kid in enumerate(kids)]
        for _, minus, begun in fallen:
            if any(end is not None for end in ends):
                kids[-minus].kill()
            else:
                rest = yield self._decode(kids[-minus], None, len(begun.token_ids))
                stats = (*begun.stats, *rest.stats)
                ends[-minus] = Ended(rest.reason, (*begun.token_ids, *rest.token_ids), None, rest.stop, stats)
        return ends

    def _decode(self, kid: Thread, until: Callable[[Decode], bool] | None, done: int = 0) -> Decode:
        sampling = {"do_sample": True} | ({} if self.temperature is None else {"temperature": self.temperature})
        limit = None if self.look_ahead is None else self.look_ahead - done
        return kid.decode(limit, sampling=sampling, stats=self.k, until=until)

    def _falling(self) -> Callable[[Decode], bool] | None:
        """Whether the last `window` tokens of a branch were too doubtful; one function a branch."""
        least = self.min_confidence
        if least is None:
            return None
        group: deque[float] = deque()
        total = 0.0

        def falls(decode: Decode) -> bool:
            nonlocal total
            group.append(-decode.stats[-1].topk_logprob)
            total += group[-1]
            if len(group) > self.window:
                total -= group.popleft()
            whole = len(group) == self.window and len(decode.token_ids) != self.look_ahead
            return whole and total / self.window < least

        return falls

    def _answer(self, trunk: Thread, more: Sequence[int]) -> Any:
        token_ids = (*trunk.token_ids, *more)
        if self.vote is None and self.look_ahead is not None:
            return None  # nobody will ask
        text = None if trunk.text is None else trunk.text_of(token_ids)
        if self.vote is None:
            return token_ids if text is None else text
        return answer_in(text, self.vote, "EntropyFork")

    def _best(self, alive: list[int], answers: list[Any], ends: list[Any]) -> int:
        """Index of the branch to go on with."""
        if self.vote is not None and any(answers[i] is not None for i in alive):
            classes = Ballot([answers[i] if i in alive else None for i in range(len(ends))], self.vote).classes
            weight: dict[int, float] = {}
            for i, name in enumerate(classes):
                if name is not None:
                    weight[name] = weight.get(name, 0.0) + confidence(ends[i].stats)
            winner = max(weight, key=lambda name: weight[name])
            return max((i for i in alive if classes[i] == winner), key=lambda i: rounded(confidence(ends[i].stats)))
        return max(alive, key=lambda i: rounded(sum(s.logprob for s in ends[i].stats) / max(1, len(ends[i].stats))))
