"""Backends: one file each, one contract (docs/architecture.md), one oracle. This file only picks."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from types import ModuleType

import torch

from anabranch.errors import BackendUnavailable

NAMES = ("reference", "cpu", "triton", "cuda")
# "cuda" is chosen by hand until measurements say where it should be the default.
PREFERRED = {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")}


@functools.cache
def get(name: str) -> ModuleType:
    """The backend module, or ``ValueError`` for a name that does not exist."""
    if name not in NAMES:
        raise ValueError(f"backend: {name!r} is not one of {', '.join(NAMES)} or 'auto'")
    return importlib.import_module(f"anabranch.backends.{name}")


@functools.cache
def unavailable(name: str) -> str | None:
    """None when the backend works here, else the reason and the remedy in one sentence."""
    return get(name).unavailable()


def choose(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> ModuleType:
    """The backend for a call.

    ``"auto"`` takes the first that works: on the CPU ``cpu``, then ``reference``; on a GPU ``triton``, then
    ``reference``.

    Raises:
        BackendUnavailable: a backend asked for by name cannot run here.
        ValueError: it cannot take this device, dtype or head_dim.
    """
    if backend != "auto":
        module = get(backend)
        reason = unavailable(backend)
        if reason is not None:
            raise BackendUnavailable(f"backend {backend!r}: {reason}")
        reason = module.refuses(device, dtype, head_dim)
        if reason is not None:
            raise ValueError(f"backend {backend!r}: {reason}")
        return module
    return _auto(device, dtype, head_dim)


@functools.cache
def _auto(device: torch.device, dtype: torch.dtype, head_dim: int) -> ModuleType:
    reasons: list[str] = []
    for name in PREFERRED.get(device.type, ("reference",)):
        reason = unavailable(name) or get(name).refuses(device, dtype, head_dim)
        if reason is None:
            if reasons and head_dim <= 256 and dtype.itemsize <= 4:  # said once: this function remembers its answers
                warnings.warn(f"anabranch falls back to the {name} backend ({'; '.join(reasons)})", stacklevel=2)
            return get(name)
        reasons.append(f"{name}: {reason}")
    raise ValueError(
        f"no backend takes device {device}, {dtype}, head_dim {head_dim} ({'; '.join(reasons)}). "
        "Supported: float32, float16 and bfloat16 with head_dim 32–256; the reference also takes float64"
    )


def advance_kernel(device: torch.device) -> Callable[..., None] | None:
    """A backend's own kernel that advances a resident plan on `device`; None: PyTorch's operators do it."""
    if device.type == "cpu":
        return None
    found = (get(name) for name in NAMES if unavailable(name) is None and hasattr(get(name), "advance"))
    return next((module.advance for module in found), None)
