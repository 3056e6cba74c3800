"""Votes: what an answer is, which one wins, and from when on no further answer can change that."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

# What a vote by name looks for: the last match counts, its first group if it has one.
EXTRACTORS = {
    "number": r"-?\d+(?:,\d{3})*(?:\.\d+)?",
    "boxed": r"\\boxed\{([^{}]*)\}",
    "letter": r"\b([A-E])\b",
    "line": r"[^\n]*\S[^\n]*",
}

Vote = Callable[[str], Hashable] | str | None


def check_vote(who: str, vote: Any) -> None:
    """ValueError or TypeError (for the strategy `who`) unless `vote` is a function, a pattern, a name or None."""
    if isinstance(vote, str):
        try:
            re.compile(EXTRACTORS.get(vote, vote))
        except re.error as error:
            names = ", ".join(EXTRACTORS)
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
    matches = list(re.finditer(EXTRACTORS.get(vote, vote), text))
    if not matches:
        return None
    found = matches[-1].group(matches[-1].re.groups and 1)
    return found.replace(",", "") if vote == "number" else found.strip()


def majority(answers: Sequence[Any]) -> int:
    """Index of the first of the most frequent answers (None is no answer); 0 when there are none."""
    votes = Counter(a for a in answers if a is not None)
    return list(answers).index(votes.most_common(1)[0][0]) if votes else 0


def decided(answers: Sequence[Any], missing: int) -> bool:
    """Whether the leading answer wins whatever the `missing` ones will be, an answer nobody gave so far included."""
    votes = [count for _, count in Counter(a for a in answers if a is not None).most_common(2)]
    return bool(votes) and votes[0] > (votes[1] if len(votes) > 1 else 0) + missing
