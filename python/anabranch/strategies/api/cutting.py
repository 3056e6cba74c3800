"""Where a piece of text begins among a thread's tokens: for systems whose runtime rewrites what the model wrote."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

from anabranch.strategies.api.thread import Thread


class Cut(NamedTuple):
    """Keep a thread's first `length` tokens (a context length, prompt included), then write `text` again: what the next
    token held in front of the cut."""

    length: int
    text: str


def cut_at(thread: Thread, at: int) -> Cut:
    """The cut that keeps the first `at` characters of the thread's own text (``thread.text_of(thread.token_ids)``)."""
    ids = thread.token_ids
    whole = thread.text_of(ids)
    kept = bisect_right(range(len(ids) + 1), at, key=lambda n: len(thread.text_of(ids[:n]))) - 1
    # A token may end in the middle of a character, which then does not read as it does in the whole.
    while not whole.startswith(text := thread.text_of(ids[:kept])) or len(text) > at:
        kept -= 1
    return Cut(thread.length - len(ids) + kept, whole[len(text) : at])


def decode_to_mark(
    thread: Thread, heads: Sequence[str], tokens: int | None = None
) -> Generator[Any, Any, tuple[str, str] | None]:
    """Decode to one of the marks ``head + id + ">"``, whose ids nobody knows in advance, such as ``</FORK-12>``.

    heads: how marks begin. tokens: most tokens to sample.

    Returns ``(head, id)``; None when the decode ended otherwise (``thread.ended`` says how). An id is digits, with dots
    between them; what begins like a mark and is none is text, and the decode goes on behind it.
    """
    while True:
        before = len(thread.token_ids)
        end = yield thread.decode(tokens, stop=list(heads))
        if end.stop not in heads:
            return None
        mark = end.text[end.text.index(end.stop) + len(end.stop) :]
        if not mark.strip("0123456789."):  # its end is still to come
            rest = yield thread.decode(tokens, until=lambda op: bool((op.text or "").strip("0123456789.")))
            mark += rest.text
            if rest.reason != "until":
                return None
        name, closed, _ = mark.partition(">")
        if closed and name.strip(".") == name and name and not name.strip("0123456789."):
            return end.stop, name
        if tokens is not None and (tokens := tokens - len(thread.token_ids) + before) < 1:
            return None
