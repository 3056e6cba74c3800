"""Compiled steps without Python between their kernels: recorded once, then made again, as a CUDA graph is on a GPU.

Inductor's code for a forward is a list of kernel calls, a few hundred a step, and for few rows calling them takes
longer than many of them run. Their arguments are addresses and sizes, which for one number of rows are always the same.
So inductor's own code runs once with other objects under the names that it uses (`_Recorder`): memory comes from an
arena that stays, and each call is made and noted. A `Recorded` step then makes the noted calls from C++
(csrc/cpu/recording.hpp) with that step's inputs and plan.

Nothing is guessed: where there is a name that is not known here, a tensor that is neither weight, input nor of the
arena, or an op that is not ours, there is no recording. Before one serves anybody it runs over memory full of NaN and
has to give, bit for bit, what the step gave that it was recorded from.
"""

from __future__ import annotations

import ctypes
import dis
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anabranch import backends
from anabranch.backends import cpu, native, threads
from anabranch.backends.native import TYPES
from anabranch.kv.cache import TreeCache
from anabranch.kv.step import Step
from anabranch.ops.tree import NO_SOFTCAP, NO_WINDOW, unobserved
from anabranch.runner.linear import _linears, _rows_of, takes

__all__ = ["Recordings", "inner_code"]

# Names that inductor's code may use beside its kernels. Others mean work that is not understood here.
_GLOBALS = {"torch", "assert_size_stride", "assert_alignment", "empty_strided_cpu", "reinterpret_tensor"}
_ATTRIBUTES = {"clear", "ops", "anabranch", "default", "linear_rows", "linear_rows_of_one", "tree_layer"}
_KERNEL = "cpp_fused"
_LINE = 64  # bytes
_AFTER = 2  # the step of a kind (so many rows, so many scores) that is recorded
_AGAIN = 100  # steps of a kind before it is recorded again
_MOST = 128  # kinds that are kept
_MOST_PROBLEMS = 4  # kinds that could not be recorded, before no other is tried
_MOST_CHANGES = 8  # times that a model may change under its recordings

Place = tuple[int, int]  # (base, offset): the address bases[base] + offset; base 0 is 0
_OUT = 1  # the base of what holds the scores; those of ids, positions and keep follow


class _Address(int):
    """An argument of a call that is an address, not a number."""


# ------------------------------------------------------------------------------------------------ memory


class _Arena:
    """Memory in blocks that are used again once no tensor is in them, the same way each time."""

    def __init__(self) -> None:
        self.blocks: list[Any] = []

    def take(self, size: int) -> Any:
        """A free block of at least so many bytes: NumPy uint8, on a cache line."""
        idle = [i for i, held in enumerate(_held(self.blocks)) if held <= _IDLE and self.blocks[i].nbytes >= size]
        if not idle:
            self.blocks.append(_block(size))
            return self.blocks[-1]
        return self.blocks[min(idle, key=lambda i: self.blocks[i].nbytes)]

    def empty(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor in a block of its own."""
        extent = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if all(size) else 0
        flat = torch.from_numpy(self.take(max(extent, 1) * dtype.itemsize))[: extent * dtype.itemsize]
        return flat.view(dtype).as_strided(tuple(size), tuple(stride))

    def poison(self) -> None:
        """Fills all blocks with NaN: what a run does not compute itself shows."""
        for block in self.blocks:
            block.fill(0xFF)

    def block_of(self, place: int) -> Any:
        """The block that an address lies in; None for none."""
        return next((b for b in self.blocks if b.ctypes.data <= place < b.ctypes.data + b.nbytes), None)


def _block(size: int) -> Any:
    memory = np.empty(size + _LINE, dtype=np.uint8)
    at = -memory.ctypes.data % _LINE
    return memory[at : at + size]


def _held(blocks: list[Any]) -> list[int]:
    # A tensor made of an array holds a reference to it for as long as any tensor shares its memory.
    return [sys.getrefcount(block) for block in blocks]


_IDLE = _held([_block(1)])[0]


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


class _Recorder:
    """Runs inductor's code once and notes its calls. What cannot be noted is done all the same, and is a `problem`."""

    def __init__(self, step: Step, inputs: Sequence[Tensor], weights: Sequence[Tensor], arena: _Arena) -> None:
        self.calls: list[tuple[str, Any]] = []  # a method of _cpu.Recording, and its arguments
        self.arena = arena
        self.problem: str | None = None
        self.group = 0
        self.layers: list[int] = []
        self.runs = 0
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
            self._check(args)
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

    def _check(self, args: list[Any]) -> None:
        for x in args:
            if isinstance(x, Tensor):
                if x.numel() and x.data_ptr() not in self._known:
                    raise ValueError("the compiled code reads a tensor that is neither a weight nor the step's")
            elif type(x) is not int:
                raise ValueError(f"the compiled code takes a {type(x).__name__}")

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
        out = _linears(x, weights, biases, self.arena.empty)
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
        out = self.arena.empty(result.shape, result.stride(), result.dtype).copy_(result)
        cache = self._step.cache
        dims = (cache.head_dim, cache.v_head_dim)
        chosen = backends.choose(backend, query.device, query.dtype, dims[0], cache.kv_format.dtype, dims[1])
        group = query.shape[1] // cache.num_kv_heads
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        problem = None
        if step.data_ptr() != self._step.handle.data_ptr() or chosen.name != cpu.name or cache.v_in_k:
            problem = "attention over something else than the step, by the cpu backend"
        elif any(x.stride(2) != 1 for x in (q, k, v)) or not out.is_contiguous():
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


def _at(x: Tensor | None) -> _Address:
    return _Address(native.address(x))


# ------------------------------------------------------------------------------------------------ recorded steps


class Recorded:
    """One step's calls, for any step of as many rows and scores over the same cache."""

    def __init__(self, recorder: _Recorder, cache: TreeCache, inputs: Sequence[Tensor], scores: Tensor) -> None:
        """scores: what the recorded step gave; raises ValueError where the calls cannot be made again."""
        from anabranch import _cpu

        if recorder.problem is None and recorder.runs != 1:
            raise ValueError("the compiled forward is not one piece of code")
        if recorder.problem is not None:
            raise ValueError(recorder.problem)
        if sorted(recorder.layers) != list(range(cache.num_layers)):
            raise ValueError("not every layer of the cache has attention once")
        block = recorder.arena.block_of(scores.data_ptr())
        if block is None:
            raise ValueError("the scores are not of the compiled code's own making")
        self._group, self._cache = recorder.group, cache
        self._bytes, self._dtype = block.nbytes, scores.dtype
        self._offset = (scores.data_ptr() - block.ctypes.data) // scores.element_size()
        self._shape, self._stride = scores.shape, scores.stride()
        ranges = [(block.ctypes.data, block.nbytes), *((x.data_ptr(), x.numel() * x.element_size()) for x in inputs)]
        self._calls = _cpu.Recording()
        for method, args in recorder.calls:
            getattr(self._calls, method)(*_placed(args, ranges))

    def __call__(self, inputs: Sequence[Tensor], step: Step, outputs: _Arena) -> Tensor:
        """Scores of a step that was not used yet; inputs: as the recorded step's. Memory comes from `outputs`."""
        step.plan.require_unused()
        scores = self.run(inputs, step, outputs)
        step.plan.replayed()
        return scores

    def run(self, inputs: Sequence[Tensor], step: Step, outputs: _Arena) -> Tensor:
        cache = self._cache
        arrays = cpu.plan_arrays(step.plan, self._group, cache.num_kv_heads, cache.dtype)
        out = torch.from_numpy(outputs.take(self._bytes))
        self._calls.run(
            [0, *(x.data_ptr() for x in (out, *inputs))], (*arrays.addresses, arrays.strip), arrays.num_items,
            arrays.num_merge, step.plan.slots.data_ptr(), threads.count(),
        )  # fmt: skip
        whole = out[: self._bytes // self._dtype.itemsize * self._dtype.itemsize].view(self._dtype)
        return whole.as_strided(self._shape, self._stride, self._offset)

    def __len__(self) -> int:
        return len(self._calls)


def _placed(x: Any, ranges: Sequence[tuple[int, int]]) -> Any:
    """Arguments of a call with a place for each address, and for each number among a kernel's arguments."""
    if isinstance(x, _Address):
        for base, (begin, size) in enumerate(ranges, _OUT):
            if begin <= x < begin + size:
                return (base, x - begin)
        return (0, int(x))
    if isinstance(x, (list, tuple)):
        return type(x)(_placed(y, ranges) for y in x) if type(x) in (list, tuple) else x
    return x


class Recordings:
    """The recorded steps of a compiled model. Whoever runs them says when the model may have changed (`forget`).

    Attributes:
        problem: why no step is recorded, in words; None as long as steps are.
        replays: steps that were replayed.
    """

    def __init__(self) -> None:
        self.problem: str | None = None
        self.replays = 0
        self._codes: list[Any] = []
        self._recorded: dict[tuple[int, int], Recorded] = {}  # by rows and scores; the one used last is the last
        self._seen: Counter[tuple[int, int]] = Counter()
        self._failed = self._forgotten = 0
        self._arena, self._outputs = _Arena(), _Arena()
        self._cache: TreeCache | None = None

    def __len__(self) -> int:
        return len(self._recorded)

    def add(self, compiled: Any) -> None:
        """A compiled graph that steps will run."""
        code = inner_code(compiled)
        if code is None:
            self.problem = "this version of torch keeps its compiled code in another place"
        else:
            self._codes.append(code)

    def forget(self) -> None:
        """Drop what was recorded; steps are recorded again as they come."""
        if self._recorded:
            self._forgotten += 1
            if self._forgotten > _MOST_CHANGES:
                self.problem = f"the model changed {self._forgotten} times"
        self._clear()

    def _clear(self) -> None:
        self._recorded.clear()
        self._seen.clear()

    def __call__(
        self, model: Any, ids: Tensor, positions: Tensor, step: Step, keep: Tensor, run: Callable[[], Tensor]
    ) -> Tensor:
        """Scores of a step: replayed where one like it was recorded, else ``run()``."""
        inputs = (ids, positions, keep)
        if self.problem is not None or not _fits(step, inputs):
            return run()
        if step.cache is not self._cache:
            self._clear()
            self._cache = step.cache
        key = (step.num_rows, keep.shape[0])
        recorded = self._recorded.pop(key, None)
        if recorded is not None:
            self._recorded[key] = recorded
            scores = recorded(inputs, step, self._outputs)
            self.replays += 1
            return scores
        self._seen[key] += 1
        return run() if self._seen[key] < _AFTER else self._record(model, key, inputs, step, run)

    def _record(
        self, model: Any, key: tuple[int, int], inputs: Sequence[Tensor], step: Step, run: Callable[[], Tensor]
    ) -> Tensor:
        weights = [*model.parameters(), *model.buffers()]
        recorder = _Recorder(step, inputs, weights, self._arena)
        with _in_place_of(self._codes, recorder):
            scores = run()
        want = scores.clone()  # where nothing is used again
        self._seen[key] = -_AGAIN  # steps until it is tried anew, should it fail or be dropped
        try:
            recorded = Recorded(recorder, step.cache, inputs, scores)
            self._arena.poison()
            if not _same_bits(recorded.run(inputs, step, self._outputs), want):
                raise ValueError("recorded calls give other scores than the step that they were recorded from")
        except ValueError as error:
            self._failed += 1
            if self._failed >= _MOST_PROBLEMS:
                self.problem = str(error)
            return want
        self._recorded[key] = recorded
        if len(self._recorded) > _MOST:
            del self._recorded[next(iter(self._recorded))]
        return want


def _fits(step: Step, inputs: Sequence[Tensor]) -> bool:
    """Whether a step is one that may be replayed: over its own branches, watched by nobody, without gradients."""
    return (
        not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and unobserved(*inputs)
        and step.cache.device.type == "cpu"
        and not step.plan.turned
        and all(x.is_contiguous() for x in inputs)
    )


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@contextmanager
def _in_place_of(codes: Sequence[Any], other: Callable[[Any, list[Any]], Any]) -> Iterator[None]:
    """Within the block, ``other(code, args)`` is called in the place of inductor's ``code(args)``."""
    before = [code.current_callable for code in codes]
    for code in codes:
        code.current_callable = partial(other, code.current_callable)
    try:
        yield
    finally:
        for code, callable_ in zip(codes, before, strict=True):
            code.current_callable = callable_
