"""Best of n: sample the same prompt n times and keep the one that a scorer likes best."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from anabranch._check import whole_fields
from anabranch.strategies.api.strategy import Strategy
from anabranch.strategies.api.thread import Thread
from anabranch.strategies.search.scoring import Scored, Scorer, check_scorer, score, stats_for


@dataclass(frozen=True, kw_only=True)
class BestOfN(Strategy):
    """Fork behind the prompt into `n` sampled branches; the trunk becomes the one with the highest score.

    The prompt is computed once, and its KV exists once. Among equals the earlier branch wins. ``result.answers`` lists
    what each branch wrote, in order.

    scorer: a function of the text that returns a number (a reward model, a test that passes or not), which may also
        take ``prompt`` and ``token_ids`` by these names (without a tokenizer the text is the token ids); or a name:
        "logprob" (mean log-probability of the tokens), "logprob_sum", "confidence" (DeepConf's mean confidence). One
        that raises ends the call with `ScorerFailed`, which names it and the branch and holds the texts.
    temperature, top_p, top_k: None leaves the generation config's own value.
    max_new_tokens: of a branch; None leaves the answer's own limit.

    >>> engine.generate(prompt, strategy=ab.BestOfN(n=8, scorer=lambda text: -len(text)))
    """

    n: int = 8
    scorer: Scorer = "logprob"
    temperature: float | None = 0.8
    top_p: float | None = None
    top_k: int | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        whole_fields(self, ("n", "max_new_tokens"), optional=("max_new_tokens",))
        check_scorer("BestOfN", self.scorer)

    def run(self, trunk: Thread) -> Generator[Any, Any, list[Any]]:
        sampling = sampling_of(self)
        kids = trunk.fork(self.n)
        stats = stats_for(self.scorer)
        ends = yield [kid.decode(self.max_new_tokens, sampling=sampling, stats=stats) for kid in kids]
        items = [Scored.of(end, trunk.prompt) for end in ends]
        answers = [item.answer for item in items]
        scores = [score("BestOfN", self.scorer, item, f"branch {i}", answers) for i, item in enumerate(items)]
        winner = kids[max(range(self.n), key=lambda i: scores[i])]
        if losers := [kid for kid in kids if kid is not winner]:
            trunk.join(losers, "discard")
        trunk.join(winner)
        return answers


def sampling_of(strategy: Any) -> dict[str, Any]:
    """The sampling that a strategy's fields temperature, top_p and top_k ask for."""
    chosen = {name: getattr(strategy, name, None) for name in ("temperature", "top_p", "top_k")}
    return {"do_sample": True} | {name: value for name, value in chosen.items() if value is not None}
