"""The torch ops: schemas, fake implementations, dispatch to a backend.

``torch.ops.anabranch.tree_attention`` takes a plan by its handle (an int64 CPU tensor [1]); everything that depends on
Python objects happens inside the op, so ``torch.compile(fullgraph=True)`` sees tensors only.

`attend` and `write` are the ops for our own callers: they go straight to the backend where the dispatcher would only
bring them there, which it takes some 10 µs for, in every layer of every step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anabranch import backends
from anabranch.backends.formats import KVScales
from anabranch.plan.plan import Plan, plan_of

_lib = torch.library.Library("anabranch", "DEF")
_lib.define(
    "tree_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor plan, Tensor? sinks, float scale, float softcap, "
    "int window, int layer, str backend, bool return_lse, Tensor? k_scales=None, Tensor? v_scales=None) "
    "-> (Tensor, Tensor)"
)
_lib.define(
    "write_kv(Tensor k, Tensor? v, Tensor(a!) k_pages, Tensor(b!)? v_pages, Tensor plan, int layer, str backend, "
    "Tensor(c!)? k_scales=None, Tensor(d!)? v_scales=None) -> ()"
)

#: values that stand for "off" in the op's schema, which has no optional numbers
NO_SOFTCAP = 0.0
NO_WINDOW = 0


try:  # not public, but the only words there are for "nobody looks on"
    _modes, _functions = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
    _transforms, _tracing = torch._C._functorch.peek_interpreter_stack, torch._C._get_tracing_state
    _profiled = torch.autograd._profiler_enabled
except AttributeError:  # pragma: no cover
    _modes = None  # type: ignore[assignment]


def unobserved(*tensors: Tensor) -> bool:
    """Whether the dispatcher would do nothing but call the CPU or CUDA implementation: plain tensors without gradients,
    and no compiler, mode, transform, trace or profiler that wants to see the op."""
    if torch.compiler.is_compiling() or _modes is None or _modes() or _functions():
        return False
    if _transforms() is not None or _tracing() is not None or _profiled():
        return False
    grad = torch.is_grad_enabled()
    for x in tensors:
        if type(x) is not Tensor or (grad and x.requires_grad):
            return False
    return True


def attend(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    plan: Plan,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    layer: int,
    backend: str,
    return_lse: bool,
    kv_scales: KVScales | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``torch.ops.anabranch.tree_attention`` with a plan for its handle. lse may be None without `return_lse`.

    out: where the result goes. The op itself has no such argument: where somebody looks on, the result is copied.
    """
    if unobserved(q):
        return _run(
            q, k_pages, v_pages, plan, sinks, scale, softcap, window, layer, backend, return_lse, kv_scales, out
        )
    result, lse = torch.ops.anabranch.tree_attention(
        q, k_pages, v_pages, plan.handle, sinks, scale, softcap, window, layer, backend, return_lse,
        *(kv_scales or (None, None)),
    )  # fmt: skip
    return result if out is None else out.copy_(result), lse


def write(
    k: Tensor,
    v: Tensor | None,
    k_pages: Tensor,
    v_pages: Tensor | None,
    plan: Plan,
    layer: int,
    backend: str,
    kv_scales: KVScales | None = None,
) -> None:
    """``torch.ops.anabranch.write_kv`` with a plan instead of its handle. v and v_pages None: V is a part of K."""
    if unobserved(k) if v is None else unobserved(k, v):
        _run_write(k, v, k_pages, v_pages, plan, layer, backend, kv_scales)
    else:
        torch.ops.anabranch.write_kv(
            k.detach(), None if v is None else v.detach(), k_pages, v_pages, plan.handle, layer, backend,
            kv_scales and kv_scales.k, None if v is None else kv_scales and kv_scales.v,
        )  # fmt: skip


def _scales(k: Tensor | None, v: Tensor | None) -> KVScales | None:
    return None if k is None else KVScales(k, k if v is None else v)


def _run(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    plan: Plan,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    layer: int,
    backend: str,
    return_lse: bool,
    kv_scales: KVScales | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    chosen = backends.choose(backend, q.device, q.dtype, q.shape[2], k_pages.dtype, v_pages.shape[3])
    plan.check(layer, k_pages)
    found, lse = chosen.attention(
        plan.queries(q, layer),
        k_pages,
        v_pages,
        plan,
        scale=scale,
        softcap=None if softcap == NO_SOFTCAP else softcap,
        window=None if window == NO_WINDOW else window,
        sinks=sinks,
        return_lse=return_lse,
        kv_scales=kv_scales,
        out=out,
    )
    if found.shape[0] != plan.num_rows:
        raise ValueError(
            f"backend: {chosen.name!r} cannot merge the {found.shape[0]} query rows of views into the step's "
            f"{plan.num_rows} rows; use another backend"
        )
    return found, lse


def _run_write(
    k: Tensor,
    v: Tensor | None,
    k_pages: Tensor,
    v_pages: Tensor | None,
    plan: Plan,
    layer: int,
    backend: str,
    kv_scales: KVScales | None = None,
) -> None:
    slots = plan.begin_write(layer)  # raises before anything is written
    v_head_dim = 0 if v is None else v.shape[2]
    chosen = backends.choose(backend, k.device, k.dtype, k.shape[2], k_pages.dtype, v_head_dim)
    chosen.write_kv(k, v, k_pages, v_pages, slots, kv_scales)
    plan.end_write(layer)


def _lse_shape(q: Tensor, return_lse: bool) -> tuple[int, ...]:
    return (q.shape[0], q.shape[1]) if return_lse else (0,)


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _tree_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    plan: Tensor,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    layer: int,
    backend: str,
    return_lse: bool,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    out, lse = _run(
        q, k_pages, v_pages, plan_of(plan), sinks, scale, softcap, window, layer, backend, return_lse,
        _scales(k_scales, v_scales),
    )  # fmt: skip
    return out, lse if lse is not None else q.new_empty((0,), dtype=_lse_dtype(q))


def _tree_attention_fake(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    plan: Tensor,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    layer: int,
    backend: str,
    return_lse: bool,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:2], v_pages.shape[3])), q.new_empty(_lse_shape(q, return_lse), dtype=_lse_dtype(q))


def _no_backward(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(
        "tree_attention reads a KV cache and has no backward: generate under torch.no_grad(), and train with "
        "anabranch.branch_attention"
    )


def _write_kv(
    k: Tensor,
    v: Tensor | None,
    k_pages: Tensor,
    v_pages: Tensor | None,
    plan: Tensor,
    layer: int,
    backend: str,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    _run_write(k, v, k_pages, v_pages, plan_of(plan), layer, backend, _scales(k_scales, v_scales))


def _write_kv_fake(
    k: Tensor,
    v: Tensor | None,
    k_pages: Tensor,
    v_pages: Tensor | None,
    plan: Tensor,
    layer: int,
    backend: str,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    return None


for _key in ("CPU", "CUDA"):
    _lib.impl("tree_attention", _tree_attention, _key)
    _lib.impl("write_kv", _write_kv, _key)
torch.library.register_fake("anabranch::tree_attention", _tree_attention_fake, lib=_lib)
torch.library.register_fake("anabranch::write_kv", _write_kv_fake, lib=_lib)
torch.library.register_autograd("anabranch::tree_attention", _no_backward, lib=_lib)
