"""Each passage of a long prompt read by a thread of its own; the answer is written from those that matter."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from anabranch._check import number, whole_fields
from anabranch.strategies.api.asking import question_of
from anabranch.strategies.api.strategy import Strategy
from anabranch.strategies.api.thread import Thread
from anabranch.strategies.calls.passages import OverPassages, check_question, take_apart
from anabranch.strategies.plain import inner_of


@dataclass(frozen=True)
class SelectPassages(OverPassages):
    """Fork a thread for each passage of the prompt, keep the passages that the question needs, answer from those.

    A thread sees one passage and nothing else. It is not asked to write: what counts is how much likelier the question
    is to the model behind the passage than alone (Sachan et al. 2022, arXiv 2204.07496, rank passages that way), which
    works untrained, and with small models. The prompt with the other passages cut out goes into a new context, and
    there the answer is written; no thread ever sees the whole prompt. ``result.answers`` lists the passages kept.

    strategy: how the answer is written; None: plain decoding. One that puts new prompts together itself (as
        `SkeletonOfThought` does) goes back to the whole prompt, so it gains nothing here.
    passage_words: most words of a passage, which is made of whole sentences; fewer select more finely.
    keep: a passage stays if it makes the question likelier by this share of what the best one does. 0: all that make
        it likelier at all. Where none does, all stay.
    question: regular expression of what is asked, from its last match on to the prompt's end; None: the prompt's last
        line, or, where it is one line, its last sentence.

    >>> report = "It rained on Monday. Ana signed the report. The mill is old."
    >>> select = ab.SelectPassages(passage_words=5)
    >>> result = engine.generate(f"{report} Who signed it?", strategy=select, max_new_tokens=8)
    >>> 1 <= len(result.answers) <= 3  # of three passages
    True
    """

    strategy: Strategy | None = None
    passage_words: int = 20
    keep: float = 0.5
    question: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "strategy", inner_of("SelectPassages", self.strategy))
        whole_fields(self, ("passage_words",))
        if not 0 <= number(self.keep, "SelectPassages: keep") <= 1:
            raise ValueError(f"SelectPassages: keep={self.keep!r}; pass a share from 0 to 1")
        check_question("SelectPassages", self.question)

    def run(self, trunk: Thread) -> Generator[Any, Any, list[str]]:
        passages, question = take_apart(question_of(trunk, "SelectPassages"), self.passage_words, self.question)
        kept = passages
        if len(passages) > 1:
            readers = [trunk.spawn(f"{passage.strip()}\n") for passage in ("", *passages)]
            found = yield [reader.score(question) for reader in readers]
            trunk.join(readers, "discard")
            alone, *behind = map(sum, found)
            kept = self._kept(passages, [likelihood - alone for likelihood in behind])
        yield from self._answer(trunk, "".join(kept) + question)
        return kept

    def _kept(self, passages: list[str], gains: list[float]) -> list[str]:
        """Those that stay, in the prompt's order. gains: nats by which each makes the question likelier."""
        least = self.keep * max(gains)
        if max(gains) <= 0:
            return passages
        return [passage for passage, gain in zip(passages, gains, strict=True) if gain >= least and gain > 0]
