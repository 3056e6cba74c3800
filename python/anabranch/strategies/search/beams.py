"""What beam search and its groups share: beams, their continuations in order, and when there is no room for more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from anabranch.strategies.api.ops import Candidates
from anabranch.strategies.api.thread import Thread


class Beam(NamedTuple):
    """A text and its sum of log-probabilities, or, finished, its score."""

    score: float
    thread: Thread


class Continuation(NamedTuple):
    """One way to go on: which beam, by which token, the sum then, what it is ranked by, whether that ends it."""

    beam: int
    token: int
    score: float
    key: float
    ends: bool


def rank(running: Sequence[Beam], found: Sequence[Candidates], count: int, last: bool = False) -> list[Continuation]:
    """The `count` best ways to go on of all beams together, those with the highest sums first."""
    ways = [
        Continuation(i, token, beam.score + logprob, beam.score + key, last or ends)
        for i, (beam, c) in enumerate(zip(running, found, strict=True))
        for token, logprob, key, ends in zip(c.token_ids, c.logprobs, c.keys, c.ends, strict=True)
    ]
    return sorted(sorted(ways, key=lambda way: -way.key)[:count], key=lambda way: -way.score)


def require(done: Sequence[Beam]) -> None:
    """ValueError where no text has ended and none can go on."""
    if not done:
        raise ValueError(
            "BeamSearch: no token can follow any beam, and none has ended: every score is −inf; a logits processor "
            "must leave at least one token with a finite score (a grammar that is through leaves EOS)"
        )


def no_room(found: Sequence[Candidates], width: int) -> bool:
    """Whether not all of `width` beams can go on and as many end."""
    budget = found[0].budget
    return min(c.left for c in found) <= 0 or (budget is not None and budget < 2 * width)


def score(total: float, length: int, length_penalty: float) -> float:
    """Of a text of so many tokens, by its sum of log-probabilities."""
    penalty: float = float(length) ** length_penalty
    return total / penalty
