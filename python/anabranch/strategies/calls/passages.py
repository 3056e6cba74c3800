"""A long prompt taken apart: passages of whole sentences, and the question at its end."""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from typing import Any

from anabranch.strategies.api.asking import ask
from anabranch.strategies.api.strategy import Strategy
from anabranch.strategies.api.thread import Thread

# A sentence with the white space behind it. Too many cuts (behind an abbreviation) do no harm: passages are put
# together from sentences, and what is kept is put together from passages.
SENTENCE = re.compile(r"\S.*?(?:[.!?]+[\"'”’)\]]*(?=\s)|(?=\n)|\Z)\s*", re.DOTALL)


def take_apart(text: str, words: int, question: str | None = None) -> tuple[list[str], str]:
    r"""Passages of up to `words` words, in whole sentences, and the question. Put together again they are `text`.

    question: regular expression of what is asked, from its last match on to the end; None: the last line, or, of a text
    in one line, the last sentence.

    >>> take_apart("Ana is 7. Ben is 9. It rains. Who is older?", 6)
    (['Ana is 7. Ben is 9. ', 'It rains. '], 'Who is older?')
    """
    text = text.strip()
    begin = _question_at(text, question)
    passages: list[str] = []
    room = 0
    for sentence in SENTENCE.findall(text[:begin]):
        size = len(sentence.split())
        if not passages or size > room:
            passages.append("")
            room = words
        passages[-1] += sentence
        room -= size
    return passages, text[begin:]


def _question_at(text: str, question: str | None) -> int:
    if question is not None:
        return max((match.start() for match in re.finditer(question, text, re.DOTALL)), default=0)
    if "\n" in text:
        return text.rindex("\n") + 1
    *_, last = SENTENCE.finditer(text)
    return last.start()


def check_question(who: str, question: str | None) -> None:
    """ValueError (for the strategy `who`) unless `question` is None or a regular expression."""
    if question is None:
        return
    try:
        re.compile(question)
    except (re.error, TypeError) as error:
        raise ValueError(f"{who}: question={question!r} is no regular expression ({error})") from None


class OverPassages(Strategy):
    """What strategies that read a long prompt passage by passage share: another one writes the answer, in a context of
    its own."""

    strategy: Strategy | None

    @property
    def needs(self) -> Sequence[str]:  # type: ignore[override]
        assert self.strategy is not None
        return self.strategy.needs

    def _answer(self, trunk: Thread, prompt: str) -> Generator[Any, Any, None]:
        """Answer `prompt` in a new context, and bring the answer back."""
        assert self.strategy is not None
        answer = trunk.spawn(ask(trunk, prompt))
        yield answer
        yield from self.strategy.run(answer)
        yield trunk.join(answer, "reprefill")
