"""What a thread can be asked for, as data. Pure bookkeeping; the engine does the work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import TYPE_CHECKING, Any, NamedTuple

from anabranch.strategies.api.awaitable import Awaitable

if TYPE_CHECKING:
    from anabranch.strategies.api.thread import Thread


class TokenStats(NamedTuple):
    """How sure the model was of one sampled token, from its raw logits (before any logits processor); in nats."""

    logprob: float  # log-probability of the token that was sampled
    entropy: float  # of the whole next-token distribution
    topk_logprob: float  # mean log-probability of the k likeliest tokens (DeepConf's confidence is its negative)
    margin: float = nan  # probability of the likeliest token minus that of the second likeliest


@dataclass(frozen=True)
class Ended:
    """How one `Thread.decode` ended and what it sampled.

    ``reason``: "stop" (a stop string or id), "eos", "length" (its own or the answer's token limit), "budget" (the
    prompt's token budget over all threads), "until" (the caller's predicate), "killed". ``token_ids`` includes the
    token that ended it; ``text`` is theirs as they read where they stand, leaves a final EOS out and is None without a
    tokenizer; ``stop`` is the stop string or
    id that matched; ``stats`` has one entry a token when asked for, else none.
    """

    reason: str
    token_ids: tuple[int, ...] = ()
    text: str | None = None
    stop: str | int | None = None
    stats: tuple[TokenStats, ...] = ()


@dataclass(frozen=True)
class Candidates:
    """The likeliest next tokens of a thread, best first (`Thread.candidates`); all in nats, one entry a token.

    ``token_ids``; ``logprobs``: after the logits processors, which see log-probabilities, as in Transformers' beam
    search, and whose result is not normalised again; ``raw``: the model's own; ``keys``: what they are ranked by,
    ``logprobs`` or, sampled, these plus Gumbel noise (the best of several threads' keys are then a sample without
    replacement from all of them together). ``ends``: whether the token would end the thread: EOS, a stop of the
    generation config, or the last token it may have. ``left``: tokens that it may still be given; ``budget``: tokens
    that ``max_total_tokens`` leaves to all threads of the prompt together, None without one.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    raw: tuple[float, ...]
    keys: tuple[float, ...]
    ends: tuple[bool, ...]
    left: int
    budget: int | None = None


class Op(Awaitable):
    """One queued request of a thread; done when the loop has carried it out."""

    def __init__(self, thread: Thread):
        super().__init__()
        self.thread = thread
        self.issued = thread.host.clock()


class InsertOp(Op):
    """Tokens to append: ids, or text, which becomes ids (``token_ids``) when its turn has come; `header`: a child's."""

    def __init__(self, thread: Thread, given: str | Sequence[int], kind: str, header: bool = False):
        super().__init__(thread)
        self.given, self.kind, self.header = given, kind, header
        self.token_ids: list[int] = []


class ForkOp(Op):
    """Children to begin with all of the thread's context, and with what those of its children that they are to see have
    written (the first so many tokens; None: all, once nothing is queued on it); its value: these children. `segments`:
    of each, if given. Each begins `apart` positions behind the one before."""

    def __init__(
        self,
        thread: Thread,
        children: list[Thread],
        segments: Sequence[int] | None = None,
        sees: Sequence[tuple[Thread, int | None]] = (),
        apart: int = 0,
    ):
        super().__init__(thread)
        self.children, self.sees, self.apart = children, list(sees), apart
        self.segments = None if segments is None else list(segments)

    def without(self, child: Thread) -> None:
        """Do without a child that was killed before it could be seen."""
        self.sees = [(other, count) for other, count in self.sees if other is not child]


class JoinOp(Op):
    """Children to take back; `mode` names one of `anabranch.records.joins.JOINS`."""

    def __init__(
        self,
        thread: Thread,
        children: list[Thread],
        mode: str,
        given: str | Sequence[int] | None = None,
        keep: int | None = None,
        headers: Sequence[str | list[int] | None] | None = None,
    ):
        super().__init__(thread)
        self.children, self.mode, self.given, self.keep = children, mode, given or [], keep
        self.token_ids: list[int] = []  # of `given`
        # What takes the place of each child's own header; text becomes token ids when the join is carried out.
        self.headers: list[str | list[int] | None] = list(headers or [None] * len(children))

    def without(self, child: Thread) -> None:
        """Do without a child that was killed meanwhile."""
        at = self.children.index(child)
        del self.headers[at], self.children[at]


class TruncateOp(Op):
    """Tokens to forget, from context length `length` on."""

    def __init__(self, thread: Thread, length: int):
        super().__init__(thread)
        self.length = length


class SkipOp(Op):
    """Positions to leave out (or, below 0, to give twice) before the next token."""

    def __init__(self, thread: Thread, count: int):
        super().__init__(thread)
        self.count = count


class ScoreOp(Op):
    """Tokens that are given, not sampled; its value: the log-probability of each."""

    def __init__(self, thread: Thread, given: str | Sequence[int], kind: str):
        super().__init__(thread)
        self.given, self.kind = given, kind
        self.token_ids: list[int] = []


class CandidatesOp(Op):
    """The `k` likeliest next tokens to be looked up; its value: `Candidates`. bias: nats added to a token's score."""

    def __init__(self, thread: Thread, k: int, sampling: Mapping[str, Any] | None, bias: Mapping[int, float] | None):
        super().__init__(thread)
        self.k, self.bias = k, dict(bias or {})
        self.sampling = tuple(sorted((sampling or {}).items()))


class ChooseOp(Op):
    """One token to append as sampled; its value: whether there was room for it."""

    def __init__(self, thread: Thread, token: int):
        super().__init__(thread)
        self.token = token


class BecomeOp(Op):
    """The thread is to go on as its sibling `source` stands."""

    def __init__(self, thread: Thread, source: Thread):
        super().__init__(thread)
        self.source = source


class HiddenOp(Op):
    """The last token's hidden state to be looked up; its value: a tuple of floats."""


class Decode(Op):
    """A decoding in progress, as ``until`` sees it: ``thread``, and ``token_ids``, ``text``, ``stats`` so far."""

    def __init__(
        self,
        thread: Thread,
        max_new_tokens: int | None,
        stop: Sequence[str | int],
        sampling: Mapping[str, Any] | None,
        until: Callable[[Decode], bool] | None,
        stats: int | None,
    ):
        super().__init__(thread)
        self.max_new_tokens = max_new_tokens
        self.stop_strings = tuple(s for s in stop if isinstance(s, str))
        self.stop_ids = frozenset(s for s in stop if not isinstance(s, str))
        self.sampling = tuple(sorted((sampling or {}).items()))
        self.until, self.topk = until, stats
        self.token_ids: list[int] = []
        self.stats: list[TokenStats] = []

    @property
    def text(self) -> str | None:
        ended = self.value  # it keeps its text, whatever the thread decodes later
        return ended.text if isinstance(ended, Ended) else self.thread.host.decoded_text(self)
