"""A long prompt read passage by passage; each is forgotten again, and a summary goes on."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from anabranch._check import whole_fields
from anabranch.strategies.api.asking import ask, check_fills, fill, question_of
from anabranch.strategies.api.strategy import Strategy
from anabranch.strategies.api.thread import Thread
from anabranch.strategies.calls.passages import OverPassages, check_question, take_apart
from anabranch.strategies.plain import inner_of

REQUEST = (
    "Question: {question}\n\nNotes so far: {summary}\n\nThe text goes on: {passage}\n\nThe question will be answered "
    "from your notes alone. Write the notes again, in one or two short sentences, with what this text adds to them "
    "for the question. Leave out what the question does not need."
)
FINAL = "{summary}\n\n{question}"


@dataclass(frozen=True)
class RunningSummary(OverPassages):
    """Read the prompt one passage after another, each in a new context that holds the summary so far; answer from it.

    Each passage is discarded once the model has written the summary anew. No context holds more than the summary, one
    passage and the question. ``result.answers`` lists the summaries, one a passage.

    strategy: how the answer is written; None: plain decoding (as for `SelectPassages`).
    passage_words: most words of a passage, which is made of whole sentences.
    summary_tokens: most tokens sampled for a summary. summary_stop: text that ends one (EOS does as well).
    request: what is asked at each passage; ``{question}``, ``{summary}`` and ``{passage}`` are filled in.
    final: the prompt that is answered; ``{question}`` and ``{summary}`` are filled in.
    nothing: stands for the summary before the first passage.
    question: as for `SelectPassages`.

    An empty summary is counted as malformed, and the one before it stays. A prompt without a passage before its
    question is answered as it is.

    >>> report = "It rained on Monday. Ana signed the report. The mill is old."
    >>> notes = ab.RunningSummary(passage_words=5, summary_tokens=8)
    >>> result = engine.generate(f"{report} Who signed it?", strategy=notes, max_new_tokens=8)
    >>> len(result.answers)  # a summary a passage
    3
    """

    strategy: Strategy | None = None
    passage_words: int = 100
    summary_tokens: int = 64
    summary_stop: str | tuple[str, ...] = "\n\n"
    request: str = REQUEST
    final: str = FINAL
    nothing: str = "none yet"
    question: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "strategy", inner_of("RunningSummary", self.strategy))
        whole_fields(self, ("passage_words", "summary_tokens"))
        check_fills(self, "request", ("summary", "passage"))
        check_fills(self, "final", ("summary", "question"))
        check_question("RunningSummary", self.question)

    def run(self, trunk: Thread) -> Generator[Any, Any, list[str]]:
        passages, question = take_apart(question_of(trunk, "RunningSummary"), self.passage_words, self.question)
        summaries: list[str] = []
        for passage in passages:
            told = {"question": question, "summary": summaries[-1] if summaries else self.nothing}
            reader = trunk.spawn(ask(trunk, fill(self.request, passage=passage.strip(), **told)))
            end = yield reader.decode(self.summary_tokens, stop=self.summary_stop)
            summary = end.text.strip()
            if not summary:
                reader.malformed("an empty summary; the one before it stays")
                summary = told["summary"]
            summaries.append(summary)
            trunk.join(reader, "discard")
        asked = fill(self.final, question=question, summary=summaries[-1]) if summaries else question
        yield from self._answer(trunk, asked)
        return summaries
