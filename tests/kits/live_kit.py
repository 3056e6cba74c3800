"""Threads that see one another, computed the slow way: every token of a tree once, dense, with what its row saw."""

from __future__ import annotations

import copy
from functools import cache

import torch
from engine_kit import SIZES, Recorder, byte_tokenizer
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, MistralConfig, PhiConfig, Qwen3Config
from views_kit import turned

import anabranch as ab

FAMILIES = {"llama": LlamaConfig, "qwen3": Qwen3Config, "partial": PhiConfig}  # the last turns half of a head
WINDOWED = {"window": MistralConfig}  # which `_attend` knows nothing of


@cache
def _weights(family: str):
    torch.manual_seed(5)
    options = SIZES | ({"hidden_size": 96, "num_key_value_heads": 2} if family == "partial" else {})
    if family == "partial":
        options.pop("head_dim")
    if family == "window":
        options["sliding_window"] = 7
    config = (FAMILIES | WINDOWED)[family](**options)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def engine(family: str = "llama", **options) -> ab.Engine:
    options = dict(num_pages=400, page_size=4) | options
    return ab.Engine(copy.deepcopy(_weights(family)), byte_tokenizer(), **options)


def _attend(module, query, key, value, attention_mask, scaling=None, offsets=None, visible=None, **kwargs):
    """Eager attention in which row i finds key j turned back by offsets[i, j]; float64."""
    group = query.shape[1] // key.shape[1]
    inv = next(b for name, b in _weights_of(module).named_buffers() if name.endswith("inv_freq")).double()
    k = key[0].transpose(0, 1)  # [T, Hkv, D]
    outs = []
    for i in range(k.shape[0]):
        seen = visible[i].nonzero()[:, 0]
        keys = turned(k[seen].double(), -offsets[i, seen], inv, False).repeat_interleave(group, 1)
        values = value[0].transpose(0, 1)[seen].double().repeat_interleave(group, 1)
        s = torch.einsum("hd,jhd->hj", query[0, :, i].double(), keys) * scaling
        outs.append(torch.einsum("hj,jhd->hd", s.softmax(-1), values))
    return torch.stack(outs)[None].to(query.dtype), None


_current: list = []


def _weights_of(module):
    return _current[-1]


AttentionInterface.register("live_kit", _attend)


@torch.no_grad()
def dense(family: str, tokens: list[tuple[int, int]], sees: list[dict[int, int]]) -> torch.Tensor:
    """Logits [tokens, vocabulary] of (id, position); sees[i]: which tokens row i sees, under which offset each."""
    model = copy.deepcopy(_weights(family))
    model.set_attn_implementation("live_kit")
    count = len(tokens)
    visible, offsets = torch.zeros(count, count, dtype=torch.bool), torch.zeros(count, count, dtype=torch.int64)
    for row, seen in enumerate(sees):
        for column, offset in seen.items():
            visible[row, column], offsets[row, column] = True, offset
    ids, positions = (torch.tensor([column]) for column in zip(*tokens, strict=True))
    _current.append(model)
    try:
        return model(input_ids=ids, position_ids=positions, use_cache=False, visible=visible, offsets=offsets).logits[0]
    finally:
        _current.pop()


__all__ = ["FAMILIES", "Recorder", "dense", "engine"]
