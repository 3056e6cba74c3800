"""No fork at all, and any strategy with its threads one after another: the two baselines."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from anabranch._check import told
from anabranch.strategies.api.strategy import Strategy
from anabranch.strategies.api.thread import Thread


@dataclass(frozen=True)
class Plain(Strategy):
    """Ordinary decoding, what ``strategy=None`` means: one thread until EOS or the token limit."""

    def run(self, trunk: Thread) -> Generator[Any, Any, Any]:
        yield trunk.decode()


@dataclass(frozen=True)
class Sequential(Strategy):
    """`strategy` with its threads run one after another: the same format and the same tokens, no concurrency.

    The fair baseline of a parallel strategy. It is a rule of the loop, not of the strategy: of all threads of a prompt
    that have something to do, only the first in order (children before their parent) moves.
    A thread sees what it saw before, so a tag-driven model's threads stay blind to those already written; a model that
    writes its whole format in one go, later threads in sight of the earlier ones, is ``strategy=None``.

    >>> engine.generate(prompt, strategy=ab.Sequential(ab.Aspects(aspect_tokens=32)), max_new_tokens=128).text
    """

    strategy: Strategy

    sequential = True

    @property
    def needs(self) -> Sequence[str]:  # type: ignore[override]
        return self.strategy.needs

    def __post_init__(self) -> None:
        if not isinstance(self.strategy, Strategy):
            raise TypeError(
                f"Sequential: strategy={self.strategy!r} is not a Strategy; pass an instance such as ab.Aspects()"
            )

    def run(self, trunk: Thread) -> Generator[Any, Any, Any]:
        return (yield from self.strategy.run(trunk))


def inner_of(who: str, strategy: Strategy | None) -> Strategy:
    """The strategy that writes the answer: `strategy`, or plain decoding for None."""
    if strategy is None:
        return Plain()
    if not isinstance(strategy, Strategy):
        raise TypeError(
            f"{who}: strategy={told(strategy)} is not a Strategy; pass an instance such as ab.ThreadWeaver(), or None "
            "for plain decoding"
        )
    return strategy


def layers(strategy: Any) -> Iterator[Any]:
    """A strategy and what it wraps (the ``strategy`` of a `Sequential`, a `DraftTree`), outermost first."""
    while isinstance(strategy, Strategy):
        yield strategy
        strategy = getattr(strategy, "strategy", None)


def is_plain(strategy: Any) -> bool:
    """Whether plain decoding is all that a strategy does, however it is wrapped."""
    return any(isinstance(layer, Plain) for layer in layers(strategy))
