"""Scorers: functions or names that say how good a text is."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from anabranch._check import nearest
from anabranch.strategies.api.ops import Ended, TokenStats

Scorer = Callable[..., float] | str

# Scores by name: from what the model thought of the tokens it sampled.
NAMED: dict[str, Callable[[Sequence[TokenStats]], float]] = {
    "logprob": lambda stats: sum(s.logprob for s in stats) / max(1, len(stats)),
    "logprob_sum": lambda stats: sum(s.logprob for s in stats),
    "confidence": lambda stats: -sum(s.topk_logprob for s in stats) / max(1, len(stats)),
}
_TAKES = ("text", "prompt", "token_ids")


class ScorerFailed(ValueError):
    """A scorer raised, or returned what is no score. ``texts``: what had been written by then."""

    def __init__(self, message: str, texts: Sequence[Any] = ()):
        super().__init__(message)
        self.texts = tuple(texts)


def one_of(who: str, field: str, value: Any, names: Sequence[str], more: str = "") -> None:
    """ValueError for a name that is none of `names`, with the nearest of them; `more`: what else may be passed."""
    if value not in names:
        near = nearest(str(value), names, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{who}: {field}={value!r}; {hint}pass one of {', '.join(map(repr, names))}{more}")


def check_scorer(who: str, scorer: Any) -> None:
    """ValueError or TypeError (for the strategy `who`) unless `scorer` is a function or the name of one."""
    if isinstance(scorer, str):
        one_of(who, "scorer", scorer, list(NAMED), ", or a function of the text")
    elif not callable(scorer):
        raise TypeError(f"{who}: scorer={scorer!r}; pass a function of the text, or one of {', '.join(NAMED)}")


def stats_for(scorer: Any) -> bool | str:
    """What a decode has to record for `scorer`."""
    return {"confidence": True}.get(scorer, "logprob") if isinstance(scorer, str) else False


@dataclass(frozen=True)
class Scored:
    """What a scorer may look at: the text (token ids without a tokenizer), the prompt, the statistics of its tokens."""

    text: str | None
    token_ids: tuple[int, ...]
    prompt: Any
    stats: tuple[TokenStats, ...] = ()

    @classmethod
    def of(cls, ended: Ended, prompt: Any) -> Scored:
        return cls(ended.text, ended.token_ids, prompt, ended.stats)

    @property
    def answer(self) -> Any:
        return self.token_ids if self.text is None else self.text


def score(who: str, scorer: Any, item: Scored, name: str, written: Sequence[Any] = ()) -> float:
    """The score of `item`, which errors call `name`; the higher, the better.

    A function takes the text, or any of ``text``, ``prompt`` and ``token_ids`` by name.
    Named scores are rounded: two branches with the same tokens tie, in whatever company they were computed.
    """
    if isinstance(scorer, str):
        return round(NAMED[scorer](item.stats), 4)
    return judged(who, scorer, _arguments(scorer, item), name, written)


def judged(who: str, function: Any, given: tuple[list[Any], Mapping[str, Any]], name: str, written: Any = ()) -> float:
    """What a caller's function says of something, checked."""
    title = getattr(function, "__name__", type(function).__name__)
    try:
        value = function(*given[0], **given[1])
    except Exception as error:
        what = f"raised {type(error).__name__}: {error}"
        raise ScorerFailed(f"{who}: scorer {title} {what}, for {name}; mend the scorer", written) from error
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = float("nan")
    if not isfinite(found):
        raise ScorerFailed(
            f"{who}: scorer {title} returned {value!r} for {name}; it must return a finite number", written
        )
    return found


def _arguments(function: Any, item: Scored) -> tuple[list[Any], Mapping[str, Any]]:
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # some built-in functions do not say
        names = []
    named = {
        n: {"text": item.answer, "prompt": item.prompt, "token_ids": item.token_ids}[n] for n in names if n in _TAKES
    }
    if "text" not in named and "token_ids" not in named:
        return [item.answer], named  # its first argument is the text, whatever it is called
    return [], named
