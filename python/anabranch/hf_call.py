"""What one attention call of a Hugging Face model says beyond its tensors: causality, window, options to refuse."""

from __future__ import annotations

from typing import Any

import torch

from anabranch.hf_mask import DeferredMask, local_of
from anabranch.hf_shape import UnsupportedModel

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


def window_of(module: torch.nn.Module, attention_mask: Any, kwargs: dict[str, Any]) -> int | None:
    """The layer's sliding window: what the model passes, checked against what its mask says. None = full attention."""
    passed = kwargs.get("sliding_window") or None
    if isinstance(attention_mask, DeferredMask):
        local = passed if attention_mask.build is None else attention_mask.window
    else:
        local = local_of(attention_mask, passed)
    if local == passed:
        return passed
    config = getattr(module, "config", None)
    if passed is None and getattr(config, "attention_chunk_size", None) is None:
        return local  # a model that leaves the window to its mask
    raise UnsupportedModel(
        f"{type(module).__name__} passes sliding_window={passed}, but its mask is "
        f"local to {local} tokens; only sliding windows can be honoured over a tree"
    )
