"""One attention layer's rows over a tree: what depends on the step, shared by the eager call and the compiled op.

A step is another object, with other numbers, in every forward. Whatever of it ``torch.compile`` traces becomes a guard,
and a guard that fails is a recompilation. So traced code sees one tensor, the step's handle, and the op
``anabranch::tree_layer`` finds the step behind it when the graph runs. There the checks are made, and keys and values
are written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anabranch.attention.tree import tree_attention
from anabranch.kv.cache import TreeCache
from anabranch.kv.step import Step, step_of
from anabranch.ops.tree import NO_SOFTCAP, NO_WINDOW, _lib

__all__ = ["NO_GRADIENT", "attend", "check_step", "traced"]


def attend(
    step: Step,
    layer: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_ids: Any = None,
    *,
    where: str = "attention",
    cached: bool = False,
    backend: str = "auto",
    rope: str = "",
    **options: Any,
) -> Tensor:
    """Write one layer's keys and values to the step's cache, and attend there.

    Args:
        query: [1, num_q_heads, T, head_dim]; key: [1, num_kv_heads, T, head_dim]; value: [1, num_kv_heads, T,
            v_head_dim]; T = ``step.num_rows``.
        position_ids: what the model was given, [1, T], where it hands them on; compared with the step's in layer 0.
        where: names the module in messages.
        cached: whether the model was asked for a cache of Transformers' own.
        rope: kind of the module's rotary embeddings where they look at the whole forward (hf/rope.py); "" elsewhere.
        options: scale, softcap, window and sinks of ``tree_attention``.

    Returns:
        [1, T, num_q_heads, v_head_dim].

    Raises:
        ValueError: rows, positions, layer, dtype or device that do not fit the step; nothing was written.
    """
    check_step(step, layer, query, key, position_ids, where=where, cached=cached, rope=rope)
    _check_dims(step.cache, layer, key, value, where)
    # [1, H, T, D] → [T, H, D]. Rotary embeddings keep the layout of the projection, so this is usually free.
    q, k, v = (x.detach()[0].transpose(0, 1).contiguous() for x in (query, key, value))
    _check_dtype(step, q, k, v, where)
    step.cache.write(layer, k, v, step, backend=backend)
    out = tree_attention(q, step.cache, layer, step, backend=backend, **options)
    assert isinstance(out, Tensor)  # no LSE was asked for
    return out.unsqueeze(0)


def check_step(
    step: Step, layer: Any, query: Tensor, key: Tensor, position_ids: Any, *, where: str, cached: bool, rope: str
) -> None:
    """Raise ValueError for a layer's call whose rows, positions or layer do not fit the step; arguments: `attend`'s."""
    _check_rows(step, layer, query, key, where, cached)
    if layer == 0:
        _check_positions(step, position_ids)
    if rope and not step.cache.for_a_model:
        raise ValueError(
            f"tree_step: {where} has {rope} rotary embeddings, which look at the whole forward, and this cache knows "
            "no model, so it cannot tell when that matters; make it with TreeCache.for_model(model)"
        )


def _check_rows(step: Step, layer: Any, query: Tensor, key: Tensor, where: str, cached: bool) -> None:
    rows = step.num_rows
    if query.shape[0] != 1:
        raise ValueError(
            f"input_ids: with tree_step the batch must be 1 (all rows packed as [1, {rows}]), "
            f"got a batch of {query.shape[0]}; pass ids[None]"
        )
    if query.shape[2] != rows:
        raise ValueError(
            f"input_ids: tree_step has {rows} rows, but the model was given {query.shape[2]} tokens; "
            "reserve as many rows in cache.step({branch: count}) as tokens are passed, in the same order"
        )
    if key.shape[2] != rows or cached:
        raise ValueError(
            "use_cache: must be False with tree_step, and no past_key_values may be given "
            f"({where} got keys for {key.shape[2]} tokens, use_cache={cached}): "
            "the TreeCache holds the keys and values"
        )
    cache = step.cache
    if not isinstance(layer, int) or not 0 <= layer < cache.num_layers:
        raise ValueError(
            f"tree_step: {where} is layer {layer!r}, but the cache has layers "
            f"0…{cache.num_layers - 1}; make the cache with TreeCache.for_model(model)"
        )


def _check_dims(cache: TreeCache, layer: int, key: Tensor, value: Tensor, where: str) -> None:
    dims, made_for = (key.shape[3], value.shape[3]), (cache.head_dim, cache.v_head_dim)
    if key.shape[1] != cache.num_kv_heads or dims != made_for:
        raise ValueError(
            f"tree_step: {where} (layer {layer}) has {key.shape[1]} KV heads of {_dims(*dims)}, but the cache was made "
            f"for {cache.num_kv_heads} of {_dims(*made_for)}; make the cache with TreeCache.for_model(model)"
        )


def _dims(k: int, v: int) -> str:
    """Head dims of K and V in a message."""
    return str(k) if k == v else f"{k} (V: {v})"


def _check_dtype(step: Step, q: Tensor, k: Tensor, v: Tensor, where: str) -> None:
    """Say why a model's keys do not fit its cache: autocast, or a model that was moved or converted since."""
    cache = step.cache
    for name, x in (("queries", q), ("keys", k), ("values", v)):
        if x.dtype != cache.dtype:
            if torch.is_autocast_enabled(x.device.type):
                raise ValueError(
                    f"torch.autocast: it makes the {name} of {where} {x.dtype}, but the cache holds {cache.dtype}; run "
                    "forwards over a tree outside autocast, and load the model in the dtype it is to run in "
                    f"(model.to({x.dtype}), with a cache of that dtype)"
                )
            raise ValueError(
                f"tree_step: the {name} of {where} are {x.dtype}, but the cache holds {cache.dtype}; if the model was "
                f"converted since, make a new cache (TreeCache.for_model(model)), or call model.to({cache.dtype})"
            )
        if x.device != cache.device:
            raise ValueError(
                f"tree_step: the {name} of {where} are on {x.device}, but the cache is on {cache.device}; move the "
                f"model back (model.to({str(cache.device)!r})), or make a new cache (TreeCache.for_model(model))"
            )


def _check_positions(step: Step, position_ids: Any) -> None:
    """Most decoders hand position_ids on to attention: a caller who forgot them would get wrong logits silently."""
    if not isinstance(position_ids, Tensor) or position_ids.ndim != 2:
        return
    expected = step.position_ids
    same_memory = position_ids.data_ptr() == expected.data_ptr() and position_ids.numel() == expected.numel()
    if not same_memory and not torch.equal(position_ids[0].to(expected.device), expected):
        raise ValueError(
            "position_ids: with tree_step pass position_ids=step.position_ids[None]; got other positions, "
            "and rotary embeddings would disagree with the tree"
        )


# ------------------------------------------------------------------------------------------------ under torch.compile

# The handle is declared as changed: so no compiler drops a layer whose output nobody reads, merges two, or puts them in
# another order. As a tensor on the host it also keeps "reduce-overhead" from recording the op in a CUDA graph.
_lib.define(
    "tree_layer(Tensor query, Tensor key, Tensor value, Tensor(a!) step, Tensor? position_ids, Tensor? sinks, "
    "float scale, float softcap, int window, int layer, str where, bool cached, str backend, str rope) -> Tensor"
)
_lib.define("refuse_gradient(Tensor out, Tensor query) -> Tensor")
_lib.define("raise_no_gradient(Tensor grad) -> Tensor")

NO_GRADIENT = (
    "attention over a TreeCache has no gradient: the keys and values of earlier steps are gone "
    "from the graph. Train with branch_mask=BranchMask… (branch_attention), which is differentiable"
)


def traced(
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: Step,
    position_ids: Any,
    *,
    where: str,
    cached: bool,
    backend: str,
    scale: float | None,
    softcap: float | None,
    window: int | None,
    sinks: Tensor | None,
    rope: str,
) -> Tensor:
    """`attend` as one op, for code that ``torch.compile`` traces: of the step it reads the handle alone."""
    out = torch.ops.anabranch.tree_layer(
        query.detach(),
        key.detach(),
        value.detach(),
        step.handle,
        position_ids if layer == 0 and isinstance(position_ids, Tensor) and position_ids.ndim == 2 else None,
        sinks,
        float(query.shape[-1] ** -0.5 if scale is None else scale),
        NO_SOFTCAP if softcap is None else float(softcap),
        NO_WINDOW if window is None else int(window),
        layer,
        where,
        cached,
        backend,
        rope,
    )
    if torch.is_grad_enabled() and query.requires_grad:
        out = torch.ops.anabranch.refuse_gradient(out, query)
    return out


def _tree_layer(
    query: Tensor, key: Tensor, value: Tensor, step: Tensor, position_ids: Tensor | None, sinks: Tensor | None,
    scale: float, softcap: float, window: int, layer: int, where: str, cached: bool, backend: str, rope: str,
) -> Tensor:  # fmt: skip
    return attend(
        step_of(step), layer, query, key, value, position_ids, where=where, cached=cached, backend=backend, rope=rope,
        scale=scale, softcap=None if softcap == NO_SOFTCAP else softcap, window=None if window == NO_WINDOW else window,
        sinks=sinks,
    )  # fmt: skip


def _tree_layer_fake(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> Tensor:
    return query.new_empty((query.shape[0], query.shape[2], query.shape[1], value.shape[3]))


def _refuse(grad: Tensor) -> Tensor:
    raise RuntimeError(NO_GRADIENT)


for _key in ("CPU", "CUDA"):
    _lib.impl("tree_layer", _tree_layer, _key)
    _lib.impl("refuse_gradient", lambda out, query: out.clone(), _key)
    _lib.impl("raise_no_gradient", _refuse, _key)
torch.library.register_fake("anabranch::tree_layer", _tree_layer_fake, lib=_lib)
torch.library.register_fake("anabranch::refuse_gradient", lambda out, query: torch.empty_like(out), lib=_lib)
torch.library.register_fake("anabranch::raise_no_gradient", lambda grad: torch.empty_like(grad), lib=_lib)
torch.library.register_autograd(
    "anabranch::refuse_gradient",
    # An op, so that it raises when a compiled backward runs, and not when the forward is compiled.
    lambda ctx, grad: (None, torch.ops.anabranch.raise_no_gradient(grad).transpose(1, 2)),
    lib=_lib,
)
