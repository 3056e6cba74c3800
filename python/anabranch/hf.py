"""`attn_implementation="anabranch"` for any Hugging Face decoder, through Transformers' own registries.

Nothing is patched. `register()` puts one attention function and one mask function under the name ``"anabranch"``;
hooks.py calls it at the moment Transformers' modelling code is loaded, so that `import anabranch`
neither imports it (seconds) nor depends on which of the two was imported first.

The attention function works in two ways:

* **Over a tree**: ``model(input_ids=ids[None], position_ids=step.position_ids[None], tree_step=step,
  use_cache=False)``. Transformers hands every extra keyword on to the attention function. Each layer writes its keys
  and values to ``step.cache`` and every row attends to its own branch's context there. ``tree_backend=`` picks one.
* **As usual**, without ``tree_step``: a plain ``model(…)`` or ``model.generate(…)``, with padding, static caches and
  so on, computed by Transformers' own code (SDPA, or the model's eager formula where SDPA cannot do it: softcap, sinks,
  attention weights asked for).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import torch

from anabranch.hf_mask import DeferredMask, mask, tree_mask
from anabranch.hf_shape import ModelShape, Probe, UnsupportedModel, describe, refuse_by_config, uses_anabranch

if TYPE_CHECKING:
    from anabranch.cache import Step

__all__ = [
    "ModelShape",
    "UnsupportedModel",
    "describe",
    "enable",
    "register",
    "tree_mask",
    "uses_anabranch",
]

NAME = "anabranch"

# Keywords that change what attention computes and that attention over a tree has no answer to. Anything else a model
# or a caller passes along (output_hidden_states, return_dict, …) is not about attention.
_CHANGES_ATTENTION = (
    "position_bias",
    "head_mask",
    "indices",
    "block_indices",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "block_sequence_ids",
    "encoder_hidden_states",
    "sinks",
)


# ------------------------------------------------------------------------------------------------ registration


def register() -> None:
    """Register ``"anabranch"`` as attention implementation and mask function. Idempotent; imports Transformers.

    `import anabranch` sees to it (hooks.py); there is no need to call this.
    """
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NAME, attention)
    # Without a mask function of the same name Transformers passes no mask at all, and padding would be lost silently.
    AttentionMaskInterface.register(NAME, mask)


def enable(model: Any) -> ModelShape:
    """Switch a loaded model to ``"anabranch"`` and return its `ModelShape`.

    Raises `UnsupportedModel` for a model that attention over a tree cannot serve; the model is then as it was before.
    """
    if uses_anabranch(model):
        return describe(model)
    register()
    refuse_by_config(model)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        return describe(model)
    except BaseException:
        model.set_attn_implementation(before)
        raise


# ------------------------------------------------------------------------------------------------ attention


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, Any]:
    """The registered attention function. ``query [B, Hq, T, D]``, ``key``, ``value [B, Hkv, T', D]`` (RoPE applied).

    Returns ``(out [B, T, Hq, D], weights or None)``. With ``tree_step`` among the keywords it attends over the tree.
    """
    step = kwargs.pop("tree_step", None)
    if step is None:
        if kwargs.pop("tree_backend", None) is not None:
            raise ValueError("tree_backend: given without tree_step; pass tree_step=step too, or leave it out")
        return _ordinary(module, query, key, value, attention_mask, *args, **kwargs)
    if isinstance(step, Probe):
        if attention_mask is not None and not isinstance(attention_mask, DeferredMask):
            raise UnsupportedModel(
                f"{type(module).__name__} gives attention a mask of its own making "
                f"(shape {tuple(attention_mask.shape)}), which cannot be honoured over a tree"
            )
        return step.record(module, query, key, value, _window(module, attention_mask, kwargs), kwargs), None
    return _over_tree(module, query, key, value, attention_mask, step, kwargs), None


def _over_tree(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    step: Step,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """``query [1, Hq, T, D]``, ``key``, ``value [1, Hkv, T, D]`` → ``[1, T, Hq, D]``, T = ``step.num_rows``."""
    from anabranch.attention import tree_attention

    layer = _check_tree_call(module, query, key, attention_mask, step, kwargs)
    # [1, H, T, D] → [T, H, D]. Rotary embeddings keep the layout of the projection, so this is usually free.
    q, k, v = (x.detach()[0].transpose(0, 1).contiguous() for x in (query, key, value))
    sinks = kwargs.get("s_aux")
    backend = kwargs.get("tree_backend") or "auto"
    step.cache.write(layer, k, v, step, backend=backend)
    out = tree_attention(
        q,
        step.cache,
        layer,
        step,
        scale=kwargs.get("scaling"),
        softcap=kwargs.get("softcap"),
        window=_window(module, attention_mask, kwargs),
        sinks=None if sinks is None else sinks.detach().reshape(-1),
        backend=backend,
    )
    if query.requires_grad and torch.is_grad_enabled():
        out = _NotDifferentiable.apply(out, query)
    assert isinstance(out, torch.Tensor)  # no LSE was asked for
    return out.unsqueeze(0)


def _check_tree_call(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    step: Step,
    kwargs: dict[str, Any],
) -> int:
    """Raise unless this layer call is one that attention over a tree can honour; returns the layer's index."""
    from anabranch.cache import Step

    if not isinstance(step, Step):
        raise TypeError(f"tree_step: expected the Step that TreeCache.step() returned, got {type(step).__name__}")
    where = type(module).__name__
    rows, layer = step.num_rows, getattr(module, "layer_idx", None)
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
    if key.shape[2] != rows or kwargs.get("use_cache") or kwargs.get("past_key_values") is not None:
        raise ValueError(
            "use_cache: must be False with tree_step, and no past_key_values may be given "
            f"({where} got keys for {key.shape[2]} tokens, use_cache={kwargs.get('use_cache')}): "
            "the TreeCache holds the keys and values"
        )
    if not isinstance(layer, int) or not 0 <= layer < step.cache.num_layers:
        raise ValueError(
            f"tree_step: {where} is layer {layer!r}, but the cache has layers "
            f"0…{step.cache.num_layers - 1}; make the cache with TreeCache.for_model(model)"
        )
    if not _is_causal(module, kwargs) or getattr(module, "is_cross_attention", False):
        raise UnsupportedModel(
            f"tree_step: {where} (layer {layer}) is not causal self-attention; "
            "only decoder layers can attend over a tree"
        )
    given = None if isinstance(attention_mask, DeferredMask) else attention_mask
    if given is not None and not torch.compiler.is_compiling():
        raise ValueError(
            f"attention_mask: must not be given with tree_step (got shape {tuple(given.shape)}): "
            "what a row sees is its branch's context; leave the argument out"
        )
    dropout = kwargs.get("dropout") or 0.0
    if module.training or dropout > 0:
        raise ValueError(
            f"tree_step: {where} is in training mode (dropout={dropout}); call model.eval() first. "
            "For training with a branch mask use anabranch.branch_attention"
        )
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions: there are no attention weights over a tree; pass output_attentions=False")
    for name in _CHANGES_ATTENTION:
        if kwargs.get(name) is not None:
            raise UnsupportedModel(f"{name}: {where} passes it to attention, which cannot honour it over a tree")
    _check_positions(step, kwargs.get("position_ids"), layer)
    return layer


def _check_positions(step: Step, position_ids: Any, layer: int) -> None:
    """Most decoders hand position_ids on to attention: a caller who forgot them would get wrong logits silently."""
    if layer != 0 or not isinstance(position_ids, torch.Tensor) or position_ids.ndim != 2:
        return
    expected = step.position_ids
    same_memory = position_ids.data_ptr() == expected.data_ptr() and position_ids.numel() == expected.numel()
    if not same_memory and not torch.equal(position_ids[0].to(expected.device), expected):
        raise ValueError(
            "position_ids: with tree_step pass position_ids=step.position_ids[None]; got other positions, "
            "and rotary embeddings would disagree with the tree"
        )


def _is_causal(module: torch.nn.Module, kwargs: dict[str, Any]) -> bool:
    given = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def _window(module: torch.nn.Module, attention_mask: Any, kwargs: dict[str, Any]) -> int | None:
    """The layer's sliding window: what the model passes, checked against what its mask says. None = full attention."""
    passed = kwargs.get("sliding_window") or None
    if not isinstance(attention_mask, DeferredMask) or attention_mask.build is None or attention_mask.window == passed:
        return passed
    config = getattr(module, "config", None)
    if passed is None and getattr(config, "attention_chunk_size", None) is None:
        return attention_mask.window  # a model that leaves the window to its mask
    raise UnsupportedModel(
        f"tree_step: {type(module).__name__} passes sliding_window={passed}, but its mask is "
        f"local to {attention_mask.window} tokens; only sliding windows can be honoured over a tree"
    )


class _NotDifferentiable(torch.autograd.Function):
    """Lets a forward run with gradients enabled (people forget no_grad) and fails loudly when they are asked for."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise RuntimeError(
            "attention over a TreeCache has no gradient: the keys and values of earlier steps are gone "
            "from the graph. Train with anabranch.branch_attention, which is differentiable"
        )


# ------------------------------------------------------------------------------------------------ ordinary use


def _ordinary(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, Any]:
    """Transformers' own attention: SDPA where the model allows it, the model's eager formula elsewhere."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if isinstance(attention_mask, DeferredMask):
        attention_mask = attention_mask.resolve()
    eager, allows_sdpa = _formulas(type(module))  # type: ignore[arg-type]
    beyond_sdpa = [name for name in ("softcap", "s_aux", "sinks") if kwargs.get(name) is not None]
    if allows_sdpa and not beyond_sdpa and not kwargs.get("output_attentions"):
        return sdpa_attention_forward(module, query, key, value, attention_mask, *args, **kwargs)
    if eager is None:
        raise UnsupportedModel(
            f"attn_implementation: {type(module).__name__} needs more than SDPA "
            f"({', '.join(beyond_sdpa) or 'output_attentions'}) and its file has no "
            'eager_attention_forward; load the model with attn_implementation="eager"'
        )
    bias = _additive(attention_mask, query, key, _is_causal(module, kwargs))
    return eager(module, query, key, value, bias, *args, **kwargs)


@cache
def _formulas(kind: type) -> tuple[Callable | None, bool]:
    """(the eager attention function in the model's own file, may SDPA stand in for it) for an attention class."""
    from transformers import PreTrainedModel

    file = sys.modules.get(kind.__module__)
    models = (
        [
            c
            for c in vars(file).values()
            if isinstance(c, type) and issubclass(c, PreTrainedModel) and c.__module__ == kind.__module__
        ]
        if file
        else []
    )
    return getattr(file, "eager_attention_forward", None), all(c._supports_sdpa for c in models)


def _additive(
    attention_mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor, is_causal: bool
) -> torch.Tensor | None:
    """SDPA's mask conventions → the additive one of eager formulas: 0 where visible, the type's minimum elsewhere."""
    q_length, kv_length = query.shape[2], key.shape[2]
    if attention_mask is None:
        if not is_causal or q_length == 1:
            return None
        attention_mask = _causal(q_length, kv_length, query.device)
    if attention_mask.dtype != torch.bool:
        return attention_mask
    return torch.where(attention_mask, 0.0, torch.finfo(query.dtype).min).to(query.dtype)


@lru_cache(maxsize=4)  # all layers of a forward ask for the same one
def _causal(q_length: int, kv_length: int, device: torch.device) -> torch.Tensor:
    """bool ``[1, 1, q, kv]``, aligned to the upper left, as ``is_causal`` of SDPA is (None stands for it)."""
    return torch.ones(1, 1, q_length, kv_length, dtype=torch.bool, device=device).tril_()
