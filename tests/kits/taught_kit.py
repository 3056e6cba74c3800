"""Models that are made to write what training rows have to teach, to compare what the engine shows with the rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor

from anabranch.training import Layout


class Teacher(LogitsProcessor):
    """Makes a model write what rows have to teach; a context that is no path of theirs is a KeyError.

    rows: each a layout, and of which of its tokens (bool [T]) the model writes in this way of running.

    Attributes:
        next: context → the token that follows.
        row: context → (number of the row, index in it).
    """

    def __init__(self, rows: Sequence[tuple[Layout, Sequence[bool]]]):
        self.next: dict[tuple[int, ...], int] = {}
        self.row: dict[tuple[int, ...], tuple[int, int]] = {}
        for number, (x, written) in enumerate(rows):
            paths: list[tuple[int, ...]] = []
            for i, (token, up) in enumerate(zip(x.input_ids.tolist(), x.mask.previous.tolist(), strict=True)):
                paths.append((*(paths[up] if up >= 0 else ()), token))
                assert x.position_ids[i] == len(paths[i]) - 1
                self.row[paths[i]] = (number, i)
                if written[i]:
                    assert x.labels[i] == token and paths[up] not in self.next
                    self.next[paths[up]] = token

    def __call__(self, input_ids, scores):
        token = self.next[tuple(input_ids[0].tolist())]
        return torch.full_like(scores, -torch.inf).index_fill(-1, torch.tensor(token), 0.0)


def tiny_llama(attention: str, vocabulary: int, positions: int, bos: int | None, eos: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=2, max_position_embeddings=positions, initializer_range=0.3,
                         eos_token_id=eos, bos_token_id=bos, pad_token_id=0)  # fmt: skip
    return LlamaForCausalLM._from_config(config, attn_implementation=attention).eval()
