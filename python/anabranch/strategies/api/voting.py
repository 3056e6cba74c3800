"""Votes: what an answer is, which one wins, and from when on no further answer can change that."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from anabranch import answers

# What a vote by name looks for in a text; None: the text holds no answer.
READERS: dict[str, Callable[[str], str | None]] = {
    "number": answers.number,
    "boxed": answers.boxed,
    "letter": answers.letter,
    "line": lambda text: next((line.strip() for line in reversed(text.splitlines()) if line.strip()), None),
}

Vote = Callable[[str], Any] | str | None


def check_vote(who: str, vote: Any) -> None:
    """ValueError or TypeError (for the strategy `who`) unless `vote` is a function, a pattern, a name or None."""
    if vote == "boxed":
        answers.require(f"{who}: vote={vote!r}")
    if isinstance(vote, str):
        try:
            re.compile("" if vote in READERS else vote)
        except re.error as error:
            names = ", ".join(READERS)
            raise ValueError(
                f"{who}: vote={vote!r} is neither one of {names} nor a regular expression: {error}"
            ) from None
    elif vote is not None and not callable(vote):
        raise TypeError(f"{who}: vote={vote!r}; pass a function of the text, a pattern, a name or None")


def answer_in(text: str | None, vote: Any, who: str) -> Any:
    """The answer that a text holds, None when it holds none; `vote` is not None."""
    if text is None:
        raise ValueError(f"{who}: vote reads text, but the engine has no tokenizer; pass one, or vote=None")
    if callable(vote):
        return vote(text)
    if vote in READERS:
        return READERS[vote](text)
    matches = list(re.finditer(vote, text))
    if not matches:
        return None
    found = matches[-1].group(matches[-1].re.groups and 1)
    return (found or "").strip() or None  # a group that took no part, or nothing, is no answer


class Ballot:
    """Answers so far, sorted: which of them count as one.

    answers: None is no answer. vote: "boxed" sorts by what the answers mean (`anabranch.answers`): equal values are one
    answer, and units and names of variables tell answers of one value apart, where one that has none goes with the
    only other spelling there is. Every other vote sorts by ``==``.

    classes: the class of each answer, by number, in order of first appearance; None for no answer.
    """

    def __init__(self, found: Sequence[Any], vote: Any = None):
        meant = vote == "boxed"
        values: list[Any] = []  # the first of each value
        self._exact: list[tuple[int, Any] | None] = []  # (value, labels) of each answer
        for answer in found:
            if answer is None:
                self._exact.append(None)
                continue
            read = answers.read(answer) if meant else answer
            same = (lambda v, r=read: answers.same_value(v, r)) if meant else (lambda v, r=read: v is r or v == r)
            value = next((i for i, v in enumerate(values) if same(v)), len(values))
            if value == len(values):
                values.append(read)
            labels = answers.labels(read) if meant else ()
            self._exact.append((value, labels if any(labels) else None))
        self._labels: dict[int, set[Any]] = {}
        for exact in self._exact:
            if exact is not None and exact[1] is not None:
                self._labels.setdefault(exact[0], set()).add(exact[1])
        numbers: dict[Any, int] = {}
        self.classes = [
            None if exact is None else numbers.setdefault(self._joined(exact), len(numbers)) for exact in self._exact
        ]

    def _joined(self, exact: tuple[int, Any]) -> tuple[int, Any]:
        labels = self._labels.get(exact[0], set())
        return (exact[0], next(iter(labels))) if exact[1] is None and len(labels) == 1 else exact

    def winner(self) -> int:
        """Index of the first of the most frequent answers; 0 when there are none."""
        votes = Counter(c for c in self.classes if c is not None)
        return self.classes.index(votes.most_common(1)[0][0]) if votes else 0

    def decided(self, missing: int) -> bool:
        """Whether the leading answer wins whatever the `missing` ones will be, an answer nobody gave so far included.

        They may also bring a second spelling of its value, and answers without one then stand alone: so only those
        count for it that are spelled as it is, and against it all that any other value can have.
        """
        given = [exact for exact in self._exact if exact is not None]
        if not given:
            return False
        spelled, valued = Counter(given), Counter(value for value, _ in given)
        lead, votes = max(spelled.items(), key=lambda item: item[1])
        others = [count for value, count in valued.items() if value != lead[0]]
        others += [count for exact, count in spelled.items() if exact[0] == lead[0] and exact != lead]
        return votes > max(others, default=0) + missing


def majority(found: Sequence[Any], vote: Any = None) -> int:
    """Index of the first of the most frequent answers (None is no answer); 0 when there are none."""
    return Ballot(found, vote).winner()


def decided(found: Sequence[Any], missing: int, vote: Any = None) -> bool:
    """Whether the leading answer wins whatever the `missing` ones will be, an answer nobody gave so far included."""
    return Ballot(found, vote).decided(missing)
