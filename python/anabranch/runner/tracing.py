"""A model's forward over a tree as graphs of torch.compile: one for a single row, one for any other number of rows.

Dynamo traces the forward into one graph (attention and the KV write are the op ``anabranch::tree_layer``, which reads
of a step its handle alone, so plans and slots are data). Its linear layers then become calls of
``anabranch::linear_rows``, which chooses kernels as `OwnLinear` does, and inductor compiles the rest.
"""

from __future__ import annotations

import contextlib
import operator
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from anabranch._cache_folder import cache_folder
from anabranch.backends.threads import torch_on_all
from anabranch.kv.step import Step
from anabranch.ops.tree import _lib
from anabranch.runner.linear import _linear, _linears, rows_for, takes
from anabranch.runner.recorded import Recordings

__all__ = ["Graphs", "compiler_problem", "cxx"]

_FOLDER = "TORCHINDUCTOR_CACHE_DIR"
_ANY = 1 << 40  # rows: no bound


def cxx() -> str:
    """The C++ compiler that inductor calls."""
    command = shlex.split(os.environ.get("CXX", "")) or ["clang++" if sys.platform == "darwin" else "g++"]
    return command[0]


def compiler_problem() -> str | None:
    """Why torch.compile cannot make code for this CPU, with the remedy; None where its C++ compiler is there."""
    if shutil.which(cxx()) is None:
        return f"no C++ compiler: {cxx()} is not on PATH; install g++, or set CXX"
    return None


# ------------------------------------------------------------------------------------------------ linear layers

_lib.define("linear_rows(Tensor x, Tensor weight, Tensor? bias, int most_rows) -> Tensor")


def _linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None, most_rows: int) -> Tensor:
    if x.numel() <= most_rows * weight.shape[1] and takes(x, weight, bias):
        return _linear(x, weight, bias)
    with torch_on_all():
        return torch.nn.functional.linear(x, weight, bias)


_lib.impl("linear_rows", _linear_rows, "CPU")
torch.library.register_fake(
    "anabranch::linear_rows", lambda x, weight, bias, most_rows: x.new_empty((*x.shape[:-1], weight.shape[0])), lib=_lib
)


_lib.define("linear_rows_of_one(Tensor x, Tensor[] weights, Tensor?[] biases, int most_rows) -> Tensor[]")


def _linear_rows_of_one(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], most_rows: int) -> list[Tensor]:
    pairs = list(zip(weights, biases, strict=True))
    if x.numel() <= most_rows * weights[0].shape[1] and all(takes(x, weight, bias) for weight, bias in pairs):
        return _linears(x, weights, biases)
    with torch_on_all():
        return [torch.nn.functional.linear(x, weight, bias) for weight, bias in pairs]


_lib.impl("linear_rows_of_one", _linear_rows_of_one, "CPU")
torch.library.register_fake(
    "anabranch::linear_rows_of_one",
    lambda x, weights, biases, most_rows: [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights],
    lib=_lib,
)


def use_own_linear(graph: torch.fx.GraphModule, setting: bool | None) -> int:
    """Replace the linear layers of a graph by our op where `rows_for` says that our kernel is to have some of their
    calls; how many. Layers of one input (q, k and v; gate and up) become one op."""
    alike: dict[tuple[Any, ...], list[torch.fx.Node]] = {}
    for node in graph.graph.nodes:
        if node.op != "call_function" or node.target is not torch._C._nn.linear or node.kwargs:
            continue
        x, weight, bias = (*node.args, None)[:3]
        x, w = (part.meta.get("example_value") for part in (x, weight))
        if not isinstance(w, Tensor) or not isinstance(x, Tensor) or x.dtype != w.dtype or w.dim() != 2:
            continue
        most = rows_for(w.device, w.dtype, setting, w.shape[1])
        if not most:
            continue
        node.target = torch.ops.anabranch.linear_rows.default
        node.args = (node.args[0], weight, bias, int(min(most, _ANY)))
        given = all(part is None or part.op in ("placeholder", "get_attr") for part in (weight, bias))
        alike.setdefault((node.args[0], node.args[3], "" if given else node), []).append(node)
    for nodes in alike.values():
        if len(nodes) > 1:
            _join(graph, nodes)
    graph.recompile()
    return sum(map(len, alike.values()))


def _join(graph: torch.fx.GraphModule, nodes: list[torch.fx.Node]) -> None:
    """Replace calls of ``linear_rows`` with one x, whose weights are inputs of the graph, by one call."""
    x, most = nodes[0].args[0], nodes[0].args[3]
    with graph.graph.inserting_before(nodes[0]):
        weights, biases = ([node.args[i] for node in nodes] for i in (1, 2))
        every = graph.graph.call_function(torch.ops.anabranch.linear_rows_of_one.default, (x, weights, biases, most))
        parts = [graph.graph.call_function(operator.getitem, (every, i)) for i in range(len(nodes))]
    for node, part in zip(nodes, parts, strict=True):
        part.meta = dict(node.meta)
        node.replace_all_uses_with(part)
        graph.graph.erase_node(node)


# ------------------------------------------------------------------------------------------------ graphs


def inductor(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """Compile a traced graph; what is compiled is kept on disk, for other processes."""
    from torch._inductor.compile_fx import compile_fx

    with _kept_on_disk():
        compiled: Any = compile_fx(graph, inputs)
        return compiled  # type: ignore[no-any-return]


@contextlib.contextmanager
def _kept_on_disk() -> Iterator[None]:
    """Inductor's own cache, in the package's folder; where TORCHINDUCTOR_CACHE_DIR names another one, there."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    before = os.environ.get(_FOLDER)
    if before and before != default_cache_dir():  # torch sets the variable itself, to its folder for temporary files
        yield
        return
    folder = cache_folder() / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        yield
        return
    os.environ[_FOLDER] = str(folder)
    try:
        yield
    finally:
        os.environ.pop(_FOLDER)
        if before:
            os.environ[_FOLDER] = before


def _forward(model: Any, ids: Tensor, positions: Tensor, step: Step, keep: Tensor, backend: str) -> Tensor:
    # No attention_mask: where nobody reads one, the compiler leaves it out.
    options = {} if backend == "auto" else {"tree_backend": backend}
    out: Tensor = model(
        input_ids=ids, position_ids=positions, tree_step=step, use_cache=False, logits_to_keep=keep, **options
    ).logits
    return out[0]


class Graphs:
    """The compiled forward of one model: ``graphs(model, ids, step, keep)`` as `runner.eager.forward`.

    While `warming` is set, what has no graph yet is traced and compiled. Otherwise a call that fits no graph (its
    guards say so) is traced again but not compiled, so that it waits for no compiler and is right all the same;
    `strays` counts these.

    Attributes:
        warming: whether new graphs are to be compiled.
        compiled, strays: graphs that were compiled; those that a later call needed besides.
        linears: linear layers of the compiled graphs that may run our kernel.
        recordings: steps that are replayed without torch, by their rows.
    """

    def __init__(self, backend: str = "auto", own_linear: bool | None = None) -> None:
        self.warming = False
        self.compiled = self.strays = self.linears = 0
        self.recordings = Recordings()
        self._backend, self._own_linear = backend, own_linear
        # Dynamo keeps graphs, and limits their number, by code object: each has one of its own.
        function = FunctionType(_forward.__code__.replace(), globals(), "_forward")
        self._run = torch.compile(function, backend=self._made, fullgraph=True)

    def __call__(self, model: Any, ids: Tensor, step: Step, keep: Tensor) -> Tensor:
        rows, kept = ids.shape[0], keep.shape[0]
        if kept == 1 and rows > 1:
            keep = torch.cat([keep, keep])  # a size of 1 is special to torch.compile; this saves a graph
        given, positions = ids[None], step.position_ids[None]
        if self.warming and rows > 1:
            for tensor, dim in ((given, 1), (positions, 1), (keep, 0)):
                torch._dynamo.mark_dynamic(tensor, dim)
        run = partial(self._run, model, given, positions, step, keep, self._backend)
        scores: Tensor = run() if self.warming else self.recordings(model, given, positions, step, keep, run)
        return scores[:kept]

    def _made(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        if not self.warming:
            self.strays += 1
            return graph.forward
        self.compiled += 1
        self.linears += use_own_linear(graph, self._own_linear)
        compiled = inductor(graph, inputs)
        self.recordings.add(compiled)
        return compiled
