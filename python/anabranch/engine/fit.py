"""Whether a model still is what an engine was made for: people move, convert and switch models behind its back."""

from __future__ import annotations

from typing import Any

import torch

from anabranch import hf
from anabranch.hf.probe import refuse_prompt_learning
from anabranch.kv.cache import TreeCache

__all__ = ["check_model"]


def check_model(model: Any, cache: TreeCache) -> int | None:
    """Raise ValueError, with the remedy, where the model no longer fits the cache; nothing is changed.

    Returns the positions it has embeddings for (None: no limit).
    """
    device = torch.device(model.device)
    if device != cache.device:
        raise ValueError(
            f"model: is on {device}, but the engine's cache is on {cache.device}; "
            f"move it back (model.to({str(cache.device)!r})), or make a new Engine"
        )
    if not hf.uses_anabranch(model):
        now = model.config._attn_implementation
        raise ValueError(
            f"model: was switched to attn_implementation={now!r} after the engine was made; call "
            "anabranch.hf.enable(model) before generating"
        )
    refuse_prompt_learning(model)
    shape = hf.describe(model)
    if shape.dtype != cache.dtype:
        raise ValueError(
            f"model: is {shape.dtype} now, but the engine's cache holds {cache.dtype}; "
            f"call model.to({cache.dtype}), or make a new Engine"
        )
    now = (shape.num_layers, shape.num_kv_heads, shape.head_dim)
    made_for = (cache.num_layers, cache.num_kv_heads, cache.head_dim)
    if now != made_for:
        raise ValueError(
            f"model: has (layers, KV heads, head_dim) {now} now, but the engine's cache was made for {made_for}; "
            "make a new Engine"
        )
    return shape.position_limit
