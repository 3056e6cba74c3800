"""Beam search over tokens, as Transformers does it."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

from anabranch._check import number, whole_fields
from anabranch.strategies.api.strategy import Strategy
from anabranch.strategies.api.thread import Thread
from anabranch.strategies.search.beam_groups import search_in_groups
from anabranch.strategies.search.beams import Beam, no_room, rank, require, score
from anabranch.strategies.search.pool import Pool, answer_of


@dataclass(frozen=True, kw_only=True)
class BeamSearch(Strategy):
    """Beam search: token for token what ``model.generate(num_beams=width, …)`` of Transformers writes.

    The `width` likeliest texts go on side by side, each a thread; where one of them goes on in several ways, threads
    that fell out become it, and its pages are shared. Finished texts keep a thread of their own. The trunk becomes the
    best; ``result.answers`` lists the `num_return_sequences` best, best first. ``width=1`` decodes plainly.

    length_penalty: a finished text's score is its sum of log-probabilities over ``length ** length_penalty``.
    early_stopping: False ends when the best text still running is worse than the worst finished one at its present
        length; True as soon as `width` texts are finished; "never" only when no running one can become better.
    num_beam_groups, diversity_penalty: diverse beam search (Vijayakumar et al. 2016, arXiv 1610.02424), as Transformers
        4 had it and ``transformers-community/group-beam-search`` has it: `width` is divided into groups that choose one
        after another, and a token costs the penalty for each beam of an earlier group that took it in this step.
    do_sample: candidates are drawn without replacement in the place of the likeliest; None: as the call, or the model's
        generation config, says.
    sampling: fields of GenerationConfig that differ here; those of the call (``repetition_penalty=…``) hold as well.
    max_new_tokens: of a text; None leaves the answer's own limit.

    >>> engine.generate(prompt, strategy=ab.BeamSearch(width=4), max_new_tokens=64).text
    """

    width: int = 4
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return_sequences: int = 1
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0
    do_sample: bool | None = None
    sampling: Mapping[str, Any] | None = None
    max_new_tokens: int | None = None

    needs = ("the likeliest next tokens",)

    def __post_init__(self) -> None:
        names = ("width", "num_return_sequences", "num_beam_groups", "max_new_tokens")
        whole_fields(self, names, optional=("max_new_tokens",))
        for name in ("length_penalty", "diversity_penalty"):
            object.__setattr__(self, name, number(getattr(self, name), f"BeamSearch: {name}"))
        if self.early_stopping not in (True, False, "never") or isinstance(self.early_stopping, (int, float)) != (
            isinstance(self.early_stopping, bool)
        ):
            raise ValueError(f"BeamSearch: early_stopping={self.early_stopping!r}; pass True, False or 'never'")
        if self.num_return_sequences > self.width:
            raise ValueError(
                f"BeamSearch: num_return_sequences={self.num_return_sequences} of width={self.width} beams; pass a "
                "number up to width"
            )
        if self.width % self.num_beam_groups:
            raise ValueError(
                f"BeamSearch: num_beam_groups={self.num_beam_groups} does not divide width={self.width}; pass a divisor"
            )
        if self.diversity_penalty and self.num_beam_groups == 1:
            raise ValueError("BeamSearch: diversity_penalty needs num_beam_groups of at least 2; it compares groups")
        if self.do_sample and self.num_beam_groups > 1:
            raise ValueError("BeamSearch: do_sample=True with num_beam_groups is not defined; drop one of them")

    @property
    def overrides(self) -> dict[str, Any]:
        do_sample = False if self.num_beam_groups > 1 else self.do_sample
        return ({} if do_sample is None else {"do_sample": do_sample}) | dict(self.sampling or {})

    def run(self, trunk: Thread) -> Generator[Any, Any, list[Any]]:
        if self.width == 1:
            yield trunk.decode(self.max_new_tokens, sampling=self.overrides)
            return [answer_of(trunk)]
        if self.num_beam_groups > 1:
            return (yield from search_in_groups(self, trunk))
        pool = Pool(trunk, self.width)
        wanted = max(2, 1 + len(trunk.eos_ids)) * self.width  # enough to go on with, should all of the first end
        running, done = [Beam(0.0, pool.threads[0])], list[Beam]()
        limit, length, over = None, 0, False
        while running and not over:
            found = yield [b.thread.candidates(wanted, sampling=self.overrides) for b in running]
            limit = self.limit(found[0].left) if limit is None else limit
            if no_room(found, self.width):
                break
            length += 1
            ranked = rank(running, found, wanted, length >= limit)
            ended = [c for c in ranked[: self.width] if c.ends]
            going = [c for c in ranked if not c.ends][: self.width]
            old = [(b.score, b, None) for b in done]
            new = [(score(c.score, length, self.length_penalty), running[c.beam], c) for c in ended]
            best = sorted([*old, *new], key=lambda item: -item[0])[: self.width]
            kept = [b.thread for _, b, c in best if c is None]
            sources = [running[c.beam].thread for c in going] + [b.thread for _, b, c in best if c is not None]
            threads = yield from pool.copies(sources, kept)
            tokens = [c.token for c in going] + [c.token for _, _, c in best if c is not None]
            yield [thread.choose(token) for thread, token in zip(threads, tokens, strict=True)]
            finished = iter(threads[len(going) :])
            done = [b if c is None else Beam(total, next(finished)) for total, b, c in best]
            running = [Beam(c.score, thread) for c, thread in zip(going, threads, strict=False)]
            over = not running or (len(done) == self.width and not self._improves(running[0], done[-1], length, limit))
        if not over:  # no room for another token
            done += [Beam(score(b.score, max(1, length), self.length_penalty), b.thread) for b in running]
            done = sorted(done, key=lambda b: -b.score)
        require(done)
        answers = [answer_of(b.thread) for b in done[: self.num_return_sequences]]
        yield from pool.settle(done[0].thread)
        return answers

    def limit(self, left: int) -> int:
        """Most tokens a text may have, of which the thread may still be given `left`."""
        return left if self.max_new_tokens is None else min(left, self.max_new_tokens)

    def _improves(self, best: Beam, worst: Beam, length: int, limit: int) -> bool:
        """Whether the best running text may still become better than the worst of `width` finished ones."""
        if self.early_stopping is True:
            return False
        longest = self.early_stopping == "never" and self.length_penalty > 0
        return score(best.score, limit if longest else length, self.length_penalty) > worst.score
