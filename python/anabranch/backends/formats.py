"""`KVFormat`: how K and V lie in a cache's pages, and what a backend is given to read them.

A quantised format keeps one byte an element. Each vector (a token's K or V of one head) has a factor of its own,
float32, chosen so that its largest element becomes the largest number of the type: nothing overflows, whatever the
model makes, and what is written never depends on what came before. The functions here are the definition; kernels are
held to the same bits (tests/kernels/test_kv_formats.py).

This file sits with the backends because they are given formats; users take `KVFormat` from the package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["NAMES", "QUANTISED_DTYPES", "KVFormat", "KVScales", "by_dtype", "pick", "put"]


class KVScales(NamedTuple):
    """The factors of quantised pages: float32 [num_pages, page_size, num_kv_heads] each, any strides."""

    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class KVFormat:
    """How K and V are kept in a cache's pages.

    Attributes:
        name: "int8", "fp8", or the name of the dtype that K and V have anyway ("float32", "bfloat16", …).
        dtype: of an element in a page.
        largest: what a vector's largest element becomes; None: elements are kept as they are.

    >>> fmt = ab.KVFormat.of("int8", torch.bfloat16)
    >>> k = torch.randn(20, 2, 64).bfloat16()
    >>> payload, scales = fmt.quantise(k)            # k [..., head_dim] → int8 [..., head_dim], float32 [...]
    >>> close = fmt.dequantise(payload, scales)      # float32; within scales / 2 of k
    >>> bool(((close - k).abs() <= scales[..., None] * 0.5001).all())
    True
    """

    name: str
    dtype: torch.dtype
    largest: float | None = None

    @classmethod
    def of(cls, asked: KVFormat | str | torch.dtype | None, dtype: torch.dtype) -> KVFormat:
        """The format that is meant by `asked`, for K and V of `dtype`.

        Args:
            asked: "auto" or None: kept as they are. "int8", "fp8" (e4m3), or a `KVFormat`. A dtype, or its name: only
                the one that K and V have.

        Raises:
            ValueError: no such format; a dtype that is not that of K and V.
        """
        if isinstance(asked, KVFormat):
            if asked.largest is not None:
                return asked
            asked = asked.dtype
        if asked is None or (isinstance(asked, str) and asked == "auto"):
            return cls(_name(dtype), dtype)
        if isinstance(asked, str) and asked in _QUANTISED:
            return _QUANTISED[asked]
        if asked is dtype or asked == _name(dtype):
            return cls(_name(dtype), dtype)
        if asked in _FLOATS or asked in [_name(x) for x in _FLOATS]:
            raise ValueError(
                f"kv_format={_name(asked)!r}: K and V are {_name(dtype)}, and are kept in that type or quantised; pass "
                f"'auto', {' or '.join(map(repr, _QUANTISED))}, or convert the model (model.to(...))"
            )
        raise ValueError(f"kv_format={asked!r}: expected one of {', '.join(map(repr, NAMES))}")

    @property
    def quantised(self) -> bool:
        """Whether elements are kept as other numbers, with a factor a vector."""
        return self.largest is not None

    def bytes_per_vector(self, head_dim: int) -> int:
        """Bytes of one token's K (or V) of one head, its factor included."""
        return head_dim * self.dtype.itemsize + (4 if self.quantised else 0)

    def quantise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` [..., D] → elements [..., D] of the format's dtype and factors float32 [...].

        Rounded to nearest, ties to even. A vector with an infinity or a NaN has NaN for its factor, and so reads back
        as NaN throughout.
        """
        largest = self._largest("quantise")
        wide = x.float()
        scales = wide.abs().amax(-1) / largest
        scales = torch.where(wide.isfinite().all(-1), scales, float("nan"))
        some = (scales > 0)[..., None]
        scaled = torch.where(some, wide / torch.where(some, scales[..., None], 1.0), 0.0).clamp(-largest, largest)
        return (scaled if self.dtype.is_floating_point else scaled.round()).to(self.dtype), scales

    def dequantise(self, payload: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """What elements [..., D] and factors [...] stand for, in `dtype`."""
        self._largest("dequantise")
        wide = dtype if dtype.itemsize > 4 else torch.float32
        return (payload.to(torch.float32).to(wide) * scales[..., None].to(wide)).to(dtype)

    def error_bound(self, scales: Tensor) -> Tensor:
        """The most by which an element of a vector may be off, from its factor: float32, like ``scales``.

        int8: half a step. fp8: half a step of the largest binade (256 to 448, in steps of 32); smaller elements are off
        by less, by 1/16 of their size at most.
        """
        self._largest("error_bound")
        step = 1.0 if not self.dtype.is_floating_point else 32.0
        return scales * (step / 2 * (1 + 2**-15))  # the division and the product round, too

    def _largest(self, what: str) -> float:
        if self.largest is None:
            raise ValueError(f"{what}: format {self.name!r} keeps elements as they are and has no factors")
        return self.largest


_QUANTISED = {
    "int8": KVFormat("int8", torch.int8, 127.0),
    "fp8": KVFormat("fp8", torch.float8_e4m3fn, 448.0),
}

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

#: element types of quantised pages
QUANTISED_DTYPES = tuple(fmt.dtype for fmt in _QUANTISED.values())

#: the names that ``kv_format=`` takes
NAMES = ("auto", *_QUANTISED)


def by_dtype(dtype: torch.dtype) -> KVFormat:
    """The quantised format whose pages are of `dtype`."""
    return next(fmt for fmt in _QUANTISED.values() if fmt.dtype is dtype)


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


# PyTorch indexes no 8-bit floats on a CPU; their bytes it does.
def pick(pages: Tensor, page: Tensor, offset: Tensor) -> Tensor:
    """``pages[page, offset]`` for any dtype."""
    if pages.dtype.itemsize > 1:
        return pages[page, offset]
    return pages.view(torch.uint8)[page, offset].view(pages.dtype)


def put(pages: Tensor, page: Tensor, offset: Tensor, values: Tensor) -> None:
    """``pages[page, offset] = values`` for any dtype."""
    if pages.dtype.itemsize > 1:
        pages[page, offset] = values
    else:
        pages.view(torch.uint8)[page, offset] = values.view(torch.uint8)
