"""What a model computes with, in a form that can be compared: whether keys and values from before still hold."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

__all__ = ["fingerprint"]

# What adapters (PEFT's layers) keep of which of them are active, and how.
_ADAPTERS = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")


def fingerprint(model: Any, derived: bool = True) -> Hashable:
    """Equal for two moments between which no weight was replaced or changed in place, no module or forward hook came or
    went and no adapter was switched.

    Changes in place are seen by each tensor's version, and behind torch's back (``p.data.mul_(…)``) by one element of
    each: an update of a part of a tensor through ``.data`` is not noticed. derived: whether buffers that are not saved
    with the model count; False for a model whose own forwards change them.
    """
    parts: list[Hashable] = []
    probes: list[torch.Tensor] = []
    for module in model.modules():
        own = module.__dict__
        adapters = tuple(repr(own[name]) for name in _ADAPTERS if name in own)
        hooks = (*module._forward_hooks, *module._forward_pre_hooks)
        parts.append((id(module), type(module), adapters, hooks))
        transient = frozenset() if derived else module._non_persistent_buffers_set
        buffers = (buffer for name, buffer in module._buffers.items() if name not in transient)
        for tensor in (*module._parameters.values(), *buffers):
            if tensor is None:
                continue
            parts.append((id(tensor), None if tensor.is_inference() else tensor._version, tuple(tensor.shape)))
            if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.numel() and not tensor.is_meta:
                parts.append(tensor.data_ptr())
                plain = tensor.detach()
                probes.append(plain[tuple(size // 2 for size in plain.shape)].double())
    for device in {probe.device for probe in probes}:
        parts.append(torch.stack([probe for probe in probes if probe.device == device]).cpu().numpy().tobytes())
    return tuple(parts)
