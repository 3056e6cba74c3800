"""The arrays of a plan on a device, and how they get there. Every field is in docs/kernel_contract.md."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anabranch import _core
from anabranch.plan.layout import ITEM_FIELDS, SECTIONS, WORK


@dataclass(frozen=True)
class PlanArrays:
    """Work items as int32 tensors on one device. See docs/kernel_contract.md for every field."""

    items: Tensor  # [num_items, ITEM_FIELDS]
    kv_strips: Tensor  # [strips, 2]
    kv_spelled: Tensor  # [·, 2]
    rows: Tensor
    limits: Tensor
    dest: Tensor
    row_positions: Tensor  # [num_rows]
    merge_rows: Tensor  # [num_merge]
    merge_ptr: Tensor  # [num_merge + 1]
    strip: int  # tokens a strip, a power of two
    num_items: int
    num_partials: int
    num_merge: int
    tile_rows: int
    num_runs: int
    num_absorbed: int
    kv_tokens: int  # tokens listed over all runs: unique ones plus those re-read by the absorb rule
    num_wide: int | None = (
        None  # items[:num_wide] pack more query vectors than TileConfig.narrow, the rest at most that
    )
    most_parts: int = 0  # TileConfig.parts where items may hold subtrees
    kv: Tensor | None = None  # int32, what kv_strips and kv_spelled are views of
    counts: Tensor | None = (
        None  # int32 [3] on the device: num_items, num_partials, num_merge; those above are capacities
    )

    @property
    def num_rows(self) -> int:
        return self.row_positions.shape[0]

    @cached_property
    def addresses(self) -> tuple[int, ...]:
        """Where the nine arrays begin, in order: what a kernel is given, in every layer."""
        return tuple(
            x.data_ptr()
            for x in (
                self.items, self.kv_strips, self.kv_spelled, self.rows, self.limits, self.dest, self.row_positions,
                self.merge_rows, self.merge_ptr,
            )
        )  # fmt: skip


@dataclass(frozen=True)
class FlatContexts:
    """What each row sees, spelled out token by token: the view of the dense reference.

    Context ``c`` holds the tokens ``slots[ptr[c]:ptr[c+1]]`` in order; its query rows ``row_ptr[c]:row_ptr[c+1]``
    are its last tokens, and row j of n sees all but the last n − 1 − j. Several query rows may stand for one row of the
    step (``Plan.queries``): it sees what all of them see.
    """

    ptr: np.ndarray  # int64 [contexts + 1]
    slots: np.ndarray  # int32 [tokens]
    positions: np.ndarray  # int32 [tokens]
    row_ptr: np.ndarray  # int32 [contexts + 1]
    row_positions: np.ndarray  # int64 [rows]
    row_of: np.ndarray | None = None  # int32 [rows]: whose output a query row is part of; None: its own


def section(result: _core.PlanResult, name: str) -> np.ndarray:
    """One section of the planner's buffers, a view: int32, flat (items: [num_items, ITEM_FIELDS])."""
    index = SECTIONS.index(name)
    begin = result.begin
    offset = begin[WORK] if index >= WORK else 0
    buffer = result.work if index >= WORK else result.kv
    values = buffer[begin[index] - offset : begin[index + 1] - offset]
    return values[: result.num_items * ITEM_FIELDS].reshape(-1, ITEM_FIELDS) if name == "items" else values


def split_buffers(
    result: _core.PlanResult, device: torch.device, copy: bool = False, kv: Tensor | None = None
) -> PlanArrays:
    """Views into the planner's two int32 buffers, or into copies of them: on another device, or where ``copy`` asks.

    kv: the first buffer where it is on the device already.
    """

    def moved(buffer: np.ndarray) -> Tensor:
        if device.type != "cpu":
            return upload(buffer, device)
        return torch.from_numpy(buffer).clone() if copy else torch.from_numpy(buffer)

    # On the host, NumPy's views: a tensor's take twice as long, and these are made whenever a topology changes.
    on_host = device.type == "cpu" and not copy and kv is None
    work: Any = result.work if on_host else moved(result.work)
    tokens: Any = result.kv if on_host else moved(result.kv) if kv is None else kv
    begin, first = result.begin, result.begin[WORK]
    used = {
        "items": result.num_items * ITEM_FIELDS,
        "row_positions": result.num_rows,
        "merge_rows": result.num_merge,
        "merge_ptr": result.num_merge + 1,
    }
    parts: dict[str, Any] = {}
    for i, name in enumerate(SECTIONS):
        if i < WORK:
            part = tokens[begin[i] : begin[i + 1]].reshape(-1, 2)
        else:
            start = begin[i] - first
            part = work[start : start + used[name] if name in used else begin[i + 1] - first]
        if name == "items":
            part = part.reshape(-1, ITEM_FIELDS)
        parts[name] = torch.from_numpy(part) if on_host else part
    kv = torch.from_numpy(tokens) if on_host else tokens
    return PlanArrays(
        **parts,
        kv=kv,
        strip=result.strip,
        num_items=result.num_items,
        num_partials=result.num_partials,
        num_merge=result.num_merge,
        tile_rows=result.tile_rows,
        num_runs=result.num_runs,
        num_absorbed=result.num_absorbed,
        kv_tokens=result.kv_tokens,
        num_wide=result.num_wide,
        most_parts=result.most_parts,
    )


def append_tokens(kv: Tensor, changed: Tensor) -> None:
    """Entries of a plan's strips that the planner has appended, put into the copy of them on a device.

    Args:
        kv: ``PlanArrays.kv``.
        changed: int32 [n, 3]: which entry, its slot, its position.
    """
    at, entries = changed.split((1, 2), dim=1)
    kv.view(-1, 2).index_put_((at[:, 0].long(),), entries)


def staged(array: np.ndarray, device: torch.device) -> Tensor:
    """A tensor on the host to be copied to the device: pinned for a GPU, so that the host waits for nothing."""
    host = torch.from_numpy(array)
    return host.pin_memory() if device.type == "cuda" else host


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """A tensor of `array` on the device."""
    return staged(array, device).to(device, non_blocking=device.type == "cuda")


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on this device's current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
