"""Tells whoever streams a call what its threads do, with each thread's text as it becomes certain."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from anabranch.records import events
from anabranch.text.prompts import Text
from anabranch.threads.state import AnyThread


class Narrator:
    """The events of one prompt; without `emit` nobody listens, and it does nothing."""

    def __init__(self, index: int, text: Text, emit: Callable[[events.Event], None] | None):
        self.index, self.emit, self._text = index, emit, text

    def tell(self, thread: AnyThread, token_ids: Sequence[int], position: int, inserted: bool) -> None:
        """Tokens have joined a thread's end."""
        if not self.emit:
            return
        length = thread.length - len(token_ids)
        if length < thread.prompt_length:  # a fresh thread's prompt: a text of its own
            text = self._text.text(token_ids)
        else:
            if thread.reader is None:
                thread.reader = self._text.reader(thread.backwards(length))
            text = None if thread.reader is None else thread.reader.push(token_ids)
        self.emit(events.Token(self.index, thread.id, tuple(token_ids), text, position, inserted))

    def tell_held(self, thread: AnyThread, length: int) -> None:
        """Before children's tokens, which begin at context length `length`: tell what was held back until now."""
        reader = thread.reader
        if self.emit and reader is not None and reader.holds and thread.length > length:
            joined = thread.own[length - thread.length :]
            text, theirs = reader.push(joined) + reader.rest(), self._text.text(joined, thread.backwards(length)) or ""
            if held := text.removesuffix(theirs):
                self.emit(events.Token(self.index, thread.id, (), held, thread.position))
        thread.reader = None

    def tell_rest(self, thread: AnyThread) -> None:
        """At a thread's end: tell what was held back, which nothing completes any more."""
        if self.emit and thread.reader is not None and (held := thread.reader.rest()):
            self.emit(events.Token(self.index, thread.id, (), held, thread.position))
        thread.reader = None

    def forked(self, thread: AnyThread, children: Sequence[str], role: str = "fork") -> None:
        if self.emit:
            self.emit(events.Fork(self.index, thread.id, tuple(children), role))

    def joined(self, thread: AnyThread, children: Sequence[str], mode: str) -> None:
        if self.emit:
            self.emit(events.Join(self.index, thread.id, tuple(children), mode, thread.length))

    def became(self, thread: AnyThread, source: str) -> None:
        if self.emit:
            self.emit(events.Become(self.index, thread.id, source, thread.length))

    def discarded(self, thread: AnyThread, fate: str) -> None:
        if self.emit:
            self.emit(events.Discard(self.index, thread.id, fate))
