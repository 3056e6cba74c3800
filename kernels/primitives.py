"""What the attention kernels are made of: tokens of a plan, rows in and out, tanh, and sums that keep infinities where
they are seen."""

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
def load_strips(strips_ptr, place, keep, PART: tl.constexpr, STRIP_SHIFT: tl.constexpr):
    """The slots (PART 0) or positions (PART 1) of the strips that hold these places [N] of a plan."""
    return tl.load(strips_ptr + (place >> STRIP_SHIFT) * 2 + PART, mask=keep, other=0)


@triton.jit
def tokens_of(slot, entry, spelled_ptr, place, keep, PART: tl.constexpr, STRIP_SHIFT: tl.constexpr):
    """The slots or positions of tokens, from their strips' slots and `entry`, of the PART; 0 for positions not kept."""
    at = place & ((1 << STRIP_SHIFT) - 1)
    token = entry + at
    if STRIP_SHIFT > 0:  # strips of one token are never spelled out
        spelled = keep & (slot < 0)
        token = tl.where(spelled, tl.load(spelled_ptr + (~slot + at) * 2 + PART, mask=spelled, other=0), token)
    if PART == 1:
        token = tl.where(keep, token, 0)
    return token


@triton.jit
def load_positions(strips_ptr, spelled_ptr, place, keep, STRIP_SHIFT: tl.constexpr):
    """The positions of tokens at these places; 0 where not kept."""
    slot = load_strips(strips_ptr, place, keep, 0, STRIP_SHIFT)
    entry = load_strips(strips_ptr, place, keep, 1, STRIP_SHIFT)
    return tokens_of(slot, entry, spelled_ptr, place, keep, 1, STRIP_SHIFT)


@triton.jit
def of_part(n, starts, ends, values):
    """For tokens ``n`` [N] of an item, counted through its parts [P]: the value of the part that each is in, else 0."""
    here = (n[:, None] >= starts[None, :]) & (n[:, None] < ends[None, :])
    return tl.sum(tl.where(here, values[None, :], 0), axis=1)


@triton.jit
def places_of(n, place, parts, PARTS: tl.constexpr):
    """The places in the strips of an item's tokens ``n`` [N]: behind ``place``, or those of its parts."""
    if PARTS > 0:
        starts, ends, shifts, _, _ = parts
        places = n + of_part(n, starts, ends, shifts)
    else:
        places = place + n
    return places


@triton.jit
def store_rows(ptr, offsets, d, value, keep, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr):
    """``value`` [N, D] to rows at ``offsets`` [N] (int64), in the pointer's dtype."""
    value = value.to(ptr.dtype.element_ty)
    if PADDED:
        tl.store(ptr + offsets[:, None] + d[None, :], value, mask=keep[:, None] & (d < HEAD_DIM)[None, :])
    else:
        tl.store(ptr + offsets[:, None] + d[None, :], value, mask=keep[:, None])


DOWN = tl.constexpr(64)  # what a −inf counts in `infinities`: more than a step has tokens, and exact in float16


@triton.jit
def without_infinities(x):
    """``x`` with 0 for what is not finite, and of what kind that was: 1 for +inf, DOWN for −inf, both for NaN; float16.

    A hidden token has weight 0, and 0 · NaN is NaN: a product that such tokens take part in is computed with the first,
    and what the visible ones contribute is added by ``infinities``.
    """
    wide = x.to(tl.float32)
    nan = wide != wide
    up = (wide == float("inf")) | nan
    down = (wide == float("-inf")) | nan
    kind = tl.where(up, 1.0, 0.0) + tl.where(down, DOWN * 1.0, 0.0)
    return tl.where(up | down, 0.0, wide).to(x.dtype), kind.to(tl.float16)


@triton.jit
def infinities(visible, kind):
    """[M, D]: what is to be added for the infinities and NaN that each row sees: 0, inf, −inf or NaN.

    ``visible`` [M, N]: whether a row sees a token, of fewer than DOWN; kind [N, D] is of ``without_infinities``. Small
    whole numbers, counted on tensor cores whatever the inputs' dtype.
    """
    hits = tl.dot(visible.to(tl.float16), kind)
    downs = tl.floor(hits * (1.0 / DOWN))
    ups = hits - downs * DOWN
    return tl.where(ups > 0.0, float("inf"), 0.0) + tl.where(downs > 0.0, float("-inf"), 0.0)


@triton.jit
def any_nan(x, live):
    """Whether some live row of x [M, D] holds a NaN."""
    found = tl.where((x != x) & live[:, None], 1, 0)
    return tl.max(tl.max(found, axis=1), axis=0) != 0
