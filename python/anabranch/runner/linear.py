"""Linear layers on a CPU, where a kernel of ours is faster than torch's.

A decode step has few rows, so its linear layers are bound by the bytes of their weights. torch's matrix products pack
the weights anew in every call; ``csrc/cpu/linear_rows.hpp`` (float32; bfloat16 with AVX512-BF16) and
``csrc/cpu/amx_linear.hpp`` (bfloat16 with AMX) multiply them where they lie, once. Without instructions for 16-bit
products torch's own are several times slower than float32; ``csrc/cpu/linear.hpp`` widens the weights in registers.
`OwnLinear` puts these under a model for the length of a ``with`` block and leaves nothing behind; torch is not changed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.backends import threads
from anabranch.backends.native import TYPES
from anabranch.hf.probe import is_compiled
from anabranch.runner.ranks import sharded

__all__ = ["OwnLinear", "linear", "linear_context", "rows_for", "serves", "takes"]

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (Tensor, nn.Parameter)  # subclasses (quantised, fake, distributed) have a linear of their own
_VARIABLE = "ANABRANCH_OWN_LINEAR"
# Up to so many rows where torch's own product is good. On two cores of a Zen 5, layers of 576 to 4,096 channels, torch
# takes in float32 1.8 to 3.2 times as long for 1 to 16 rows and 1.4 to 1.8 times for 64; in bfloat16 1.1 to 1.7 times
# for 1 to 16 rows and about the same for 64.
FEW_ROWS = 64
# With AVX-512, in float32. On two cores of a Zen 4 torch takes 1.0 to 1.6 times as long for 64 to 256 rows of 576 to
# 8,192 channels (but 0.8 to 0.9 times for one shape); whole forwards of SmolLM2 1.3 to 1.0 times for 72 to 300 rows.
MORE_ROWS = 256
# Rows of bfloat16 that are shorter than this. There, on two cores of a Zen 4, compiled forwards of SmolLM2 (576 and
# 1,536 channels) take torch 1.15 times as long for 160 and 184 rows, 1.1 times for 256, and 0.98 times for 400.
SHORT_CHANNELS, FEW_SHORT_ROWS = 2048, 256
# Longer rows of bfloat16 outgrow the first-level cache: from 4,096 channels torch is as fast at 16 rows, then faster.
LONG_CHANNELS, FEW_LONG_ROWS = 2048, 16
# The same for bfloat16 with AMX. On two cores of a Xeon, layers of 576 to 14,336 channels, torch takes 1.3 to 2.5 times
# as long for 64 rows, 1.0 to 2.0 times for 96 to 256 (but 0.9 times for 14,336 channels and 256 rows); for more it
# depends on the layer.
AMX_ROWS = 256
_WIDE = ("avx512", "avx512bf16", "amx")


def rows_for(device: torch.device | str, dtype: torch.dtype, setting: bool | None = None, channels: int = 0) -> float:
    """The most rows of x with which layers of this device and dtype are to run through our kernel: 0 none, inf any.

    setting: True or False decide (True only where the kernel can run: CPU; float32, bfloat16 or float16). None: the
        environment variable ``ANABRANCH_OWN_LINEAR`` (0 or 1), else automatically: where the kernel has more than its
        plain variant, any number if the CPU has no instructions for products of `dtype`, else few (none for float16,
        nor for bfloat16 where the CPU has AMX and the kernel was built or chosen without).
    channels: of x; 0 where they are not known.

    Raises ValueError for another value of the variable, TypeError for another setting.
    """
    if setting is not None and not isinstance(setting, bool):
        raise TypeError(f"own_linear={setting!r}; pass True, False or None (automatic)")
    if torch.device(device).type != "cpu" or dtype not in _TYPES:
        return 0
    if setting is None and (text := os.environ.get(_VARIABLE, "")):
        if text not in ("0", "1"):
            raise ValueError(f"{_VARIABLE}={text!r}: expected 0 or 1; unset it for the automatic choice")
        setting = text == "1"
    if setting is not None:
        return inf if setting else 0
    from anabranch import _cpu

    isa = _cpu.info()["isa"]
    if isa == "plain":
        return 0
    if dtype == torch.float32:
        return MORE_ROWS if isa in _WIDE else FEW_ROWS
    if not _native(dtype):
        return inf
    if dtype != torch.bfloat16:
        return 0
    if isa == "amx":
        return AMX_ROWS
    if isa != "avx512bf16" or _has_amx():
        return 0
    if 0 < channels < SHORT_CHANNELS:
        return FEW_SHORT_ROWS
    return FEW_LONG_ROWS if channels > LONG_CHANNELS else FEW_ROWS


@cache
def _native(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies `dtype` itself. Where torch does not tell, True: its own linear is kept."""
    if dtype == torch.bfloat16:
        # Not torch.ops.mkldnn._is_mkldnn_bf16_supported: it is true for every AVX-512 machine, with or without bf16.
        return _has_amx() or getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)()
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    except (AttributeError, RuntimeError):
        return True


def _has_amx() -> bool:
    return getattr(torch.cpu, "_is_amx_tile_supported", lambda: True)()


def linear_context(model: nn.Module, setting: bool | None = None) -> AbstractContextManager[Any]:
    """A context for the forwards of `model`: `OwnLinear` where `rows_for` says so of some of its layers, else one that
    does nothing. It can be entered again and again."""
    if setting and sharded(model):
        raise ValueError(
            "own_linear=True: the model is shared out among processes, and Transformers' layers for that bring a "
            "forward of their own; leave own_linear out"
        )
    own = OwnLinear(model, setting)
    return own if own._layers else nullcontext()


def serves(context: Any, rows: int) -> bool:
    """Whether our kernel computes all linear layers of a forward of so many rows in `context` (`linear_context`)."""
    return isinstance(context, OwnLinear) and rows <= context.most_rows


def _weights_beside(modules: list[nn.Module], ours: set[int]) -> bool:
    """Whether modules other than ours (by id) hold matrices of any account: convolutions, experts, quantised weights.
    Embeddings are looked up, and so do not count."""
    held = [0, 0]
    for m in modules:
        if isinstance(m, nn.Embedding):
            continue
        tensors = (*m.parameters(recurse=False), *m.buffers(recurse=False))
        held[id(m) in ours] += sum(t.numel() for t in tensors if t.dim() >= 2 and t.dtype != torch.bool)
    return held[False] > held[True] / 50


def takes(x: Any, weight: Any, bias: Any = None) -> bool:
    """Whether `linear` can stand in for ``torch.nn.functional.linear`` here. No error: what it does not take is left
    to torch, whose own errors then speak."""
    if type(x) is not Tensor or type(weight) not in _PLAIN:
        return False
    dtype = weight.dtype
    if dtype not in _TYPES or x.dtype is not dtype or not (weight.is_cpu and x.is_cpu):
        return False
    if weight.layout is not torch.strided or x.layout is not torch.strided or weight.dim() != 2 or x.dim() < 1:
        return False
    n, k = weight.shape
    if x.shape[-1] != k or weight.stride(1) != 1 or (n > 1 and weight.stride(0) < k):
        return False
    if bias is not None and (
        type(bias) not in _PLAIN or bias.dtype is not dtype or bias.shape != (n,) or not bias.is_cpu
    ):
        return False
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return False
    return not (torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] · weight [N, K]ᵀ + bias [N] → [..., N]: all of one type (float32, bfloat16, float16), on the CPU;
    summed in float32, rounded once. A row's result does not depend on the rows beside it, nor on the number of threads.

    Raises ValueError where `takes` says no.
    """
    if not takes(x, weight, bias):
        raise ValueError(
            f"x {_told(x)}, weight {_told(weight)}, bias {_told(bias)}: expected plain CPU tensors [..., K], [N, K] "
            "with contiguous rows and [N] or None, all of one type (float32, bfloat16, float16), without gradients, "
            "autocast or torch.compile; use torch.nn.functional.linear"
        )
    return _linear(x, weight, bias)


def _told(x: Any) -> str:
    return f"{list(x.shape)} {x.dtype}" if isinstance(x, Tensor) else repr(x)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    n, k = weight.shape
    x, rows, x_row = _rows_of(x, k)
    if bias is not None:
        bias = bias.contiguous()
    out = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
    _kernels().linear(
        TYPES[x.dtype],
        rows,
        n,
        k,
        x.data_ptr(),
        x_row,
        weight.data_ptr(),
        weight.stride(0),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        threads.count(),
    )
    return out


def _linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    empty: Callable[[Sequence[int], torch.dtype], Tensor] | None = None,
) -> list[Tensor]:
    """`_linear` for several layers of one x, in one parallel region: no output element differs.

    empty: makes the memory of a result, of these sizes, contiguous; by default torch does.
    """
    k = weights[0].shape[1]
    x, rows, x_row = _rows_of(x, k)
    shape, layers, out = x.shape[:-1], [], []
    for weight, bias in zip(weights, biases, strict=True):
        if bias is not None:
            bias = bias.contiguous()
        size = (*shape, weight.shape[0])
        y = torch.empty(size, dtype=x.dtype, device=x.device) if empty is None else empty(size, x.dtype)
        at = 0 if bias is None else bias.data_ptr()
        layers.append((weight.shape[0], weight.data_ptr(), weight.stride(0), at, y.data_ptr()))
        out.append(y)
    _kernels().linear_of_one(TYPES[x.dtype], rows, k, x.data_ptr(), x_row, layers, threads.count())
    return out


def _rows_of(x: Tensor, k: int) -> tuple[Tensor, int, int]:
    """x with its last dimension contiguous, how many rows of k elements it has, and the stride between them."""
    if k and x.is_contiguous():  # the usual case, without the cost of a view
        return x, x.numel() // k, k
    rows = x.shape[:-1].numel()
    flat = x.reshape(rows, k)
    if k > 1 and flat.stride(1) != 1:
        flat = flat.contiguous()
    return flat.view(x.shape) if flat.is_contiguous() else x, rows, flat.stride(0)


@cache
def _kernels() -> Any:
    from anabranch import _cpu

    return _cpu


class OwnLinear:
    """``with OwnLinear(model): model(...)``: the model's `torch.nn.Linear` layers run `linear` on calls that `takes`
    approves and that have no more rows than `rows_for` says, and their own forward on all others.

    Within the block a layer's ``forward`` is covered by one of ours in its ``__dict__``; behind the block, however it
    was left, the layers are as they were. (A TorchFunctionMode would leave them alone altogether, but taxes every
    torch call and attribute of the forward: more than the kernel wins on a single row.) Subclasses (quantised layers,
    adapters), layers whose forward is someone else's already, and compiled models keep their own way. Layers are
    looked up here, once; the block can be entered again and again, and by several threads: the first to leave merely
    ends the speed-up of the others.
    """

    def __init__(self, model: nn.Module, setting: bool | None = True) -> None:
        modules = list(model.modules())
        layers = [m for m in modules if type(m) is nn.Linear and type(m.weight) in _PLAIN]
        layers = [] if is_compiled(model) else layers
        kinds = [(m.weight.device, m.weight.dtype, m.in_features) for m in layers]
        most = {kind: rows_for(kind[0], kind[1], setting, kind[2]) for kind in set(kinds)}  # not of each layer
        rows = [most[kind] for kind in kinds]
        ours = {id(m) for m, few in zip(layers, rows, strict=True) if few}
        #: in a forward of at most so many rows, all matrix products that count are ours
        self.most_rows = 0 if _weights_beside(modules, ours) else min(filter(None, rows), default=0)
        self._layers = [(m, partial(_forward, m, few)) for m, few in zip(layers, rows, strict=True) if few]

    def __enter__(self) -> OwnLinear:
        for layer, forward in self._layers:
            vars(layer).setdefault("forward", forward)
        return self

    def __exit__(self, *_: object) -> None:
        for layer, forward in self._layers:
            if vars(layer).get("forward") is forward:
                vars(layer).pop("forward", None)


def _forward(layer: nn.Linear, most_rows: float, input: Any) -> Any:
    weight, bias = layer.weight, layer.bias
    if takes(input, weight, bias) and input.numel() <= most_rows * weight.shape[1]:
        return _linear(input, weight, bias)
    return nn.Linear.forward(layer, input)
