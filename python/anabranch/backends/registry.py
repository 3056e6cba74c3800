"""The backends there are, and which one serves a call. `base` says what a backend is."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import cast

import torch

from anabranch.backends.base import AdvancesPlans, Backend, BranchAttention
from anabranch.errors import BackendUnavailable

# One line for each backend, the module of that name in this folder: the device types for which "auto" considers it.
# "auto" takes the last line that works. "cuda" is chosen by hand until measurements say where to prefer it.
_AUTO_FOR: dict[str, tuple[str, ...]] = {
    "reference": ("cpu", "cuda"),
    "cpu": ("cpu",),
    "triton": ("cuda",),
    "cuda": (),
}

NAMES = tuple(_AUTO_FOR)
#: by device type, the backends that "auto" tries, in order
PREFERRED = {device: tuple(name for name in reversed(NAMES) if device in _AUTO_FOR[name]) for device in ("cpu", "cuda")}


@functools.cache
def get(name: str) -> Backend:
    """The backend module, or ``ValueError`` for a name that does not exist."""
    if name not in NAMES:
        raise ValueError(f"backend: {name!r} is not one of {', '.join(NAMES)} or 'auto'")
    return cast(Backend, importlib.import_module(f"anabranch.backends.{name}"))


@functools.cache
def unavailable(name: str) -> str | None:
    """None when the backend works here, else the reason and the remedy in one sentence."""
    return get(name).unavailable()


def choose(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    kv_dtype: torch.dtype | None = None,
    v_head_dim: int | None = None,
    branch: bool = False,
) -> Backend:
    """The backend for a call.

    ``"auto"`` takes the first that works: on the CPU ``cpu``, then ``reference``; on a GPU ``triton``, then
    ``reference``.

    Args:
        dtype: of Q. kv_dtype: of the elements in K and V's pages, where it is another one.
        head_dim: of Q and K. v_head_dim: of V, where it may be another one; 0: V is a part of K and is not written.
        branch: for branch attention.

    Raises:
        BackendUnavailable: a backend asked for by name cannot run here.
        ValueError: it cannot take this device, dtype, head_dim or kv_dtype.
    """
    if backend != "auto":
        module = get(backend)
        reason = unavailable(backend)
        if reason is not None:
            raise BackendUnavailable(f"backend {backend!r}: {reason}")
        reason = _refuses(module, device, dtype, head_dim, kv_dtype, v_head_dim, branch)
        if reason is not None:
            raise ValueError(f"backend {backend!r}: {reason}")
        return module
    return _auto(device, dtype, head_dim, kv_dtype, v_head_dim, branch)


def _refuses(
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    kv_dtype: torch.dtype | None,
    v_head_dim: int | None,
    branch: bool,
) -> str | None:
    """Why a backend cannot serve a call, with the remedy; None when it can."""
    widest = max(head_dim, v_head_dim or 0)
    if branch:
        if not isinstance(backend, BranchAttention):
            return f"has no branch attention; pass backend='auto', {with_trait(_is_branch)}"
        if widest > backend.branch_head_dim:
            able = with_trait(lambda other: isinstance(other, BranchAttention) and widest <= other.branch_head_dim)
            return f"takes head_dim up to {backend.branch_head_dim} in branch attention, got {widest}; use {able}"
    if v_head_dim not in (None, head_dim) and not backend.split_head_dims:
        able = with_trait(lambda other: other.split_head_dims)
        have = f"head_dim {v_head_dim} for V beside {head_dim} for K" if v_head_dim else "V as a part of K's rows"
        return f"has no kernels for {have}; pass backend='auto' or {able}"
    if kv_dtype in (None, dtype) or kv_dtype in backend.kv_dtypes:
        reason = backend.refuses(device, dtype, widest)
        return reason if widest == head_dim else reason or backend.refuses(device, dtype, head_dim)
    able = with_trait(lambda other: kv_dtype in other.kv_dtypes)
    kept = str(kv_dtype).removeprefix("torch.")
    return (
        f"has no kernels for K and V kept as {kept}; pass backend='auto' or {able}, or make the cache with "
        "kv_format='auto'"
    )


def _is_branch(backend: Backend) -> bool:
    return isinstance(backend, BranchAttention)


@functools.cache
def _auto(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    kv_dtype: torch.dtype | None,
    v_head_dim: int | None,
    branch: bool,
) -> Backend:
    reasons: list[str] = []
    for name in PREFERRED.get(device.type, ("reference",)):
        reason = unavailable(name) or _refuses(get(name), device, dtype, head_dim, kv_dtype, v_head_dim, branch)
        if reason is None:
            if reasons and head_dim <= 256 and dtype.itemsize <= 4:  # said once: this function remembers its answers
                warnings.warn(f"anabranch falls back to the {name} backend ({'; '.join(reasons)})", stacklevel=2)
            return get(name)
        reasons.append(f"{name}: {reason}")
    raise ValueError(
        f"no backend takes device {device}, {dtype}, head_dim {head_dim}"
        f"{f' and {v_head_dim} of V' if v_head_dim else ''} ({'; '.join(reasons)}). "
        "Supported: float32, float16 and bfloat16 with head_dim 32–256; the reference also takes float64"
    )


def with_trait(has: Callable[[Backend], bool]) -> str:
    """The backends of which `has` is true, quoted and joined by "or", for a message."""
    return " or ".join(repr(name) for name in NAMES if has(get(name)))


def advance_kernel(device: torch.device) -> Callable[..., None] | None:
    """A backend's own kernel that advances a resident plan on `device`; None: PyTorch's operators do it."""
    for name in NAMES:
        backend = get(name)
        if backend.device_type == device.type and isinstance(backend, AdvancesPlans) and unavailable(name) is None:
            return backend.advance
    return None
