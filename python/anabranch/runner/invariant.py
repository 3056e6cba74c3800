"""Forwards in which a row's result does not depend on the rows beside it, bit for bit: `Engine(batch_invariant=True)`.

torch promises no such thing. On a CPU its matrix products choose their blocking by the number of rows, and elementwise
functions that it vectorises by hand compute the last few elements of a tensor by another formula, so an element's value
depends on where in the tensor it lies. `RowInvariant` looks at every operation of a forward: products go through the
package's own linear kernel, those elementwise functions are computed in whole vectors, operations whose rows are known
to be independent pass, and any other is refused by name. Attention is the cpu backend's, with plans of fixed token
ranges (``TileConfig.fixed``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from anabranch import backends
from anabranch.hf.probe import is_compiled
from anabranch.kv.cache import TreeCache
from anabranch.runner.eager import forward
from anabranch.runner.linear import OwnLinear, _linear, takes
from anabranch.runner.modes import evaluating

__all__ = ["Invariant", "RowInvariant", "check_rows", "require_invariant"]

# Views, copies, selections, comparisons, and arithmetic that IEEE rounds exactly once: the same for any shape. (No
# attempt is made to be complete: what is missing here is refused, not computed wrongly.)
_EXACT = frozenset(
    """
    abs add add_ alias all amax amin any arange argmax argmin argsort bincount bitwise_and bitwise_not bitwise_or
    bitwise_xor broadcast_to cat ceil chunk clamp clamp_ clamp_max clamp_min clone contiguous copy_ cos cumsum detach
    detach_ div div_ empty empty_like empty_strided embedding eq equal erf exp expand expand_as eye fill_ flatten flip
    floor floor_divide full full_like gather ge gt histc index index_add index_add_ index_put index_put_ index_select
    is_nonzero isfinite isin isinf isnan item le lift_fresh log log1p logical_and logical_not logical_or lt
    masked_fill masked_fill_ max maximum min minimum movedim mul mul_ narrow ne neg new_empty new_full new_ones
    new_zeros nonzero nonzero_numpy one_hot ones ones_like permute reciprocal relu relu_ remainder repeat
    repeat_interleave reshape round rsub scalar_tensor scatter scatter_ scatter_add scatter_add_ select sign sin slice
    sort split split_with_sizes sqrt square squeeze stack sub sub_ swapaxes t tanh tanh_ to topk transpose tril triu
    trunc type_as unbind unflatten unsqueeze view view_as where zero_ zeros zeros_like _local_scalar_dense _to_copy
    _unsafe_view
    """.split()
)
# Sums along a dimension, each row by itself. Over the rows they would mix them: `check_rows` notices.
_REDUCING = frozenset(
    """
    layer_norm linalg_vector_norm log_softmax logsumexp mean native_layer_norm norm rms_norm softmax std sum var
    var_mean _fused_rms_norm _log_softmax _softmax
    """.split()
)
# Functions of one element whose last few are computed by another formula.
_VECTORISED = frozenset(
    "celu elu gelu hardsigmoid hardswish leaky_relu log_sigmoid mish pow rsqrt selu sigmoid silu softplus".split()
)
_BLOCK = 1 << 14  # elements computed at a time: few enough that torch uses one thread
_UNIT = 128  # whole vectors of any type and instruction set, as torch unrolls them


def _in_whole_vectors(function: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    flat = x.contiguous().view(-1)
    size = flat.numel()
    padded = -(-size // _UNIT) * _UNIT
    if padded != size:
        flat = torch.cat([flat, flat.new_zeros(padded - size)])
    if padded <= _BLOCK:
        return function(flat, *args, **kwargs)[:size].view(x.shape)
    parts = [function(part, *args, **kwargs) for part in flat.split(_BLOCK)]
    return torch.cat(parts)[:size].view(x.shape)


def _rows_by(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] · weight [N, K]ᵀ + bias [N]: each element one sum, in an order that depends on K alone."""
    if weight.stride(-1) != 1:
        weight = weight.contiguous()
    if not takes(x, weight, bias):
        raise ValueError(
            f"a product of {list(x.shape)} {x.dtype} and {list(weight.shape)} {weight.dtype} on {weight.device}, which "
            "the linear kernel does not take (plain CPU tensors, both float32, bfloat16 or float16, without autocast)"
        )
    return _linear(x, weight, bias)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    if a.dim() == 1 or b.dim() == 1:
        left, right = (a[None] if a.dim() == 1 else a), (b[:, None] if b.dim() == 1 else b)
        out = _matmul(left, right)
        return out.squeeze(-2 if a.dim() == 1 else -1) if a.dim() != b.dim() else out.reshape(())
    if a.shape[-1] == 1:
        return a * b  # one product an element: nothing is summed
    if b.dim() == 2:
        return _rows_by(a, b.t())
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    left = a.expand(*batch, *a.shape[-2:]).reshape(prod(batch), *a.shape[-2:])
    right = b.expand(*batch, *b.shape[-2:]).reshape(prod(batch), *b.shape[-2:])
    out = a.new_empty(prod(batch), a.shape[-2], b.shape[-1])
    for i in range(prod(batch)):
        out[i] = _rows_by(left[i], right[i].t())
    return out.view(*batch, a.shape[-2], b.shape[-1])


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if beta != 1 or alpha != 1:
        raise ValueError(f"addmm with beta={beta} and alpha={alpha}")
    if a.dim() == 2 and bias.dim() == 1 and bias.shape[0] == b.shape[1]:
        return _rows_by(a, b.t(), bias)
    return _matmul(a, b) + bias


def _grouped_mm(
    x: Tensor, weight: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None
) -> Tensor:
    if offs is None or x.dim() != 2 or weight.dim() != 3 or bias is not None or out_dtype not in (None, x.dtype):
        raise ValueError(f"a grouped product of {list(x.shape)} and {list(weight.shape)}")
    out = x.new_zeros(x.shape[0], weight.shape[2])
    begin = 0
    for i, end in enumerate(offs.tolist()):
        if end > begin:
            out[begin:end] = _rows_by(x[begin:end], weight[i].t())
        begin = max(begin, end)
    return out


_PRODUCTS: dict[str, Callable[..., Tensor]] = {
    "aten::linear": _rows_by,
    "aten::mm": _matmul,
    "aten::bmm": _matmul,
    "aten::mv": _matmul,
    "aten::dot": _matmul,
    "aten::matmul": _matmul,
    "aten::addmm": _addmm,
    "aten::baddbmm": _addmm,
    "aten::_grouped_mm": _grouped_mm,
    "transformers::grouped_mm_fallback": _grouped_mm,
}


_SCALED = ("aten::add", "aten::add_", "aten::sub", "aten::sub_")
_PASS = object()


@cache
def _how(func: Any) -> Any:
    """How an operation is to be computed: as it is (`_PASS`), by a function, or None: by what it is composed of."""
    name = func._schema.name
    space, _, short = name.partition("::")
    if space in ("anabranch", "prim") or (space == "aten" and (short in _EXACT or short in _REDUCING)):
        return _PASS
    if name in _PRODUCTS:
        return _PRODUCTS[name]
    plain = short.removesuffix("_")
    if space != "aten" or plain not in _VECTORISED:
        return None
    function = func if plain == short else getattr(torch.ops.aten, plain)

    def vectorised(x: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(x, Tensor) or any(isinstance(a, Tensor) for a in args):
            return NotImplemented
        if plain == "pow" and args[0] in (1, 2, 3):
            return func(x, *args, **kwargs)  # one or two products
        out = _in_whole_vectors(function, x, *args, **kwargs)
        return out if plain == short else x.copy_(out)

    return vectorised


class RowInvariant(TorchDispatchMode):
    """``with RowInvariant(): model(…)``: as the module says. ValueError for an operation that it does not know."""

    where: Callable[[], str] | None = None  # names the module that is running, where somebody keeps account of it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        how = _how(func)
        if how is _PASS and kwargs.get("alpha", 1) == 1:
            return func(*args, **kwargs)
        if how is _PASS and func._schema.name in _SCALED:  # torch's last few elements are rounded twice, others once
            return func(args[0], args[1] * kwargs["alpha"])
        if how is not _PASS and how is not None:
            try:
                found = how(*args, **kwargs)
            except ValueError as error:
                raise self._refusal(str(error)) from error
            if found is not NotImplemented:
                return found
        with self:
            found = func.decompose(*args, **kwargs)
        if found is NotImplemented:
            raise self._refusal(f"{func}, an operation whose rows are not known to be independent of one another")
        return found

    def _refusal(self, what: str) -> ValueError:
        place = f" in {self.where()}" if self.where else ""
        return ValueError(f"batch_invariant=True: the model's forward has{place} {what}; use batch_invariant=False")


class Invariant:
    """The context of a model's forwards: its linear layers and all other operations row by row. Reentrant."""

    def __init__(self, model: nn.Module) -> None:
        self._linear, self.mode = OwnLinear(model, True), RowInvariant()

    def __enter__(self) -> Invariant:
        self._linear.__enter__()
        self.mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.mode.__exit__(*error)
        self._linear.__exit__(*error)


@contextmanager
def _watching(model: nn.Module, seen: dict[str, Tensor], stack: list[str]) -> Iterator[None]:
    """Notes every module's output, by name, and keeps the names of those that are running on `stack`."""
    with ExitStack() as hooks:
        for name, module in model.named_modules():

            def before(_: Any, __: Any, name: str = name) -> None:
                stack.append(name)

            def after(_: Any, __: Any, output: Any, name: str = name) -> None:
                stack.pop()
                output = output[0] if isinstance(output, tuple) and output else output
                if isinstance(output, Tensor):
                    # Of a module that runs several times, the first; a copy, since layers work in place as well.
                    seen.setdefault(name, output.clone())

            for hook in (module.register_forward_pre_hook(before), module.register_forward_hook(after)):
                hooks.callback(hook.remove)
        yield


def require_invariant(model: Any, backend: str, own_linear: bool | None) -> None:
    """ValueError where ``batch_invariant=True`` cannot be had: on a GPU, in another dtype, beside other choices."""
    if torch.device(model.device).type != "cpu":
        raise ValueError(
            f"batch_invariant=True: the model is on {model.device}; only CPU forwards can be kept to it, because "
            "torch's linear layers on a GPU choose their kernels by the number of rows; use batch_invariant=False there"
        )
    if backend != "auto" and not backends.get(backend).batch_invariant:
        able = backends.with_trait(lambda other: other.batch_invariant)
        raise ValueError(
            f"batch_invariant=True: backend={backend!r} does not keep to it; pass backend={able} or 'auto'"
        )
    if own_linear is False:
        raise ValueError("batch_invariant=True: needs the package's linear layers; leave own_linear=False out")
    if is_compiled(model):
        raise ValueError("batch_invariant=True: the model is compiled by torch.compile; pass the model itself")


def check_rows(model: Any, context: Invariant, backend: str) -> None:
    """Compute a few rows in packs of several sizes and compare them bit for bit.

    Raises ValueError that names the first module whose output differs, or that has an operation which is not known.
    """
    pages = TreeCache.for_model(model, num_pages=32, page_size=4)
    pages.batch_invariant = True
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    first = [(7 + 13 * i) % vocabulary for i in range(11)]
    second = [(3 + 5 * i) % vocabulary for i in range(4)]

    def run(parts: list[tuple[Any, list[int]]]) -> dict[str, Tensor]:
        step = pages.step({branch: len(ids) for branch, ids in parts})
        ids = torch.tensor([i for _, ids in parts for i in ids], device=pages.device)
        seen: dict[str, Tensor] = {}
        stack: list[str] = []
        context.mode.where = lambda: (stack[-1] if stack else "") or type(model).__name__
        try:
            with _watching(model, seen, stack):
                seen[""] = forward(model, ids, step, backend)
        finally:
            context.mode.where = None
        return seen

    with evaluating(model), torch.inference_mode(), context:
        together = run([(pages.branch(), first), (pages.branch(), second)])
        one, other = pages.branch(), pages.branch()
        alone = [(run([(one, first[:3])]), 0, 3), (run([(one, first[3:4])]), 3, 4), (run([(other, second)]), 11, 15)]
    total = len(first) + len(second)
    for part, begin, end in alone:
        for name, output in part.items():
            whole = together.get(name)
            a, b = _rows_of(whole, total), _rows_of(output, end - begin)
            if a is not None and b is not None and not torch.equal(a[begin:end].flatten(), b.flatten()):
                raise ValueError(
                    f"batch_invariant=True: {name or type(model).__name__} "
                    f"({type(model.get_submodule(name)).__name__}) gives a row other values beside other rows; "
                    "use batch_invariant=False"
                )


def _rows_of(output: Tensor | None, rows: int) -> Tensor | None:
    """[rows, …] of a module's output, None where it has not one entry a row."""
    if output is None:
        return None
    if output.dim() >= 2 and output.shape[0] == 1 and output.shape[1] == rows:
        return output[0]
    return output if output.dim() >= 1 and output.shape[0] == rows else None
