"""Arguments of a `TreeCache` as callers pass them, checked before anything changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from anabranch._check import index_of, told
from anabranch.kv.step import Branch


def _size(name: str, value: Any) -> int:
    found = index_of(value)
    if found is None or found < 1:
        raise ValueError(f"{name}: must be an integer of at least 1, got {told(value)}")
    if found > 2**31 - 1:
        raise ValueError(f"{name}: must be below 2^31, got {found}")
    return found


def _number(value: Any, name: str) -> int:
    """A whole number for the core, which says what range it must be in; one beyond 64 bits is out of any."""
    found = index_of(value)
    if found is None:
        raise ValueError(f"{name} must be a whole number, got {told(value)}")
    return max(-(2**62), min(found, 2**62))


def _device(device: Any) -> torch.device:
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device: expected 'cpu', 'cuda' or a torch.device, got {told(device)}") from None
    if found.type == "meta":
        raise ValueError("device: 'meta' holds no data; pass 'cpu' or 'cuda'")
    if found.type == "cuda" and not (torch.cuda.is_available() and (found.index or 0) < torch.cuda.device_count()):
        raise ValueError(f"device: PyTorch sees no {str(found)!r} here ({torch.cuda.device_count()} CUDA devices)")
    return found


def _branch(branch: Any, what: str) -> Branch:
    if not isinstance(branch, Branch):
        raise TypeError(f"{what}: expected a Branch (TreeCache.branch or fork makes them), got {told(branch)}")
    return branch


def _rows(rows: Any) -> dict[Branch, int]:
    """``step``'s rows as the core takes them. (What a branch is in, and its count's size, is the core's to say.)"""
    if type(rows) is not dict:
        if not isinstance(rows, Mapping):
            raise TypeError(f"rows: expected a dict {{branch: number of new rows}}, got {told(rows)}")
        rows = dict(rows)
    if set(map(type, rows.values())) <= {int}:  # the usual case, in a fifth of the time of a generator
        return rows
    for branch, count in rows.items():
        if index_of(count) is None:
            raise TypeError(f"step: the number of rows must be an integer, got {told(count)} for {branch!r}")
    return {branch: _number(count, "step: rows") for branch, count in rows.items()}


def _positions(positions: Any) -> dict[Branch, Any]:
    """``step``'s positions as NumPy arrays, int64."""
    if not isinstance(positions, Mapping):
        raise TypeError(f"positions: expected a dict {{branch: positions of its new rows}}, got {told(positions)}")
    given: dict[Branch, Any] = {}
    for branch, value in positions.items():
        _branch(branch, "positions: keys")
        if not isinstance(value, Tensor):
            try:
                value = torch.as_tensor(value, device="cpu")
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"positions: expected integers for {branch!r}, got {told(value)} ({error})") from None
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise ValueError(f"positions: expected integers for {branch!r}, got {value.dtype}")
        if value.dim() != 1:
            raise ValueError(f"positions: expected one a row for {branch!r}, got shape {list(value.shape)}")
        given[branch] = value.detach().to("cpu", torch.int64).contiguous().numpy()
    return given
