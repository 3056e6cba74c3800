"""What the attention kernels are made of: rows in and out, tanh, and sums that keep infinities where they are seen."""

from __future__ import annotations

import triton
import triton.language as tl

SCAN = tl.constexpr(256)  # positions looked at at once when a window cuts an item short


@triton.jit
def tanh(x):
    """tanh to about 1e-7 of its value; libdevice's own is not there in the interpreter."""
    x2 = x * x
    # Near zero 1 − 2/(e^2x + 1) loses all its digits, and softcap leaves most scores exactly there.
    small = x * (1.0 + x2 * (-1.0 / 3 + x2 * (2.0 / 15 + x2 * (-17.0 / 315 + x2 * (62.0 / 2835)))))
    e = tl.exp(-2.0 * tl.abs(x))  # in (0, 1]: nothing overflows
    large = (1.0 - e) / (1.0 + e)
    return tl.where(x2 < 0.0625, small, tl.where(x < 0, -large, large))


@triton.jit
def load_rows(ptr, offsets, d, keep, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, UPCAST: tl.constexpr):
    """Rows at ``offsets`` [N] (int64), columns ``d`` [D]; what is not kept is zero and was never read."""
    if PADDED:
        x = tl.load(ptr + offsets[:, None] + d[None, :], mask=keep[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    else:
        x = tl.load(ptr + offsets[:, None] + d[None, :], mask=keep[:, None], other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def store_rows(ptr, offsets, d, value, keep, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr):
    """``value`` [N, D] to rows at ``offsets`` [N] (int64), in the pointer's dtype."""
    value = value.to(ptr.dtype.element_ty)
    if PADDED:
        tl.store(ptr + offsets[:, None] + d[None, :], value, mask=keep[:, None] & (d < HEAD_DIM)[None, :])
    else:
        tl.store(ptr + offsets[:, None] + d[None, :], value, mask=keep[:, None])


@triton.jit
def without_infinities(x):
    """``x`` with 0 for what is not finite, and where that was +inf or NaN, and where −inf or NaN (1 or 0, x's dtype).

    A hidden token has weight 0, and 0 · NaN is NaN: a product that such tokens take part in is computed with the first,
    and what the visible ones contribute is added by ``infinities``.
    """
    wide = x.to(tl.float32)
    up = wide == float("inf")
    down = wide == float("-inf")
    nan = wide != wide
    return (
        tl.where(up | down | nan, 0.0, wide).to(x.dtype),
        tl.where(up | nan, 1.0, 0.0).to(x.dtype),
        tl.where(down | nan, 1.0, 0.0).to(x.dtype),
    )


@triton.jit
def infinities(seen, up, down):
    """[M, D]: what is to be added for the infinities and NaN that each row sees: 0, inf, −inf or NaN.

    ``seen`` [M, N] is 1 where a row sees a token; up and down [N, D] are of ``without_infinities``.
    """
    plus = tl.where(tl.dot(seen, up, input_precision="ieee") > 0.0, float("inf"), 0.0)
    minus = tl.where(tl.dot(seen, down, input_precision="ieee") > 0.0, float("-inf"), 0.0)
    return plus + minus


@triton.jit
def any_nan(x, live):
    """Whether some live row of x [M, D] holds a NaN."""
    found = tl.where((x != x) & live[:, None], 1, 0)
    return tl.max(tl.max(found, axis=1), axis=0) != 0
