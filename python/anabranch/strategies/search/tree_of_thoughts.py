"""Tree of Thoughts: propose thoughts, judge them, keep the best of each level (Yao et al. 2023, arXiv 2305.10601)."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from math import exp
from typing import Any

from anabranch._check import whole_fields
from anabranch.strategies.api.strategy import Strategy
from anabranch.strategies.api.thread import Thread
from anabranch.strategies.search.best_of_n import sampling_of
from anabranch.strategies.search.levels import State, best_of, grow
from anabranch.strategies.search.pool import Pool, answer_of
from anabranch.strategies.search.scoring import Scorer, check_scorer, score


@dataclass(frozen=True, kw_only=True)
class TreeOfThoughts(Strategy):
    """Breadth first over thoughts: at each of `depth` levels every kept state proposes `propose` next thoughts, all are
    judged, and the `keep` best go on. The trunk becomes the best state of the last level and writes on to its end.

    A state that has come to its end (EOS) stays as it is and competes. ``result.answers``: the texts kept at the end,
    best first.

    scorer: None: the model judges itself: behind the state, `question` is put on the side, and the state is worth the
        probability of `yes` against that of `no` there. Else a function of the text so far (since the search began), or
        a name, as for `BestOfN`.
    thought_tokens, stop: a thought is over after so many tokens, or with one of these texts.
    temperature, top_p, top_k: of the proposals.

    >>> engine.generate(prompt, strategy=ab.TreeOfThoughts(depth=2, propose=2, thought_tokens=16)).text
    """

    depth: int = 3
    propose: int = 3
    keep: int = 2
    thought_tokens: int = 128
    stop: str | tuple[str, ...] = "\n"
    scorer: Scorer | None = None
    question: str = "\nIs this going to lead to the right answer? Answer yes or no:"
    yes: str = " yes"
    no: str = " no"
    temperature: float | None = 0.8
    top_p: float | None = None
    top_k: int | None = None

    def __post_init__(self) -> None:
        whole_fields(self, ("depth", "propose", "keep", "thought_tokens"))
        if self.scorer is not None:
            check_scorer("TreeOfThoughts", self.scorer)
        elif not (self.question and self.yes and self.no):
            raise ValueError("TreeOfThoughts: question, yes and no must not be empty where the model is the judge")

    def run(self, trunk: Thread) -> Generator[Any, Any, list[Any]]:
        pool = Pool(trunk, self.propose)
        states = [State(pool.threads[0])]
        for _ in range(self.depth):
            states = yield from grow(pool, states, self.propose, self._think)
            yield [self._judge(state) for state in states if not state.judged]
            states = best_of(states, self.keep)
            if all(state.over for state in states):
                break
        answers = [answer_of(state.thread) for state in states]
        yield from pool.settle(states[0].thread)
        if not states[0].over:
            yield trunk.decode()
        return answers

    def _think(self, thread: Thread) -> Any:
        stats: Any = isinstance(self.scorer, str)
        return thread.decode(self.thought_tokens, stop=self.stop, sampling=sampling_of(self), stats=stats)

    def _judge(self, state: State) -> Generator[Any, Any, None]:
        state.judged = True
        if self.scorer is not None:
            yield state.thread
            item = state.scored()
            state.score = score("TreeOfThoughts", self.scorer, item, f"thread {state.thread.id}", [item.answer])
            return
        if state.thread.token_ids and state.thread.token_ids[-1] in state.thread.eos_ids:
            state.thread.truncate(state.thread.length - 1)  # the question goes on where the text ends
        judge = state.thread.fork([self.question])[0]
        verdicts = judge.fork(2)
        found = yield [kid.score(word) for kid, word in zip(verdicts, (self.yes, self.no), strict=True)]
        yes, no = (exp(sum(logprobs)) for logprobs in found)
        state.score = round(yes / (yes + no), 4) if yes + no else 0.0
        yield state.thread.join(judge, "discard")
