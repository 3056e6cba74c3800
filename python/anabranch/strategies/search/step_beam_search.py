"""Beam search over thoughts: beams go on by whole steps, which a scorer ranks."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from anabranch._check import whole_fields
from anabranch.strategies.api.strategy import Strategy
from anabranch.strategies.api.thread import Thread
from anabranch.strategies.search.best_of_n import sampling_of
from anabranch.strategies.search.levels import State, best_of, grow
from anabranch.strategies.search.pool import Pool, answer_of
from anabranch.strategies.search.scoring import Scorer, check_scorer, score


@dataclass(frozen=True, kw_only=True)
class StepBeamSearch(Strategy):
    """`width` beams; each writes `samples` next steps, and the `width` best texts of all go on, until all have ended.

    A step is what is decoded to `stop`, a line by default. Texts that have come to their end stay and compete. The
    trunk becomes the best text. ``result.answers``: the `width` texts at the end, best first.

    scorer: how good a text is: a function of it (a process reward model, say) or a name, as for `BestOfN`; "logprob" is
        the mean over the whole text.
    max_steps: at most so many steps; None: to the end. step_tokens: most tokens of a step.
    temperature, top_p, top_k: of the steps.

    >>> engine.generate(prompt, strategy=ab.StepBeamSearch(width=2, samples=3, step_tokens=16), max_new_tokens=64).text
    """

    width: int = 4
    samples: int = 4
    scorer: Scorer = "logprob"
    stop: str | tuple[str, ...] = "\n"
    step_tokens: int = 256
    max_steps: int | None = None
    temperature: float | None = 0.8
    top_p: float | None = None
    top_k: int | None = None

    def __post_init__(self) -> None:
        whole_fields(self, ("width", "samples", "step_tokens", "max_steps"), optional=("max_steps",))
        check_scorer("StepBeamSearch", self.scorer)

    def run(self, trunk: Thread) -> Generator[Any, Any, list[Any]]:
        pool = Pool(trunk, self.width * self.samples)
        states = [State(pool.threads[0])]
        ways, steps = self.width * self.samples, 0  # the first step: all from the one place there is
        while not all(state.over for state in states) and steps != self.max_steps:
            states = yield from grow(pool, states, ways, self._step)
            written = [state.scored().answer for state in states]
            for state in states:
                item = state.scored()
                state.score = score("StepBeamSearch", self.scorer, item, f"thread {state.thread.id}", written)
            states, ways, steps = best_of(states, self.width), self.samples, steps + 1
        answers = [answer_of(state.thread) for state in states]
        yield from pool.settle(states[0].thread)
        return answers

    def _step(self, thread: Thread) -> Any:
        stats: Any = isinstance(self.scorer, str)
        return thread.decode(self.step_tokens, stop=self.stop, sampling=sampling_of(self), stats=stats)
