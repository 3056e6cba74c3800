"""Inductor's code for a forward, run once with other objects under the names that it uses, so that its calls are noted.

Nothing is guessed: what is not known here is done all the same, and is the `Recorder`'s `problem`.
"""

from __future__ import annotations

import ctypes
import dis
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor

from anabranch import backends
from anabranch.backends import cpu, native
from anabranch.backends.native import TYPES
from anabranch.kv.step import Step
from anabranch.ops.tree import NO_SOFTCAP, NO_WINDOW
from anabranch.runner.arena import Arena
from anabranch.runner.linear import _linears, _rows_of, takes

__all__ = ["Address", "Recorder", "in_place_of", "inner_code"]

# Names that inductor's code may use beside its kernels. Others mean work that is not understood here.
_GLOBALS = {"torch", "assert_size_stride", "assert_alignment", "empty_strided_cpu", "reinterpret_tensor"}
_ATTRIBUTES = {"clear", "ops", "anabranch", "default", "linear_rows", "linear_rows_of_one", "tree_layer"}
_KERNEL = "cpp_fused"


class Address(int):
    """An argument of a call that is an address, not a number."""


# ------------------------------------------------------------------------------------------------ inductor's code


def inner_code(compiled: Any) -> Any:
    """The object of inductor behind a compiled graph whose ``current_callable`` is its code; None if there is none."""
    from torch._inductor import output_code

    kind = getattr(output_code, "CompiledFxGraph", ())
    found: dict[int, Any] = {}
    level = [compiled]
    for _ in range(12):  # wrappers around wrappers
        below: list[Any] = []
        for x in level:
            if id(x) in found:
                continue
            found[id(x)] = x
            if isinstance(x, kind):
                return x
            below += _behind(x)
        level = below
    return None


def _behind(x: Any) -> list[Any]:
    """The callables that a callable is made of."""
    if isinstance(x, MethodType):
        inside = [x.__self__, x.__func__]
    elif isinstance(x, partial):
        inside = [x.func]
    elif isinstance(x, FunctionType):
        inside = [cell.cell_contents for cell in x.__closure__ or () if _filled(cell)]
    else:
        inside = list(getattr(x, "__dict__", {}).values())
    return [y for y in inside if callable(y) and not isinstance(y, (type, ModuleType, torch.nn.Module, Tensor))]


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _pointer(kernel: Any) -> int | None:
    """Where the C function behind a kernel of inductor is; None for something else."""
    file = getattr(getattr(kernel, "__self__", None), "__file__", None)
    if file is None or getattr(kernel, "__name__", "") != "kernel":
        return None
    function = getattr(ctypes.CDLL(file), "kernel", None)
    return None if function is None else ctypes.cast(function, ctypes.c_void_p).value


def _kernels(code: Any, names: dict[str, Any]) -> dict[str, Any]:
    """The kernels that inductor's code calls, by name; ValueError for code that does something else besides."""
    if any(hasattr(constant, "co_code") for constant in code.co_consts):
        raise ValueError("the compiled code has functions of its own")
    used = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    kernels = {name for name in used if name.startswith(_KERNEL)}
    strange = used - kernels - _GLOBALS
    strange |= {n for n in set(code.co_names) - used - _ATTRIBUTES if not isinstance(getattr(torch, n, 0), torch.dtype)}
    if strange:
        raise ValueError(f"the compiled code uses {', '.join(sorted(strange))}")
    return {name: names[name] for name in kernels}


class _Namespace:
    def __init__(self, **members: Any) -> None:
        vars(self).update(members)


class _Torch(_Namespace):
    """Stands for ``torch`` in inductor's code: our ops, and (see `_kernels`) dtypes."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


# ------------------------------------------------------------------------------------------------ recording


class Recorder:
    """Runs inductor's code once and notes its calls. What cannot be noted is done all the same, and is a `problem`."""

    def __init__(self, step: Step, inputs: Sequence[Tensor], weights: Sequence[Tensor], arena: Arena) -> None:
        self.calls: list[tuple[str, Any]] = []  # a method of _cpu.Recording, and its arguments
        self.arena = arena
        self.problem: str | None = None
        self.group = 0
        self.layers: list[int] = []
        self.runs = 0
        self.constants: list[Tensor] = []  # the calls have their addresses
        self._step = step
        # By where they begin: what a forward may read that is not its own.
        self._known = {x.data_ptr() for x in (*inputs, step.handle, *weights)}

    def __call__(self, original: Any, args: list[Any]) -> Any:
        """``original(args)``, inductor's code."""
        self.runs += 1
        call: Any = getattr(original, "__func__", None)
        try:
            if call is None:
                raise ValueError("the compiled code is not where it was expected")
            kernels = _kernels(call.__code__, call.__globals__)
            args[:] = map(self._checked, args)
        except ValueError as error:
            self.problem = str(error)
            return original(args)
        ops = _Namespace(
            linear_rows=_Namespace(default=self._linear_rows),
            linear_rows_of_one=_Namespace(default=self._linear_rows_of_one),
            tree_layer=_Namespace(default=self._tree_layer),
        )
        names: dict[str, Any] = {
            name: partial(self._kernel, kernel, _pointer(kernel)) for name, kernel in kernels.items()
        }
        names |= {"torch": _Torch(ops=_Namespace(anabranch=ops)), "empty_strided_cpu": self.arena.empty}
        code: Any = FunctionType(
            call.__code__, {**call.__globals__, **names}, call.__name__, call.__defaults__, call.__closure__
        )
        return code(original.__self__, args)

    def _checked(self, x: Any) -> Any:
        """An argument of the code as replays will find it; ValueError where they might not."""
        if not isinstance(x, Tensor):
            if type(x) is not int:
                raise ValueError(f"the compiled code takes a {type(x).__name__}")
        elif x.numel() and x.data_ptr() not in self._known:
            if x.dim() or x.dtype != torch.float64:
                raise ValueError("the compiled code reads a tensor that is neither a weight nor the step's")
            # A number of the model (an epsilon, a scale) which was another one in a model of the same class, and so is
            # handed over, made a tensor anew each time.
            x = x.clone()
            self.constants.append(x)
        return x

    def _note(self, method: str, *args: Any, unless: str | None = None) -> None:
        self.problem = self.problem or unless
        self.calls.append((method, args))

    def _kernel(self, kernel: Any, function: int | None, *args: Any) -> None:
        problem = None if function else f"{kernel!r} is no C++ kernel as inductor makes them"
        if not all(isinstance(x, Tensor) or type(x) is int for x in args):
            problem = "a kernel takes something that is neither a tensor nor a whole number"
        self._note("kernel", function, [_at(x) if isinstance(x, Tensor) else (0, x) for x in args], unless=problem)
        kernel(*args)

    def _linear_rows(self, x: Tensor, weight: Tensor, bias: Tensor | None, most_rows: int) -> Tensor:
        return self._linear_rows_of_one(x, [weight], [bias], most_rows)[0]

    def _linear_rows_of_one(
        self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], most_rows: int
    ) -> list[Tensor]:
        k = weights[0].shape[1]
        if x.numel() > most_rows * k or not all(map(partial(takes, x), weights, biases)):
            self.problem = "torch has the linear layers of so many rows"
            return list(torch.ops.anabranch.linear_rows_of_one(x, weights, biases, most_rows))
        same, rows, x_row = _rows_of(x, k)
        copied = same.data_ptr() != x.data_ptr() or any(b is not None and not b.is_contiguous() for b in biases)
        out = _linears(x, weights, biases, self.arena.dense)
        layers = [
            (w.shape[0], _at(w), w.stride(0), _at(b), _at(y)) for w, b, y in zip(weights, biases, out, strict=True)
        ]
        problem = "the rows of a linear layer are copied first" if copied else None
        self._note("linear", TYPES[x.dtype], rows, k, _at(x), x_row, layers, unless=problem)
        return out

    def _tree_layer(
        self, query: Tensor, key: Tensor, value: Tensor, step: Tensor, position_ids: Tensor | None,
        sinks: Tensor | None, scale: float, softcap: float, window: int, layer: int, where: str, cached: bool,
        backend: str, rope: str,
    ) -> Tensor:  # fmt: skip
        # The op itself, which checks everything; its result goes to where replays will put theirs.
        result = torch.ops.anabranch.tree_layer(
            query, key, value, step, position_ids, sinks, scale, softcap, window, layer, where, cached, backend, rope
        )
        out = self.arena.dense(result.shape, result.dtype).copy_(result)
        cache = self._step.cache
        dims = (cache.head_dim, cache.v_head_dim)
        chosen = backends.choose(backend, query.device, query.dtype, dims[0], cache.kv_format.dtype, dims[1])
        group = query.shape[1] // cache.num_kv_heads
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        problem = None
        if step.data_ptr() != self._step.handle.data_ptr() or chosen.name != cpu.name or cache.v_in_k:
            problem = "attention over something else than the step, by the cpu backend"
        elif any(x.stride(2) != 1 for x in (q, k, v)):
            problem = "queries, keys or values are copied first"
        elif sinks is not None and (sinks.dtype != torch.float32 or not sinks.is_contiguous()):
            problem = "sinks are converted first"
        elif self.group not in (0, group):
            problem = "layers with different numbers of query heads"
        self.group = group
        self.layers.append(layer)
        k_pages, v_pages = cache.k_pages(layer), cache.v_pages(layer)
        numbers = native.numbers(
            scale, None if softcap == NO_SOFTCAP else softcap, None if window == NO_WINDOW else window
        )
        self._note(
            "tree", TYPES[q.dtype], q.shape[1], cache.num_kv_heads, k_pages.shape[1], dims, self._step.num_rows,
            [_at(x) for x in (q, k, v, out)], [x.stride()[:2] for x in (q, k, v)],
            native.strided(k_pages), native.strided(v_pages), *numbers, native.address(sinks),
            cpu.quantised(k_pages, cache.kv_scales(layer)), unless=problem,
        )  # fmt: skip
        return out


def _at(x: Tensor | None) -> Address:
    return Address(native.address(x))


@contextmanager
def in_place_of(codes: Sequence[Any], other: Callable[[Any, list[Any]], Any]) -> Iterator[None]:
    """Within the block, ``other(code, args)`` is called in the place of inductor's ``code(args)``."""
    before = [code.current_callable for code in codes]
    for code in codes:
        code.current_callable = partial(other, code.current_callable)
    try:
        yield
    finally:
        for code, callable_ in zip(codes, before, strict=True):
            code.current_callable = callable_
