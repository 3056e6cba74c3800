"""How tensors reach the package's C++ modules, which know nothing of torch: as addresses, element strides and numbers.

The backends over ``anabranch._cpu`` and ``anabranch._cuda`` share this (Triton's kernels take `rows` too); it picks
nothing and refuses nothing. An address keeps nothing alive, so whoever takes one holds its tensor until the call is
over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: how both modules number the types they take (``enum class Type``)
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MAX_HEAD_DIM = 256


def address(x: Tensor | None) -> int:
    """Where a tensor begins; 0 for none."""
    return 0 if x is None else x.data_ptr()


def strided(x: Tensor) -> tuple[int, ...]:
    """Address and the stride of every dimension but the last, whose own is 1: rows [T, H, D], pages [P, S, H, D]."""
    return (x.data_ptr(), *x.stride()[:-1])


def rows(x: Tensor) -> Tensor:
    """x [T, H, D] as the kernels take it: the last dimension contiguous, the others as they are."""
    return x if x.stride(2) == 1 else x.contiguous()


def floats(sinks: Tensor | None) -> Tensor | None:
    """Sinks [Hq] as the kernels take them: float32, contiguous."""
    return None if sinks is None else sinks.to(torch.float32).contiguous()


def numbers(scale: float, softcap: float | None, window: int | None) -> tuple[float, float, int]:
    """The options as the modules take them: 0 is no softcap, −1 no window."""
    return scale, 0.0 if softcap is None else softcap, -1 if window is None else window


def attention(
    kernel: Callable[..., None],
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    arrays: Any,
    *more: Any,
    scale: float,
    softcap: float | None,
    window: int | None,
    sinks: Tensor | None,
    return_lse: bool = True,
    num_rows: int | None = None,
    sections: tuple[Tensor | None, ...] = (),
) -> tuple[Tensor, Tensor | None]:
    """Tree attention by a module's ``attention``: out [rows, Hq, D] in q's dtype; lse [rows, Hq] float32 or None.

    q: [queries, Hq, D], the last stride 1. num_rows: of the output, by default as many as queries. k_pages, v_pages:
    [pages, page_size, Hkv, D], the last stride 1. arrays: a plan's (docs/kernel_contract.md); ``sections`` go behind
    them, ``more`` behind everything.
    """
    num_q_heads, head_dim = q.shape[1:]
    page_size, num_kv_heads = k_pages.shape[1:3]
    sinks = floats(sinks)
    shape = (q.shape[0] if num_rows is None else num_rows, num_q_heads, head_dim)
    out = torch.empty(shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(shape[:2], dtype=torch.float32, device=q.device) if return_lse else None
    kernel(
        TYPES[q.dtype],
        head_dim,
        num_q_heads,
        num_kv_heads,
        page_size,
        strided(q),
        strided(k_pages),
        strided(v_pages),
        (*arrays.addresses, arrays.strip, *map(address, sections)),
        arrays.num_items,
        arrays.num_merge,
        *numbers(scale, softcap, window),
        address(sinks),
        address(out),
        address(lse),
        *more,
    )
    return out, lse
