"""What several test files share of test_rule_strategies."""

from __future__ import annotations

import torch
from engine_kit import (
    EOS,
    byte_tokenizer,
)
from transformers import LogitsProcessor


def ids(text: str) -> tuple[int, ...]:
    return tuple(byte_tokenizer()(text)["input_ids"])


class Says(LogitsProcessor):
    """A model that answers by what its context holds: of the keys of `lines` the one whose end comes last; then EOS."""

    def __init__(self, lines: dict[str, str]):
        self.lines = lines

    def __call__(self, input_ids, scores):
        scores = torch.full_like(scores, -torch.inf)
        for row, context in enumerate(input_ids.tolist()):
            text = byte_tokenizer().decode(context)
            key = max((k for k in self.lines if k in text), key=lambda k: text.rindex(k) + len(k))
            said = text[text.rindex(key) + len(key) :]
            assert self.lines[key].startswith(said), (key, said)
            rest = ids(self.lines[key][len(said) :])
            scores[row, rest[0] if rest else EOS] = 0
        return scores
