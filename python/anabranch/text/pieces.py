"""What token ids read as one by one: text, or bytes where a token holds a part of a character."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Any

from anabranch.text.tokens import BROKEN, Tokens

__all__ = ["pieces"]


def pieces(tokens: Tokens, token_ids: Iterable[int]) -> dict[int, str | tuple[int, ...]]:
    """Of each id once: what it reads as in the middle of a text, or its bytes where those are no whole characters.

    >>> pieces(Tokens(tokenizer), tokenizer("né")["input_ids"])  # one token a byte
    {110: 'n', 195: (195,), 169: (169,)}
    """
    found: dict[int, str | tuple[int, ...]] = {}
    for token in sorted(set(token_ids)):
        text = tokens.piece(token)
        raw = _bytes(tokens.tokenizer, token) if not text or BROKEN in text else None
        found[token] = text if raw is None else tuple(raw)
    return found


def _bytes(tokenizer: Any, token: int) -> bytes | None:
    """The bytes of a token, for the two ways in which vocabularies spell them; None for any other."""
    spelled = tokenizer.convert_ids_to_tokens(token)
    if not isinstance(spelled, str):
        return None
    if byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", spelled):  # byte fallback
        return bytes([int(byte[1], 16)])
    known = _byte_level()
    return bytes(known[c] for c in spelled) if spelled and all(c in known for c in spelled) else None


@cache
def _byte_level() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's): itself where it can be seen."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in seen]
    return {chr(b): b for b in seen} | {chr(256 + i): b for i, b in enumerate(rest)}
