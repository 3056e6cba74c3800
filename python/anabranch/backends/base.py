"""What a backend is: the members that every backend module has, and the optional ones that some have.

A backend is one module in this folder whose functions and constants match `Backend`, and one line in ``registry``. The
rest of the package never asks for a backend's name: an optional member is asked for by its protocol, such as
``isinstance(backend, AdvancesPlans)``, and a trait by its constant, such as ``backend.capturable``.

Arguments that reach a backend are checked already; ``softcap``, ``window`` and ``sinks`` are None where they are off.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from anabranch.backends.formats import KVScales
from anabranch.plan.arrays import PlanArrays
from anabranch.plan.plan import Plan
from anabranch.plan.tile_config import TileConfig

__all__ = ["AdvancesPlans", "Backend", "BranchAttention", "MaskTensors", "PreparesPool"]


class MaskTensors(NamedTuple):
    """A ``BranchMask``'s tensors, as a backend gets them. Never changed in place: backends keep what they derive."""

    starts: Tensor  # int64 [S + 1]
    row_ptr: Tensor  # int32 [S + 1]
    cols: Tensor  # int32 [N, 2]
    positions: Tensor  # int64 [T]


class Backend(Protocol):
    """The members of every backend.

    Attributes:
        name: the name that callers pass as ``backend=``.
        device_type: the type of device that its kernels are for, "cpu" or "cuda".
        capturable: its work is kernel launches on the current stream alone, which a CUDA graph can record. False: it
            works on the host between them.
        batch_invariant: it can honour plans with ``batch_invariant``.
        kv_dtypes: element types of quantised pages that it reads and writes (see `formats`). Where there are none,
            ``kv_scales`` and ``scales`` are always None.
        split_head_dims: it takes K and V of different head_dims, and pages of V that are the first of K's.
    """

    name: str
    device_type: str
    capturable: bool
    batch_invariant: bool
    kv_dtypes: tuple[torch.dtype, ...]
    split_head_dims: bool

    def unavailable(self) -> str | None:
        """Why it cannot run on this machine, with the remedy, in one sentence; None where it can."""

    def expected(self, gpu: bool) -> bool:
        """Whether an installation like this one should be able to run it; `gpu`: torch sees a GPU."""

    def info(self) -> dict[str, Any]:
        """What ``anabranch doctor`` tells of it where it works; "summary" is a line for people."""

    def refuses(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Why it cannot serve a call on these tensors, with the remedy; None where it can. head_dim: of K or of V."""

    def tile_config(
        self, num_q_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> TileConfig:
        """How plans for its kernels are to be cut."""

    def attention(
        self,
        q: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        plan: Plan,
        *,
        scale: float,
        softcap: float | None,
        window: int | None,
        sinks: Tensor | None,
        return_lse: bool,
        kv_scales: KVScales | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Tree attention.

        Args:
            q: [queries, Hq, D]; ``plan.num_rows`` of them, or more where rows read under several position offsets.
            k_pages: [pages, page_size, Hkv, D], the last stride 1; of q's dtype, or one of ``kv_dtypes``.
            v_pages: [pages, page_size, Hkv, E], likewise; E = D unless ``split_head_dims``.
            plan: ``plan.arrays(Hq // Hkv, tile_config)`` are its work items.
            kv_scales: the factors of quantised pages, None for others.
            out: where the result goes: [plan.num_rows, Hq, E] in q's dtype, contiguous, no memory of q's or the
                pages'. None: a new tensor.

        Returns:
            out [plan.num_rows, Hq, E] in q's dtype; lse [plan.num_rows, Hq] float32, natural logarithm, sinks included,
            or None unless ``return_lse``.
        """

    def write_kv(
        self,
        k: Tensor,
        v: Tensor | None,
        k_pages: Tensor,
        v_pages: Tensor | None,
        slots: Tensor,
        kv_scales: KVScales | None = None,
    ) -> None:
        """k [rows, Hkv, D] and v [rows, Hkv, E] into slots int32 [rows] of the pages, in place; quantised where there
        are ``kv_scales``, whose factors are written too. A row with a slot below 0 is skipped. v and v_pages None
        (``split_head_dims`` only): K alone."""

    def copy_pages(self, pool: Tensor, src: Tensor, dst: Tensor, filled: Tensor, scales: Tensor | None = None) -> None:
        """Pages ``src`` to ``dst`` in every plane, the first ``filled[i]`` slots of each, one call for all.

        Args:
            pool: [planes, pages, Hkv, page_size, D].
            src, dst, filled: int32 CPU tensors [n].
            scales: the factors of quantised pages, float32 [planes, pages, Hkv, page_size], copied along.
        """


@runtime_checkable
class BranchAttention(Protocol):
    """Optional: attention under a branch mask, for training.

    Attributes:
        branch_head_dim: the largest head_dim of K and of V there.
    """

    branch_head_dim: int

    def branch_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: MaskTensors,
        *,
        scale: float,
        softcap: float | None,
        window: int | None,
        sinks: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """out [T, Hq, E] in q's dtype, lse [T, Hq] float32, natural logarithm, sinks included; v [T, Hkv, E]."""

    def branch_backward(
        self,
        grad: Tensor,
        grad_lse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        layout: MaskTensors,
        *,
        scale: float,
        softcap: float | None,
        window: int | None,
        sinks: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dq, dk, dv in their inputs' dtypes; delta [T, Hq] = grad · out − grad_lse."""


@runtime_checkable
class AdvancesPlans(Protocol):
    """Optional: a kernel that advances a resident plan by a decode step (else PyTorch's operators do it)."""

    def advance(self, arrays: PlanArrays, tails: Tensor, slots: Tensor, positions: Tensor) -> None:
        """As ``anabranch.plan.resident.advance``."""


@runtime_checkable
class PreparesPool(Protocol):
    """Optional: what to ask of the system for a cache's page pool. Both say whether it could be done."""

    def prepare_pool(self, pool: Tensor) -> bool:
        """Before it is first written: large pages."""

    def populate(self, pool: Tensor) -> bool:
        """Its memory, now; what is written to it meanwhile stays."""
