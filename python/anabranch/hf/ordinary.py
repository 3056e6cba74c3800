"""Ordinary use of ``"anabranch"``, without a tree or a branch mask: Transformers' own attention."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import torch

from anabranch.hf.checks import is_causal
from anabranch.hf.mask import DeferredMask
from anabranch.hf.probe import (
    UnsupportedModel,
)

if TYPE_CHECKING:
    pass


# ------------------------------------------------------------------------------------------------ ordinary use


def ordinary_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, Any]:
    """Transformers' own attention: SDPA where the model allows it, the model's eager formula elsewhere."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if isinstance(attention_mask, DeferredMask):
        attention_mask = attention_mask.resolve()
    eager, allows_sdpa = _formulas(type(module))  # type: ignore[arg-type]
    beyond_sdpa = [name for name in ("softcap", "s_aux", "sinks") if kwargs.get(name) is not None]
    if allows_sdpa and not beyond_sdpa and not kwargs.get("output_attentions"):
        return sdpa_attention_forward(module, query, key, value, attention_mask, *args, **kwargs)
    if eager is None:
        raise UnsupportedModel(
            f"attn_implementation: {type(module).__name__} needs more than SDPA "
            f"({', '.join(beyond_sdpa) or 'output_attentions'}) and its file has no "
            'eager_attention_forward; load the model with attn_implementation="eager"'
        )
    bias = _additive(attention_mask, query, key, is_causal(module, kwargs))
    return eager(module, query, key, value, bias, *args, **kwargs)


@cache
def _formulas(kind: type) -> tuple[Callable | None, bool]:
    """(the eager attention function in the model's own file, may SDPA stand in for it) for an attention class."""
    from transformers import PreTrainedModel

    file = sys.modules.get(kind.__module__)
    models = (
        [
            c
            for c in vars(file).values()
            if isinstance(c, type) and issubclass(c, PreTrainedModel) and c.__module__ == kind.__module__
        ]
        if file
        else []
    )
    return getattr(file, "eager_attention_forward", None), all(c._supports_sdpa for c in models)


def _additive(
    attention_mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor, is_causal: bool
) -> torch.Tensor | None:
    """SDPA's mask conventions → the additive one of eager formulas: 0 where visible, the type's minimum elsewhere."""
    q_length, kv_length = query.shape[2], key.shape[2]
    if attention_mask is None:
        if not is_causal or q_length == 1:
            return None
        attention_mask = _causal(q_length, kv_length, query.device)
    if attention_mask.dtype != torch.bool:
        return attention_mask
    return torch.where(attention_mask, 0.0, torch.finfo(query.dtype).min).to(query.dtype)


@lru_cache(maxsize=4)  # all layers of a forward ask for the same one
def _causal(q_length: int, kv_length: int, device: torch.device) -> torch.Tensor:
    """bool ``[1, 1, q, kv]``, aligned to the upper left, as ``is_causal`` of SDPA is (None stands for it)."""
    return torch.ones(1, 1, q_length, kv_length, dtype=torch.bool, device=device).tril_()
