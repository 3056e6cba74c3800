"""Prompts and text: what a caller may pass, and the way between text and token ids."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from .._check import indices, told

Prompt = Any  # str | list[int] | list[dict]: see Engine.generate


def split_prompts(prompt: Any) -> tuple[list[Prompt], bool]:
    """``(prompts, many)``: a string, a list of ints and a list of dicts are one prompt; a list of those is many."""
    if isinstance(prompt, (torch.Tensor, np.ndarray)):
        prompt = _id_lists(prompt, "prompt", (1, 2))
    if isinstance(prompt, str):
        return [prompt], False
    if not isinstance(prompt, Sequence) or not len(prompt):
        raise ValueError(
            f"prompt: got {told(prompt)}; pass a string, token ids or a chat, or a non-empty list of those"
        )
    kinds = {int if _is_one_id(p) else dict if isinstance(p, dict) else None for p in prompt}
    if kinds == {int} or kinds == {dict}:
        return [prompt], False
    if kinds != {None}:
        raise ValueError(
            "prompt: the list mixes token ids or chat messages with other things; pass one kind of prompt a list"
        )
    for i, item in enumerate(prompt):
        if not isinstance(item, (str, Sequence, torch.Tensor, np.ndarray)):
            raise ValueError(f"prompt[{i}]: got {told(item)}; pass a string, token ids or a chat")
    many = enumerate(prompt)
    return [
        _id_lists(p, f"prompt[{i}]", (1,)) if isinstance(p, (torch.Tensor, np.ndarray)) else p for i, p in many
    ], True


def _is_one_id(item: Any) -> bool:
    """Whether an item of a list is one number (of whatever kind: the ids are checked later), not a prompt itself."""
    return isinstance(item, numbers.Number) or getattr(item, "ndim", None) == 0


def _id_lists(ids: Any, name: str, dims: tuple[int, ...]) -> Any:
    """A tensor or an array of token ids as a list, or a list of lists."""
    if isinstance(ids, torch.Tensor):
        whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    else:
        whole = ids.dtype.kind in "iu"
    if ids.ndim not in dims or not whole:
        shapes = "[tokens] or [prompts, tokens]" if len(dims) > 1 else "[tokens]"
        kind = "a tensor" if isinstance(ids, torch.Tensor) else "an array"
        raise ValueError(f"{name}: {kind} of shape {tuple(ids.shape)}, {ids.dtype}; pass token ids of shape {shapes}")
    return ids.tolist()


class Text:
    """A tokenizer (or none) with the engine's rules: ids are checked, text survives cuts in the middle of a word."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_ids: frozenset[int] = frozenset()):
        self.tokenizer, self.vocab_size, self.eos_ids = tokenizer, vocab_size, eos_ids
        self._pieces: dict[int, str] = {}

    def prompt_ids(self, prompt: Prompt, name: str = "prompt") -> list[int]:
        """Token ids of one prompt: a string with the tokenizer's own special tokens, a chat through its template."""
        if isinstance(prompt, str):
            self._need_tokenizer(name)
            ids = self.tokenizer(prompt)["input_ids"]
        elif len(prompt) and all(isinstance(m, dict) for m in prompt):
            self._need_tokenizer(name)
            for i, message in enumerate(prompt):
                if not {"role", "content"} <= message.keys():
                    raise ValueError(
                        f"{name}[{i}]: a chat message needs 'role' and 'content', got the keys {sorted(message)}"
                    )
            if not getattr(self.tokenizer, "chat_template", None):
                raise ValueError(
                    f"{name} is a chat, but the tokenizer has no chat template; pass a string or token ids"
                )
            ids = self.tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
        else:
            ids = self.check_ids(prompt, name)
        if not len(ids):
            raise ValueError(f"{name} is empty; a model needs at least one token to go on from")
        return self.check_ids(ids, name)

    def encode(self, text: str) -> list[int]:
        self._need_tokenizer(f"the text {text!r}" if text else "a stop string")
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def check_ids(self, token_ids: Iterable[int], name: str) -> list[int]:
        ids = indices(token_ids, name, "text or a list of token ids (ints)")
        for i, token in enumerate(ids):
            if not 0 <= token < self.vocab_size:
                remedy = ""
                if self.tokenizer is not None and 0 <= token < len(self.tokenizer):
                    remedy = (
                        f", though the tokenizer has {len(self.tokenizer)} tokens: use the model's own tokenizer, or "
                        "call model.resize_token_embeddings(len(tokenizer))"
                    )
                raise ValueError(
                    f"{name}: token id {token} at {i} is outside the model's vocabulary of {self.vocab_size}{remedy}"
                )
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def text(self, token_ids: Sequence[int], before: Sequence[int] = ()) -> str | None:
        """Text of `token_ids` where they stand behind `before`, a final EOS left out; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        ids = list(token_ids)
        while ids and ids[-1] in self.eos_ids:
            ids.pop()
        if not ids:
            return ""
        if not len(before):
            return self.decode(ids)
        # Some tokenizers drop the space of a first token, so ids are read behind a few that precede them.
        head = self.decode(list(before)[-8:])
        whole = self.decode(list(before)[-8:] + ids)
        return whole[len(head) :] if whole.startswith(head) else self.decode(ids)

    def tag_ids(self, tags: Sequence[str]) -> dict[str, int]:
        """The one token id of each control tag; ValueError names the tags that are not one token, and the remedy."""
        found: dict[str, int] = {}
        for tag in tags:
            self._need_tokenizer(f"the control tag {tag!r}")
            # Some tokenizers begin every text with a blank token of their own.
            ids = [i for i in self.encode(tag) if self.piece(i).strip()]
            if len(ids) == 1 and self.piece(ids[0]).strip() == tag:
                found[tag] = ids[0]
        if missing := [tag for tag in tags if tag not in found]:
            ids = self.encode(missing[0])
            raise ValueError(
                f"control tag {missing[0]!r} must be one token, but this tokenizer makes it {len(ids)} ({ids}); add it "
                f"with tokenizer.add_special_tokens({{'extra_special_tokens': {missing}}}) and "
                "model.resize_token_embeddings(len(tokenizer)), and use a model trained with it"
            )
        if outside := [tag for tag in tags if found[tag] >= self.vocab_size]:
            raise ValueError(
                f"control tag {outside[0]!r} is token id {found[outside[0]]}, outside the model's vocabulary of "
                f"{self.vocab_size}; call model.resize_token_embeddings(len(tokenizer)) before making the engine"
            )
        return found

    def is_blank(self, token_id: int) -> bool:
        """Whether a token is an EOS or nothing but white space."""
        return token_id in self.eos_ids or (self.tokenizer is not None and not self.piece(token_id).strip())

    def piece(self, token_id: int) -> str:
        """Text of one token alone (remembered); needs a tokenizer."""
        if token_id not in self._pieces:
            self._pieces[token_id] = self.decode([token_id])
        return self._pieces[token_id]

    def _need_tokenizer(self, name: str) -> None:
        if self.tokenizer is None:
            raise ValueError(
                f"{name} needs a tokenizer, and the engine has none; pass token ids, or Engine(model, tokenizer)"
            )


def _rest(whole: str, head: str) -> str:
    """`whole` without what it shares with `head` (all of `head`, unless that ended in half a character)."""
    shared = next((i for i, (a, b) in enumerate(zip(whole, head, strict=False)) if a != b), min(len(whole), len(head)))
    return whole[shared:]


class Detokenizer:
    """Text of a growing thread, piece by piece; holds back the bytes of a character that is not whole yet."""

    def __init__(self, text: Text, before: Sequence[int]):
        self._text = text
        self._ids = list(before)[-8:]
        self._done = len(self._ids)  # ids whose text is out

    def push(self, token_ids: Sequence[int]) -> str | None:
        if self._text.tokenizer is None:
            return None
        self._ids.extend(token_ids)
        # Reading from a few ids before the new ones keeps both the cost of a token and its spaces right.
        start = max(0, self._done - 8)
        head = self._text.decode(self._ids[start : self._done])
        whole = self._text.decode(self._ids[start:])
        if whole.endswith("\ufffd"):
            return ""
        self._done = len(self._ids)
        return _rest(whole, head)

    def flush(self) -> str:
        """What was held back and will not become whole any more."""
        if self._text.tokenizer is None or self._done == len(self._ids):
            return ""
        start = max(0, self._done - 8)
        head, whole = self._text.decode(self._ids[start : self._done]), self._text.decode(self._ids[start:])
        self._done = len(self._ids)
        return _rest(whole, head)
