"""A worked problem as one training row: ThreadWeaver's answers, row for row what the engine shows.

An answer with parallel blocks is read in two ways. In a forked run each thread sees the prompt and the trunk before it,
but none of its siblings; after the join the trunk sees all threads one behind another. In plain decoding
(``strategy=None``) the model writes that flat text from left to right, later threads in sight of the earlier ones.
`anabranch.training.threadweaver` merges both in one token trie; here its ids are made from texts, with headers, tags
and the text of a join from the strategy itself, so training and decoding cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from anabranch import training
from anabranch.strategies import Tagged, ThreadWeaver
from anabranch.text.tokens import Tokens


@dataclass(frozen=True)
class Lesson:
    """One answer as a row, and in which way of running the model writes what it is to learn.

    prompt, pieces: as `anabranch.training.threadweaver` takes them.
    """

    prompt: Sequence[int]
    pieces: Sequence[Any]

    def __len__(self) -> int:
        return self.row.num_tokens

    @cached_property
    def row(self) -> training.Layout:
        """Loss on all that the model writes in either way."""
        return training.threadweaver(self.prompt, self.pieces, sequential=True)

    @cached_property
    def forked(self) -> Tensor:
        """bool [T], the tokens that it writes in a forked run."""
        return training.threadweaver(self.prompt, self.pieces).labels != training.IGNORE

    @property
    def plain(self) -> Tensor:
        """bool [T], the tokens that it writes in plain decoding: those of the flat answer, which stands first."""
        return (self.row.labels != training.IGNORE) & (self.row.position_ids == torch.arange(len(self)))


def lesson(
    prompt_ids: Sequence[int],
    items: Sequence[str | Sequence[tuple[str, str]]],
    tokenizer_or_pieces: Any,
    strategy: Tagged | None = None,
    eos_id: int | None = None,
) -> Lesson:
    """The row of one answer.

    prompt_ids: token ids of the prompt, special tokens included, as the engine gets them; at least one.
    items: the answer in order. A string is what the trunk writes; a list of ``(id, text)`` is a parallel block's
        threads: the outline's id, and what the model writes behind the header, without the stop tag. A block stands
        behind a string that ends with the strategy's trigger.
    tokenizer_or_pieces: a Transformers tokenizer, or the strategy's ``pieces`` (dict of text to token id).
    strategy: default ``ThreadWeaver()``; any tag-driven one with join="reprefill".
    eos_id: appended to the last item; None: nothing is.

    Raises ValueError where the items do not fit the format.
    """
    form = ThreadWeaver() if strategy is None else strategy
    if form.join != "reprefill":
        raise ValueError(f"strategy: join={form.join!r}; this layout is the one of join='reprefill'")
    if not len(prompt_ids):
        raise ValueError("prompt_ids is empty; a model needs a token to go on from")
    encode = _encoder(tokenizer_or_pieces)
    (stop,), (trigger,) = encode(form.stop, prompt_ids), encode(form.trigger, prompt_ids)
    after = encode(form.after, [stop])

    def block(name: str, threads: Sequence[tuple[str, str]]) -> training.Block:
        if not threads or len({i for i, _ in threads}) < len(threads):
            raise ValueError(f"{name}: no thread, or two with one id")
        for index, (_, text) in enumerate(threads):
            if form.stop in text:
                raise ValueError(f"{name}[{index}]: leave {form.stop} out; it is appended")
        header = form.next_header
        headers = [encode(form.header.replace("{id}", i), [trigger]) for i, _ in threads]
        return training.Block(
            [[*encode(text, head), stop] for (_, text), head in zip(threads, headers, strict=True)],
            headers=headers,
            after=after,
            next_headers=[encode("" if header is None else header.replace("{id}", i), [stop]) for i, _ in threads],
        )

    pieces: list[Any] = []
    for number, item in enumerate(items):
        name, last = f"items[{number}]", number == len(items) - 1
        if isinstance(item, str):
            joined = number and not isinstance(items[number - 1], str)
            front = [stop, *after] if joined else pieces[-1] if number and pieces[-1] else prompt_ids
            pieces.append(encode(item, front) + ([eos_id] if last and eos_id is not None else []))
            continue
        before = items[number - 1] if number else None
        if not isinstance(before, str) or not before.endswith(form.trigger):
            raise ValueError(f"{name}: threads that do not stand behind {form.trigger}")
        if last:
            raise ValueError(f"{name}: ends with threads; the trunk has to go on behind them")
        pieces.append(block(name, item))
    return Lesson(prompt_ids, pieces)


def _encoder(tokenizer_or_pieces: Any) -> Any:
    """(text, ids before it) → its ids, as the runtime has them there."""
    if isinstance(tokenizer_or_pieces, dict):
        from anabranch.strategies.tagged.pieces import Pieces

        return Pieces(tokenizer_or_pieces).encode
    tokens = Tokens(tokenizer_or_pieces)
    return lambda text, before: tokens.encode(text, tokens.place(reversed(before)))
