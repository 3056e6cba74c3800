"""Prompts: what a caller may pass, chats through their template, and the checks of whatever becomes token ids."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from anabranch._check import indices, told
from anabranch.text.pieces import pieces
from anabranch.text.tokens import Place, Reader, Tokens

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


# Arguments of apply_chat_template that are the engine's own affair.
_NOT_TEMPLATE = ("tokenize", "return_dict", "return_tensors", "return_assistant_tokens_mask", "padding", "truncation",
                 "max_length", "tokenizer_kwargs")  # fmt: skip


def takes_chats(tokenizer: Any) -> bool:
    """Whether a tokenizer turns chats into tokens: it has a chat template, or a way of its own (mistral-common's)."""
    own = getattr(type(tokenizer), "apply_chat_template", None)
    return bool(getattr(tokenizer, "chat_template", None)) or (
        own is not None and own is not PreTrainedTokenizerBase.apply_chat_template
    )


def as_message(prompt: Any, chat: bool) -> Any:
    """A text as a chat of one message where `chat` says so; a prompt of another kind as it is."""
    return [{"role": "user", "content": prompt}] if chat and isinstance(prompt, str) else prompt


def check_template(options: Any) -> dict[str, Any]:
    """``chat_template_kwargs`` as a dict; ValueError for what is none, or holds what a template does not decide."""
    if options is None:
        return {}
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise ValueError(
            f"chat_template_kwargs={options!r}; pass a dict of what the chat template takes, "
            'e.g. {"enable_thinking": False, "tools": [...]}'
        )
    if refused := [name for name in _NOT_TEMPLATE if name in options]:
        raise ValueError(f"chat_template_kwargs: {refused[0]!r} is not the template's to decide; leave it out")
    return dict(options)


class Text:
    """A tokenizer (or none) with the engine's rules: ids are checked, errors say what to pass instead.

    tokens: those of the same tokenizer, to share what they know of it.
    """

    def __init__(
        self, tokenizer: Any, vocab_size: int, eos_ids: frozenset[int] = frozenset(), tokens: Tokens | None = None
    ):
        self.tokenizer, self.vocab_size, self.eos_ids = tokenizer, vocab_size, eos_ids
        self._tokens = Tokens(tokenizer) if tokens is None else tokens

    # ---------------------------------------------------------------------------------------- prompts

    def prompt_ids(self, prompt: Prompt, name: str = "prompt", template: Mapping[str, Any] | None = None) -> list[int]:
        """Token ids of one prompt: a string with the tokenizer's own special tokens, a chat through its template.

        template: what the chat template takes besides the messages (see `Engine.generate`); None for a prompt that is
            no chat.
        """
        if isinstance(prompt, str):
            self._need_tokenizer(name)
            check_characters(prompt, name)
            ids = self.tokenizer(prompt)["input_ids"]
        elif len(prompt) and all(isinstance(m, dict) for m in prompt):
            ids = self._chat_ids(list(prompt), name, dict(template or {}))
            template = None
        else:
            ids = self.check_ids(prompt, name)
        if template:
            raise ValueError(
                f"chat_template_kwargs: {name} is no chat, so no template reads {sorted(template)[0]!r}; "
                'leave them out, or pass a list of messages ([{"role": "user", "content": ...}])'
            )
        if not len(ids):
            raise ValueError(f"{name} is empty; a model needs at least one token to go on from")
        return self.check_ids(ids, name)

    def _chat_ids(self, chat: list[dict[str, Any]], name: str, options: dict[str, Any]) -> list[int]:
        self._need_tokenizer(name)
        for i, message in enumerate(chat):
            if "role" not in message or not {"content", "tool_calls"} & message.keys():
                raise ValueError(
                    f"{name}[{i}]: a chat message needs 'role' and 'content', got the keys {sorted(message)}"
                )
            for value in message.values():
                check_characters(value, f"{name}[{i}]")
        if not takes_chats(self.tokenizer):
            raise ValueError(f"{name} is a chat, but the tokenizer has no chat template; pass a string or token ids")
        ends_open = chat[-1]["role"] == "assistant" and "add_generation_prompt" not in options
        continues = options.setdefault("continue_final_message", ends_open)
        options.setdefault("add_generation_prompt", not continues)
        if continues and options["add_generation_prompt"]:
            raise ValueError(
                "chat_template_kwargs: continue_final_message goes on with the last message, add_generation_prompt "
                "begins a new one; pass one of them"
            )
        try:
            ids = self.tokenizer.apply_chat_template(chat, return_dict=True, **options)["input_ids"]
        except Exception as error:
            if not continues:
                raise
            raise ValueError(
                f"{name}: the chat template cannot go on with the last message ({error}); leave that message out, pass "
                'chat_template_kwargs={"add_generation_prompt": True} to begin a new one behind it, or pass token ids'
            ) from error
        return self._with_its_end(list(ids), chat[-1], continues)

    def _with_its_end(self, ids: list[int], message: Mapping[str, Any], continues: Any) -> list[int]:
        """The ids of a chat that is continued, with the white space at its end that many templates trim."""
        text = message.get(continues if isinstance(continues, str) else "content") if continues else None
        if isinstance(text, list):
            text = next((part["text"] for part in reversed(text) if "text" in part), None)
        if not isinstance(text, str) or self._tokens.decode(ids).endswith(text):
            return ids
        blank = text[len(text.rstrip()) :]
        return ids + self.encode(blank, reversed(ids))

    # ---------------------------------------------------------------------------------------- ids → text

    def place(self, backwards: Iterable[int]) -> Place | None:
        """Where a text goes on behind tokens, given from the last one backwards; None without a tokenizer."""
        return None if self.tokenizer is None else self._tokens.place(backwards)

    def reader(self, backwards: Iterable[int]) -> Reader | None:
        """The text of tokens that will come behind those given, piece by piece; None without a tokenizer."""
        place = self.place(backwards)
        return None if place is None else Reader(self._tokens, place, self.eos_ids)

    def text(self, token_ids: Sequence[int], backwards: Iterable[int] = ()) -> str | None:
        """Text of `token_ids` where they stand, a final EOS left out; None without a tokenizer.

        backwards: the tokens in front of them, from the last one on (no more is read of them than matters).
        """
        reader = self.reader(backwards)
        if reader is None:
            return None
        reader.push(token_ids)
        return reader.text

    def pieces(self, token_ids: Iterable[int]) -> dict[int, str | tuple[int, ...]] | None:
        """What token ids read as one by one (see `anabranch.text.pieces`); None without a tokenizer."""
        return None if self.tokenizer is None else pieces(self._tokens, token_ids)

    def last_characters(self, context: Sequence[int], count: int) -> str:
        """The end of a context's text, `count` characters or more if there are as many; needs a tokenizer."""
        size = 4 * count + 8
        while True:
            text = self._tokens.decode(context[max(0, len(context) - size) :])
            if len(text) > 2 * count or size >= len(context):
                return text
            size *= 2

    def blank_at_end(self, token_ids: Sequence[int]) -> int:
        """How many of the last tokens are EOS, or make up nothing but white space."""
        left = len(token_ids)
        while left:
            if token_ids[left - 1] in self.eos_ids:
                left -= 1
                continue
            if self.tokenizer is None:
                break
            # A character of several bytes may take as many tokens.
            runs = (self._tokens.run(token_ids[left - n : left]) for n in range(1, min(4, left) + 1))
            size = next((n for n, run in enumerate(runs, 1) if not run.strip()), 0)
            if not size:
                break
            left -= size
        return len(token_ids) - left

    # ---------------------------------------------------------------------------------------- text → ids

    def encode(self, text: str, backwards: Iterable[int] | None = None) -> list[int]:
        """Token ids of `text`, no special tokens added; with `backwards` as it goes on behind those tokens."""
        self._need_tokenizer(f"the text {text!r}" if text else "a stop string")
        return self._tokens.encode(text, None if backwards is None else self._tokens.place(backwards))

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
        return list(map(int, ids))

    def tag_ids(self, tags: Sequence[str]) -> dict[str, int]:
        """The one token id of each control tag; ValueError names the tags that are not one token, and the remedy."""
        found: dict[str, int] = {}
        for tag in tags:
            self._need_tokenizer(f"the control tag {tag!r}")
            # Some tokenizers begin every text with a blank token of their own.
            ids = [i for i in self.encode(tag) if self._tokens.piece(i).strip()]
            if len(ids) == 1 and self._tokens.piece(ids[0]).strip() == tag:
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

    def _need_tokenizer(self, name: str) -> None:
        if self.tokenizer is None:
            raise ValueError(
                f"{name} needs a tokenizer, and the engine has none; pass token ids, or Engine(model, tokenizer)"
            )


def check_characters(value: Any, name: str) -> None:
    """ValueError for a text with half of a surrogate pair in it (``"\\ud800"`` in JSON), which is no character."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name}: character {error.start} is {value[error.start]!r}, half of a surrogate pair, which no text "
                "can hold; leave it out, or send the whole pair"
            ) from None
    elif isinstance(value, Mapping):
        for part in value.values():
            check_characters(part, name)
    elif isinstance(value, (list, tuple)):
        for part in value:
            check_characters(part, name)
