"""What `Engine.stream` yields. ``prompt`` is the index of the prompt in the call; ``thread`` an id such as "0.2"
(trunk: "0")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anabranch.records.result import Result


@dataclass(frozen=True)
class Token:
    """Tokens joined a thread's end: one sampled, or a run that the runtime inserted.

    ``text`` is what they make certain of the thread's text; None without a tokenizer. A thread's pieces, joined, are
    its text. Held back, so that ``text`` may be empty, are a character that is not whole yet, a run of byte tokens of a
    byte-fallback tokenizer (it is read as a whole) and an end-of-sequence token, which is text only if something
    follows it. A Token without token ids tells what was still held when a thread ended or took its children back.
    What `Thread.truncate` cuts off stays told. ``position`` is the first token's.
    """

    prompt: int
    thread: str
    token_ids: tuple[int, ...]
    text: str | None
    position: int
    inserted: bool = False


@dataclass(frozen=True)
class Fork:
    """``children`` now share ``thread``'s context (role "fork"), or begin a fresh one (role "fresh")."""

    prompt: int
    thread: str
    children: tuple[str, ...]
    role: str = "fork"


@dataclass(frozen=True)
class Join:
    """``thread`` took ``children`` back; ``length`` is its context length afterwards."""

    prompt: int
    thread: str
    children: tuple[str, ...]
    mode: str
    length: int


@dataclass(frozen=True)
class Become:
    """``thread`` goes on as its sibling ``source`` stands, with a context of ``length`` tokens; what it had written
    itself is forgotten."""

    prompt: int
    thread: str
    source: str
    length: int


@dataclass(frozen=True)
class Discard:
    """A thread is gone without a trace in its parent: ``reason`` "discarded" or "killed"."""

    prompt: int
    thread: str
    reason: str


@dataclass(frozen=True)
class Finish:
    """The answer to a prompt is complete."""

    prompt: int
    result: Result


Event = Token | Fork | Join | Become | Discard | Finish
