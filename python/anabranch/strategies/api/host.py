"""What a thread needs from whatever runs it: the engine, or another host that keeps the same books."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from anabranch.strategies.api.awaitable import Awaitable

if TYPE_CHECKING:
    from anabranch.strategies.api.ops import Decode, Ended, Op
    from anabranch.strategies.api.thread import Thread


class ThreadView(Protocol):
    """What a `Thread` shows of the host's record of it."""

    @property
    def alive(self) -> bool: ...
    @property
    def fate(self) -> str | None: ...
    @property
    def ended(self) -> Ended | None: ...
    @property
    def idle(self) -> bool:
        """Nothing is queued."""

    @property
    def length(self) -> int: ...
    @property
    def begin(self) -> int:
        """Context length in front of its own tokens."""

    @property
    def position(self) -> int:
        """Of the next token."""

    @property
    def token_ids(self) -> tuple[int, ...]: ...
    @property
    def context(self) -> tuple[int, ...]: ...
    @property
    def last_sampled(self) -> Sequence[int]:
        """The tokens sampled last, where nothing stands behind them."""

    def backwards(self, length: int | None = None) -> Iterator[int]:
        """The context, or its first `length` tokens, from its last token on."""


class Host(Protocol):
    """What a thread needs from the engine; one a prompt."""

    @property
    def prompt(self) -> Any:
        """As the caller gave it."""

    @property
    def eos_ids(self) -> frozenset[int]: ...

    def clock(self) -> int:
        """The Lamport clock of the program that runs now."""

    # Threads and their queues.

    def submit(self, op: Op) -> None:
        """Queue `op` on its thread."""

    def drained(self, thread: Thread) -> Awaitable:
        """Done, with the thread as value, once it has nothing queued."""

    def new_thread(self, parent: Thread, role: str) -> Thread:
        """The next child of `parent`; `role`: "fork" or "fresh"."""

    def room(self, thread: Thread) -> int:
        """Tokens that it may still be given."""

    def children(self, thread: Thread) -> list[Thread]:
        """Those that have come to be, in order."""

    def kill(self, children: Sequence[Thread], fate: str) -> None:
        """End children of one thread now, with their own; what they hold is free."""

    def see(self, thread: Thread, others: Sequence[Thread], lined_up: bool, same_step: str) -> None:
        """From the next turn on `thread` also sees `others`, as `Thread.see` says."""

    def start(self, generator: Generator[Any, Any, Any]) -> Awaitable:
        """Run a generator beside the one that runs now."""

    def tokens_left(self, thread: Thread) -> int:
        """Tokens that it may still sample before the answer's limit."""

    def malformed(self, thread: Thread, why: str) -> None:
        """Count the answer as breaking its format."""

    def decoded_text(self, op: Decode) -> str | None:
        """Text of what a decode has sampled so far, as it reads where it stands."""

    # Text and arguments.

    def encode(self, text: str, backwards: Iterable[int] | None = None) -> list[int]: ...
    def encode_prompt(self, prompt: Any) -> list[int]: ...
    def text(self, token_ids: Sequence[int], backwards: Iterable[int]) -> str | None: ...
    def tag_ids(self, tags: Sequence[str]) -> dict[str, int]: ...
    def blank_at_end(self, token_ids: Sequence[int]) -> int: ...
    def check_ids(self, token_ids: Iterable[int], name: str) -> list[int]: ...
    def check_sampling(self, sampling: Mapping[str, Any] | None) -> None: ...
