"""What one attention call of a Hugging Face model says beyond its tensors: causality, window, options to refuse."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from anabranch.hf.mask import DeferredMask, local_of, made_here
from anabranch.hf.probe import UnsupportedModel

# Keywords that change what attention computes and that attention over branches has no answer to. Anything else a model
# or a caller passes along (output_hidden_states, return_dict, …) is not about attention.
_CHANGES_ATTENTION = (
    "position_bias",
    "head_mask",
    "indices",
    "block_indices",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "block_sequence_ids",
    "encoder_hidden_states",
    "sinks",
)


def refuse_unheard(module: torch.nn.Module, kwargs: dict[str, Any], where: str) -> None:
    """Raise `UnsupportedModel` for a keyword that changes attention in a way that cannot be honoured `where`."""
    for name in _CHANGES_ATTENTION:
        if kwargs.get(name) is not None:
            raise UnsupportedModel(
                f"{name}: {type(module).__name__} passes it to attention, which cannot honour it {where}"
            )


def is_causal(module: torch.nn.Module, kwargs: dict[str, Any]) -> bool:
    given = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


_windows: weakref.WeakKeyDictionary[torch.nn.Module, int | None] = weakref.WeakKeyDictionary()


def remember_window(module: torch.nn.Module, attention_mask: Any, kwargs: dict[str, Any]) -> int | None:
    """The window of a layer in the probe of `describe`, whose mask is the model's own; `window_of` falls back on it."""
    window = _stated_window(module, attention_mask, kwargs)
    _windows[module] = window
    return window


def window_of(module: torch.nn.Module, attention_mask: Any, kwargs: dict[str, Any]) -> int | None:
    """The layer's sliding window; None = full attention.

    It is what the model passes, checked against its mask. Some models pass nothing and leave the window to their mask
    (PhiMoE, Qwen2-MoE). Where something else stands in for that mask (`tree_mask`, or a dense one under torch.compile),
    it is what the probe found.
    """
    window = _stated_window(module, attention_mask, kwargs)
    if window is not None or _is_models_own(attention_mask):
        return window
    config = getattr(module, "config", None)
    if getattr(config, "sliding_window", None) is None:  # where Transformers' masks have their window from
        return None
    kinds, layer = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if kinds and isinstance(layer, int) and kinds[layer] == "full_attention":
        return None
    if module not in _windows:
        raise UnsupportedModel(
            f"attention_mask: {type(module).__name__} leaves its sliding window to the mask that this one stands in "
            "for; call anabranch.hf.describe(model) once, which finds the window (Engine and TreeCache.for_model do)"
        )
    return _windows[module]


def _is_models_own(attention_mask: Any) -> bool:
    if isinstance(attention_mask, DeferredMask):
        return attention_mask.build is not None
    return made_here(attention_mask)


def _stated_window(module: torch.nn.Module, attention_mask: Any, kwargs: dict[str, Any]) -> int | None:
    passed = kwargs.get("sliding_window") or None
    if not _is_models_own(attention_mask):
        return passed
    local = local_of(attention_mask)
    if local == passed:
        return passed
    config = getattr(module, "config", None)
    if passed is None and getattr(config, "attention_chunk_size", None) is None:
        return local  # a model that leaves the window to its mask
    raise UnsupportedModel(
        f"{type(module).__name__} passes sliding_window={passed}, but its mask is "
        f"local to {local} tokens; only sliding windows can be honoured over a tree"
    )
