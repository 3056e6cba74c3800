"""Whether a model still is what an engine was made for: people move, convert and switch models behind its back."""

from __future__ import annotations

from typing import Any

import torch

from anabranch import hf
from anabranch.hf.probe import refuse_prompt_learning
from anabranch.kv.cache import TreeCache

__all__ = ["check_model", "check_rotation"]


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
    kept = (1, *hf.latent_dims(model)) if cache.v_in_k else (shape.num_kv_heads, shape.head_dim, shape.v_head_dim)
    now = (shape.num_layers, *kept)
    made_for = (cache.num_layers, cache.num_kv_heads, cache.head_dim, cache.v_head_dim)
    if now != made_for:
        raise ValueError(
            f"model: has (layers, KV heads, head_dim, V's) {now} now, but the engine's cache was made for {made_for}; "
            "make a new Engine"
        )
    return shape.position_limit


def check_rotation(model: Any, prompts: list[list[int]], max_new_tokens: int, max_rows: int, many: bool) -> None:
    """Raise ValueError, before anything runs, for prompts that rotary embeddings which look at the whole forward
    (longrope, dynamic NTK) would make depend on their chunks, their company, or on where they cross the switch.

    Args:
        prompts: token ids of each.
        max_new_tokens: most tokens that may follow on the critical path.
        max_rows: most rows of a forward; a longer prompt is prefilled in chunks.
    """
    for rule in hf.describe(model).rope_rules:
        long = [rule.is_long(len(ids)) for ids in prompts]
        for i, ids in enumerate(prompts):
            name = f"prompt[{i}]" if many else "prompt"
            about = f"the model's {rule.rope_type} rotary embeddings change beyond {rule.limit} tokens"
            if not long[i] and rule.is_long(len(ids) + max_new_tokens - 1):  # the last token is not fed back
                raise ValueError(
                    f"{name}: its {len(ids)} tokens and max_new_tokens={max_new_tokens} go past {rule.limit}, and "
                    f"{about}, so cached keys would no longer fit; use "
                    f"max_new_tokens={rule.limit - len(ids) + 1} at most, or {rule.remedy}"
                )
            if long[i] and (not rule.beyond or len(ids) > max_rows):
                raise ValueError(
                    f"{name}: {len(ids)} tokens, and {about}, so it has to be one forward; "
                    + (f"make the engine with max_rows of at least {len(ids)}" if rule.beyond else rule.remedy)
                )
        if any(long) and not all(long):
            raise ValueError(
                f"prompt: prompt[{long.index(True)}] is beyond {rule.limit} tokens, prompt[{long.index(False)}] is "
                f"not; the model's {rule.rope_type} rotary embeddings would rotate both as the long one. Generate them "
                "in separate calls"
            )
