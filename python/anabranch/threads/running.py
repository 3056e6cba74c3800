"""What a host settles about a decode, or about tokens to be scored, when its turn has come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from anabranch.strategies.api.ops import Decode, ScoreOp
from anabranch.text.tokens import Reader, Stops


class Sampling(Protocol):
    """What ends a decode apart from its own arguments, by the generation config it samples with."""

    @property
    def eos_ids(self) -> frozenset[int]: ...
    @property
    def stop_strings(self) -> tuple[str, ...]: ...

    def stops(self, context: Callable[[], list[int]]) -> bool:
        """Whether a stopping criterion ends it here."""


AnySampling = TypeVar("AnySampling", bound=Sampling)


@dataclass(eq=False)
class RunningDecode(Generic[AnySampling]):
    """A decode at the head of its thread's queue."""

    op: Decode
    limit: int  # of tokens
    sampler: AnySampling
    reader: Reader | None  # of its text; None without a tokenizer
    stops: Sequence[Stops] = ()
    seen: int = 0  # so many of its tokens the reader has
    drawn: float | None = None  # the uniform of its next token, which was drawn and has not been used yet

    def read(self) -> str:
        """Let the reader have all tokens; what became certain of the text by that."""
        assert self.reader is not None
        new, self.seen = self.op.token_ids[self.seen :], len(self.op.token_ids)
        return self.reader.push(new)

    @property
    def text(self) -> str:
        """Of all it sampled."""
        self.read()
        assert self.reader is not None
        return self.reader.text

    def stop_string(self) -> str | None:
        """The stop string that its text holds now."""
        if not self.stops:
            return None
        told = self.read()
        assert self.reader is not None
        held = self.reader.whole()
        return next((found for stops in self.stops if (found := stops.find(told, held)) is not None), None)


@dataclass(eq=False)
class RunningScore:
    """Tokens of a thread that are being scored."""

    op: ScoreOp
    begin: int  # context length in front of the first
    logprobs: list[float | None] = field(default_factory=list)
