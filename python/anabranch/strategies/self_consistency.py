"""Self-consistency: sample the same prompt n times, then vote (Wang et al. 2022, arXiv 2203.11171)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Generator, Hashable
from dataclasses import dataclass
from typing import Any

from .ops import Ended
from .protocol import Strategy, Thread

# What a vote by name looks for: the last match counts, its first group if it has one.
EXTRACTORS = {
    "number": r"-?\d+(?:,\d{3})*(?:\.\d+)?",
    "boxed": r"\\boxed\{([^{}]*)\}",
    "letter": r"\b([A-E])\b",
    "line": r"[^\n]*\S[^\n]*",
}


@dataclass(frozen=True)
class SelfConsistency(Strategy):
    """Fork after the prompt into `n` sampled branches; the trunk becomes the winning one.

    The prompt is computed once, and its KV exists once. ``result.answers`` lists what each branch answered, in order.

    vote: what an answer is, to be counted — a function of a branch's text (None: it has no answer), a regular
    expression (its last match, the first group if there is one), or a name: "number", "boxed", "letter", "line". The
    most frequent answer wins, the earlier branch among equals. None: no vote, the answers are the texts (token ids
    without a tokenizer), and the branch whose tokens the model found likeliest (mean log-probability) wins.
    temperature, top_p, top_k: None leaves the generation config's own value.
    max_new_tokens: of a branch; None leaves the answer's own limit.
    """

    n: int = 8
    vote: Callable[[str], Hashable] | str | None = None
    temperature: float | None = 0.8
    top_p: float | None = None
    top_k: int | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.n, int) or self.n < 1:
            raise ValueError(f"SelfConsistency: n={self.n!r}; pass a number of branches of at least 1")
        if isinstance(self.vote, str):
            try:
                re.compile(EXTRACTORS.get(self.vote, self.vote))
            except re.error as error:
                names = ", ".join(EXTRACTORS)
                raise ValueError(
                    f"SelfConsistency: vote={self.vote!r} is neither one of {names} nor a regular expression: {error}"
                ) from None
        elif self.vote is not None and not callable(self.vote):
            raise TypeError(
                f"SelfConsistency: vote={self.vote!r}; pass a function of the text, a pattern, a name or None"
            )

    def run(self, trunk: Thread) -> Generator[Any, Any, list[Any]]:
        chosen = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        sampling = {"do_sample": True} | {k: v for k, v in chosen.items() if v is not None}
        kids = trunk.fork(self.n)
        ends = yield [
            kid.decode(self.max_new_tokens, sampling=sampling, stats="logprob" if self.vote is None else False)
            for kid in kids
        ]
        answers = [self.answer(end) for end in ends]
        winner = kids[self.elect(answers, ends)]
        if self.n > 1:
            trunk.join([kid for kid in kids if kid is not winner], "discard")
        trunk.join(winner)
        return answers

    def answer(self, end: Ended) -> Any:
        """The answer a branch gave, None when its text holds none."""
        if self.vote is None:
            return end.token_ids if end.text is None else end.text
        if end.text is None:
            raise ValueError(
                "SelfConsistency: vote reads text, but the engine has no tokenizer; pass one, or vote=None"
            )
        if callable(self.vote):
            return self.vote(end.text)
        matches = list(re.finditer(EXTRACTORS.get(self.vote, self.vote), end.text))
        if not matches:
            return None
        found = matches[-1].group(matches[-1].re.groups and 1)
        return found.replace(",", "") if self.vote == "number" else found.strip()

    def elect(self, answers: list[Any], ends: list[Ended]) -> int:
        """Index of the winning branch."""
        if self.vote is None:
            return max(
                range(len(ends)), key=lambda i: sum(s.logprob for s in ends[i].stats) / max(1, len(ends[i].stats))
            )
        votes = Counter(a for a in answers if a is not None)
        return answers.index(votes.most_common(1)[0][0]) if votes else 0
