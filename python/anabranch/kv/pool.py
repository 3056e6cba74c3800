"""The tensors of a cache: pages of K and of V for every layer, and the factors of quantised ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anabranch._check import told
from anabranch.backends.base import Backend, PreparesPool
from anabranch.backends.formats import KVFormat, KVScales, pick, put
from anabranch.kv.arguments import _size


class Pool:
    """Pages for all layers. What is in them, and who holds it, is the cache's to know.

    Args:
        v_head_dim: of V; ``head_dim`` is K's.
        v_in_k: V is the first ``v_head_dim`` numbers of K's rows, and has no memory of its own.
        backend: whose kernels move pages.

    Attributes:
        k, v: of each layer, [num_pages, page_size, num_kv_heads, head_dim] and […, v_head_dim] (not contiguous).
        scales: of each layer, the factors of quantised pages, float32 [num_pages, page_size, num_kv_heads] each; None.
    """

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        num_kv_heads: int,
        page_size: int,
        head_dim: int,
        v_head_dim: int,
        v_in_k: bool,
        kv_format: KVFormat,
        device: torch.device,
        backend: Backend,
    ) -> None:
        self._backend = backend
        self._format = kv_format
        # K's and V's planes, a layer each, in one tensor where they are alike: then one call copies a page of both.
        alike = head_dim == v_head_dim and not v_in_k
        dims = [head_dim] if alike or v_in_k else [head_dim, v_head_dim]
        self._tensors: list[tuple[Tensor, Tensor | None]] = []
        for dim in dims:
            # A head's tokens lie together in a page, so that a kernel's (item × KV head) streams whole pages.
            shape = (2 * num_layers if alike else num_layers, num_pages, num_kv_heads, page_size, dim)
            pages = torch.empty(shape, dtype=kv_format.dtype, device=device)
            if isinstance(backend, PreparesPool):
                backend.prepare_pool(pages)
            factors = torch.empty(shape[:-1], dtype=torch.float32, device=device) if kv_format.quantised else None
            self._tensors.append((pages, factors))
        planes = [plane for pages, _ in self._tensors for plane in pages.transpose(2, 3)]
        self._planes = planes
        self.k = planes[:num_layers]
        self.v = [k[..., :v_head_dim] for k in self.k] if v_in_k else planes[num_layers:]
        self.scales: list[KVScales | None] = [None] * num_layers
        self._factors: list[Tensor] = []
        if kv_format.quantised:
            every = (factors for _, factors in self._tensors if factors is not None)
            self._factors = by_plane = [plane for factors in every for plane in factors.transpose(2, 3)]
            of_v = 0 if v_in_k else num_layers
            self.scales = [KVScales(by_plane[i], by_plane[of_v + i]) for i in range(num_layers)]

    @property
    def _every(self) -> list[Tensor]:
        return [x for pair in self._tensors for x in pair if x is not None]

    @property
    def num_bytes(self) -> int:
        """Of all pages and factors."""
        return sum(x.numel() * x.element_size() for x in self._every)

    def populate(self) -> bool:
        """Have the system hand out the memory of all pages; whether it did."""
        backend = self._backend
        return isinstance(backend, PreparesPool) and all([backend.populate(x) for x in self._every])

    def copy(self, src: Tensor, dst: Tensor, filled: Tensor) -> None:
        """Pages ``src`` to ``dst`` (int32 CPU tensors [n]) in all layers, the first ``filled`` slots only."""
        for pages, factors in self._tensors:
            self._backend.copy_pages(pages, src, dst, filled, factors)

    def read(self, layer: int, slots: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """K and V at slots (int64 [n]): [n, num_kv_heads, head_dim] and [n, num_kv_heads, v_head_dim], dense."""
        page, offset = self._places(slots)
        k, v = pick(self.k[layer], page, offset), pick(self.v[layer], page, offset)
        scales = self.scales[layer]
        if scales is None:
            return k, v
        read = self._format.dequantise
        return read(k, scales.k[page, offset], dtype), read(v, scales.v[page, offset], dtype)

    def raw(self, slots: Tensor) -> list[Tensor]:
        """What is kept at slots (int64 [n]), as it is kept: K's and V's planes [n, …], then those of their factors."""
        page, offset = self._places(slots)
        return [pick(plane, page, offset) for plane in (*self._planes, *self._factors)]

    def put_raw(self, slots: Tensor, rows: Sequence[Tensor]) -> None:
        """Put back what `raw` gave."""
        page, offset = self._places(slots)
        for plane, values in zip((*self._planes, *self._factors), rows, strict=True):
            put(plane, page, offset, values)

    def _places(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        page_size = self.k[0].shape[1]
        return slots // page_size, slots % page_size


def v_head_dim_of(given: Any, head_dim: int, v_in_k: Any) -> int:
    """V's head_dim; ValueError for one that does not fit."""
    if not isinstance(v_in_k, bool):
        raise ValueError(f"v_in_k: expected True or False, got {told(v_in_k)}")
    if given is None:
        if v_in_k:
            raise ValueError(
                "v_in_k: needs v_head_dim, how many of the numbers in K's rows are V (MLA: v_head_dim=kv_lora_rank, "
                "head_dim=kv_lora_rank + qk_rope_head_dim)"
            )
        return head_dim
    dim = _size("v_head_dim", given)
    if v_in_k and dim > head_dim:
        raise ValueError(
            f"v_head_dim: {dim} numbers cannot be the first of K's {head_dim} (v_in_k=True); pass head_dim="
            "kv_lora_rank + qk_rope_head_dim and v_head_dim=kv_lora_rank"
        )
    return dim
