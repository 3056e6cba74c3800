"""What a model is trained on, row for row what the engine shows it: ThreadWeaver's answers as a token trie.

An answer with parallel blocks is read in two ways. In a forked run each thread sees the prompt and the trunk before it,
but none of its siblings; after the join the trunk sees all threads one behind another. In plain decoding
(``strategy=None``) the model writes that flat text from left to right, later threads in sight of the earlier ones.
Both ways are paths of one trie: the flat trajectory, and a branch off it for every thread but the first. A token's
position is its depth, and it sees its ancestors and itself. Headers, tags and the text of a join come from the strategy
itself, so training and decoding cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anabranch.strategies import Tagged, ThreadWeaver

IGNORE = -100  # no loss; what torch's cross entropy leaves out
FORKED, PLAIN = 1, 2  # who writes a target: the model in a forked run, the model in plain decoding (or both: 3)


@dataclass(frozen=True)
class Layout:
    """Rows of one example; a parent's row comes before its children's.

    token_ids, parents, positions: lists of T ints; parents are row numbers, -1 for the first row; position = depth.
    targets: what the model is to write after each row, `IGNORE` where it writes nothing.
    written: for each row with a target, in which runs the model writes it: `FORKED`, `PLAIN` or both added.
    """

    token_ids: list[int]
    parents: list[int]
    positions: list[int]
    targets: list[int]
    written: list[int]

    def mask(self) -> np.ndarray:
        """bool [T, T]: row i may attend to row j, an ancestor or i itself."""
        size = len(self.token_ids)
        mask = np.eye(size, dtype=bool)
        for row, parent in enumerate(self.parents):
            if parent >= 0:
                mask[row] |= mask[parent]
        return mask


def thread_layout(
    prompt_ids: Sequence[int],
    items: Sequence[str | Sequence[tuple[str, str]]],
    tokenizer_or_pieces: Any,
    strategy: Tagged | None = None,
    eos_id: int | None = None,
) -> Layout:
    """The trie of one answer.

    prompt_ids: token ids of the prompt, special tokens included, as the engine gets them; at least one.
    items: the answer in order. A string is what the trunk writes; a list of ``(id, text)`` is a parallel block's
        threads: the outline's id, and what the model writes behind the header, without the stop tag. A block stands
        behind a string that ends with the strategy's trigger.
    tokenizer_or_pieces: a Transformers tokenizer, or the strategy's ``pieces`` (dict of text to token id).
    strategy: default ``ThreadWeaver()``; any tag-driven one with join="reprefill".
    eos_id: appended to the last item; None: nothing is.

    The loss is on all that the model writes in either way of running: each thread blind to its siblings, without its
    header (the runtime inserts it), and the whole flat answer with headers and line breaks (in plain decoding the model
    writes those too). Raises ValueError where the items do not fit the format.
    """
    form = ThreadWeaver() if strategy is None else strategy
    if form.join != "reprefill":
        raise ValueError(f"strategy: join={form.join!r}; this layout is the one of join='reprefill'")
    if not len(prompt_ids):
        raise ValueError("prompt_ids is empty; a model needs a token to go on from")
    encode = _encoder(tokenizer_or_pieces)
    (stop,) = encode(form.stop)

    def behind(tag: str, text: str) -> list[int]:  # as the runtime does it: ids of `text` as it reads behind a tag
        ids = encode(tag + text)
        return ids[ids.index(encode(tag)[0]) + 1 :]

    trie = _Trie()
    at = trie.put(-1, prompt_ids, 0)
    for number, item in enumerate(items):
        last = number == len(items) - 1
        if isinstance(item, str):
            at = trie.put(at, encode(item) + ([eos_id] if last and eos_id is not None else []), FORKED | PLAIN)
            continue
        if number == 0 or not isinstance(items[number - 1], str) or not items[number - 1].endswith(form.trigger):  # type: ignore[union-attr]
            raise ValueError(f"items[{number}]: threads that do not stand behind {form.trigger}")
        if not item or len({name for name, _ in item}) < len(item):
            raise ValueError(f"items[{number}]: no thread, or two with one id")
        if last:
            raise ValueError(f"items[{number}]: ends with threads; the trunk has to go on behind them")
        fork = at
        for index, (name, text) in enumerate(item):
            if form.stop in text:
                raise ValueError(f"items[{number}][{index}]: leave {form.stop} out; it is appended")
            header = behind(form.trigger, form.header.replace("{id}", name))
            body = [*encode(text), stop]
            if index == 0:
                at = trie.put(trie.put(fork, header, PLAIN), body, FORKED | PLAIN)
                continue
            trie.put(trie.put(fork, header, 0), body, FORKED)
            if form.next_header is not None:
                header = behind(form.stop, form.next_header.replace("{id}", name))
            at = trie.put(trie.put(at, header, PLAIN), body, PLAIN)
        at = trie.put(at, behind(form.stop, form.after), PLAIN)
    return Layout(trie.token_ids, trie.parents, trie.positions, trie.targets, trie.written)


class _Trie:
    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.parents: list[int] = []
        self.positions: list[int] = []
        self.targets: list[int] = []
        self.written: list[int] = []
        self._child: dict[tuple[int, int], int] = {}

    def put(self, at: int, ids: Sequence[int], written: int) -> int:
        """Go down from row `at` along `ids`, making rows that are not there; the last one's number."""
        for token in ids:
            if written and at >= 0:
                if self.targets[at] not in (IGNORE, token):
                    raise ValueError(f"row {at} has two continuations to learn: {self.targets[at]} and {token}")
                self.targets[at] = token
                self.written[at] |= written
            child = self._child.get((at, token))
            if child is None:
                child = self._child[at, token] = len(self.token_ids)
                self.token_ids.append(token)
                self.parents.append(at)
                self.positions.append(self.positions[at] + 1 if at >= 0 else 0)
                self.targets.append(IGNORE)
                self.written.append(0)
            at = child
        return at


def _encoder(tokenizer_or_pieces: Any) -> Any:
    if isinstance(tokenizer_or_pieces, dict):
        from anabranch.strategies.tagged import _Pieces

        return _Pieces(tokenizer_or_pieces).encode
    return lambda text: list(tokenizer_or_pieces(text, add_special_tokens=False)["input_ids"]) if text else []
