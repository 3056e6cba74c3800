"""Running the CUDA kernels on the host-side device: tensors in, every access checked against them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from triton_cases import Case

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LANDINGS = ("at_once", "late", "random")
SCHEDULES = ("uniform", "sticky")
NO_OPTIONS: dict[str, Any] = dict(scale=0.25, softcap=None, window=None, sinks=None)
# Other orders of threads and blocks in every test: for s in $(seq 50); do EMULATOR_SEED=$s pytest tests/emulator; done
OTHER = 1000 * int(os.environ.get("EMULATOR_SEED", "0"))


def settings(seed: int) -> dict[str, Any]:
    """Every combination of landing and schedule within six seeds."""
    return dict(seed=seed + OTHER, landing=LANDINGS[seed % 3], schedule=SCHEDULES[seed // 3 % 2])


@contextmanager
def memory(device: ModuleType, **tensors: torch.Tensor | None) -> Iterator[None]:
    """The device may touch these tensors and nothing else; those whose name ends in ``_`` it may write."""
    found: dict[int, tuple[int, bool, str]] = {}
    for name, x in tensors.items():
        if x is None or x.untyped_storage().nbytes() == 0:
            continue
        storage = x.untyped_storage()
        writable = name.endswith("_") or found.get(storage.data_ptr(), (0, False, ""))[1]
        found[storage.data_ptr()] = (storage.nbytes(), writable, name.rstrip("_"))
    try:
        for address, (size, writable, name) in found.items():
            device.register_memory(address, size, writable, name)
        yield
    finally:
        device.forget_memory()


def attention(
    device: ModuleType,
    case: Case,
    *,
    ring: int = 0,
    grid: int = 0,
    lse: bool = True,
    index: int = 0,
    partials: tuple[torch.Tensor, torch.Tensor] | None = None,
    outputs: tuple[torch.Tensor, torch.Tensor] | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of a case; both, and the partials, begin as NaN where memory for them is not given."""
    o = NO_OPTIONS | options
    a: SimpleNamespace = case.arrays
    rows, num_q_heads, head_dim = case.q.shape
    num_kv_heads = case.k_pages.shape[2]
    nan = float("nan")
    out, found = outputs or (
        torch.full((rows, num_q_heads, head_dim), nan, dtype=case.q.dtype), torch.full((rows, num_q_heads), nan)
    )  # fmt: skip
    part_acc, part_ml = partials or (
        torch.full((a.num_partials, num_q_heads, head_dim), nan),
        torch.full((a.num_partials, num_q_heads, 2), nan),
    )
    sinks = None if o["sinks"] is None else o["sinks"].float().contiguous()
    counts = getattr(a, "counts", None)
    names = ("items", "kv_strips", "kv_spelled", "rows", "limits", "dest", "row_positions", "merge_rows", "merge_ptr")
    plan = {name: getattr(a, name).contiguous() for name in names}
    with memory(
        device, q=case.q, k_pages=case.k_pages, v_pages=case.v_pages, sinks=sinks, counts=counts, out_=out, lse_=found,
        part_acc_=part_acc, part_ml_=part_ml, **plan,
    ):  # fmt: skip
        device.attention(
            TYPES[case.q.dtype], head_dim, num_q_heads, num_kv_heads, case.k_pages.shape[1],
            (case.q.data_ptr(), *case.q.stride()[:2]),
            (case.k_pages.data_ptr(), *case.k_pages.stride()[:3]),
            (case.v_pages.data_ptr(), *case.v_pages.stride()[:3]),
            (*(x.data_ptr() for x in plan.values()), a.strip, 0 if counts is None else counts.data_ptr()),
            a.num_items, a.num_merge, o["scale"], o["softcap"] or 0.0, -1 if o["window"] is None else o["window"],
            0 if sinks is None else sinks.data_ptr(), out.data_ptr(), found.data_ptr() if lse else 0,
            (part_acc.data_ptr(), part_ml.data_ptr()), index, 0, ring, grid,
        )  # fmt: skip
    return out, found
