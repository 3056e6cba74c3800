"""The format's own text without a tokenizer: what it is spelled with, and the id of each piece."""

from __future__ import annotations

import re
from collections.abc import Sequence


class Pieces:
    """Encodes and decodes a format's text; the same methods as a thread's."""

    def __init__(self, ids: dict[str, int]):
        self.ids = ids
        self._texts = {i: text for text, i in ids.items()}
        self._any = re.compile("|".join(map(re.escape, sorted(ids, key=len, reverse=True))) or r"(?!)")

    def encode(self, text: str, before: Sequence[int] | None = None) -> list[int]:
        """Ids of `text`, the same wherever it stands."""
        ids, at = [], 0
        while at < len(text):
            match = self._any.match(text, at)
            if match is None or not match.group():
                raise ValueError(f"pieces: nothing spells {text[at:]!r} in {text!r}; add {text[at]!r} and its token id")
            ids.append(self.ids[match.group()])
            at = match.end()
        return ids

    def text_of(self, token_ids: Sequence[int]) -> str:
        return "".join(self._texts.get(i, "\ufffd") for i in token_ids)

    def tag_ids(self, tags: Sequence[str]) -> dict[str, int]:
        for tag in tags:
            if not isinstance(self.ids.get(tag), int):
                raise ValueError(f"pieces: no token id for the control tag {tag!r}; add it, e.g. {{{tag!r}: 7}}")
        return {tag: self.ids[tag] for tag in tags}
