"""The attention function registered as ``"anabranch"``: over a tree, under a branch mask, or as usual."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from anabranch.hf.branch import over_branches
from anabranch.hf.checks import is_causal, refuse_unheard, remember_window, window_of
from anabranch.hf.latent import attend_latents
from anabranch.hf.mask import DeferredMask, made_here
from anabranch.hf.probe import (
    Probe,
    UnsupportedModel,
)
from anabranch.hf.rope import rope_rules
from anabranch.hf.tree import NO_GRADIENT, attend, check_step, traced

if TYPE_CHECKING:
    from anabranch.kv.step import Step
from anabranch.hf.ordinary import ordinary_attention

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
    """The registered attention function. ``query [B, Hq, T, D]``, ``key [B, Hkv, T', D]`` (RoPE applied), ``value``
    likewise with E for D.

    Returns ``(out [B, T, Hq, E], weights or None)``. With ``tree_step`` among the keywords it attends over the tree,
    with ``branch_mask`` as that mask says.
    """
    step, branches = kwargs.pop("tree_step", None), kwargs.pop("branch_mask", None)
    if branches is not None:
        if step is not None:
            raise ValueError("branch_mask: given beside tree_step; a step's tree is its mask, so pass one of the two")
        return over_branches(module, query, key, value, attention_mask, branches, kwargs), None
    if kwargs.pop("branch_backend", None) is not None:
        raise ValueError("branch_backend: given without branch_mask; pass branch_mask=mask too, or leave it out")
    if step is None:
        if kwargs.pop("tree_backend", None) is not None:
            raise ValueError("tree_backend: given without tree_step; pass tree_step=step too, or leave it out")
        return ordinary_attention(module, query, key, value, attention_mask, *args, **kwargs)
    if isinstance(step, Probe):
        if attention_mask is not None and not isinstance(attention_mask, DeferredMask):
            raise UnsupportedModel(
                f"{type(module).__name__} gives attention a mask of its own making "
                f"(shape {tuple(attention_mask.shape)}), which cannot be honoured over a tree"
            )
        window = remember_window(module, attention_mask, kwargs)
        return step.record(module, query, key, value, window, kwargs), None
    return over_tree(module, query, key, value, attention_mask, step, kwargs), None


def over_tree(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    step: Step,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """``query [1, Hq, T, D]``, ``key [1, Hkv, T, D]``, ``value [1, Hkv, T, E]`` → ``[1, T, Hq, E]``; T is
    ``step.num_rows``."""
    layer = _check_tree_call(module, attention_mask, step, kwargs)
    window = window_of(module, attention_mask, kwargs)  # before anything is written
    sinks = kwargs.get("s_aux")
    options: dict[str, Any] = dict(
        where=type(module).__name__,
        cached=bool(kwargs.get("use_cache") or kwargs.get("past_key_values") is not None),
        backend=kwargs.get("tree_backend") or "auto",
        scale=kwargs.get("scaling"),
        softcap=kwargs.get("softcap"),
        window=window,
        sinks=None if sinks is None else sinks.detach().reshape(-1),
        rope=next((rule.rope_type for rule in rope_rules(getattr(module, "config", None))), ""),
    )
    if step.cache.v_in_k:
        out = _over_latents(module, query, key, step, options, kwargs.get("position_ids"))
        return _NotDifferentiable.apply(out, query) if query.requires_grad and torch.is_grad_enabled() else out
    if torch.compiler.is_compiling():
        return traced(layer, query, key, value, step, kwargs.get("position_ids"), **options)
    out = attend(step, layer, query, key, value, kwargs.get("position_ids"), **options)
    return _NotDifferentiable.apply(out, query) if query.requires_grad and torch.is_grad_enabled() else out


def _over_latents(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, step: Step, options: dict[str, Any], positions: Any
) -> torch.Tensor:
    if torch.compiler.is_compiling():
        raise UnsupportedModel(
            "tree_step: forwards over a cache of latents are not compiled; pass the model itself, or a cache made "
            "without latent=True"
        )
    check_step(
        step, module.layer_idx, query, key, positions, **{x: options.pop(x) for x in ("where", "cached", "rope")}
    )
    return attend_latents(module, step, query, **options)


def _check_tree_call(
    module: torch.nn.Module, attention_mask: torch.Tensor | None, step: Step, kwargs: dict[str, Any]
) -> Any:
    """Raise unless the module and its options are such that attention over a tree can honour them; returns the layer's
    index. What depends on the step's numbers is checked where it is used (hf/tree.py): here it would be traced."""
    from anabranch.kv.step import Step

    if not isinstance(step, Step):
        raise TypeError(f"tree_step: expected the Step that TreeCache.step() returned, got {type(step).__name__}")
    where, layer = type(module).__name__, getattr(module, "layer_idx", None)
    if not is_causal(module, kwargs) or getattr(module, "is_cross_attention", False):
        raise UnsupportedModel(
            f"tree_step: {where} (layer {layer}) is not causal self-attention; "
            "only decoder layers can attend over a tree"
        )
    if attention_mask is not None and not isinstance(attention_mask, DeferredMask) and not made_here(attention_mask):
        raise ValueError(
            f"attention_mask: must not be given with tree_step (got shape {tuple(attention_mask.shape)}): "
            "what a row sees is its branch's context; leave the argument out"
        )
    dropout = kwargs.get("dropout") or 0.0
    if module.training or dropout > 0:
        raise ValueError(
            f"tree_step: {where} is in training mode (dropout={dropout}); call model.eval() first. "
            "Training takes a branch_mask instead (BranchMask, branch_attention)"
        )
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions: there are no attention weights over a tree; pass output_attentions=False")
    refuse_unheard(module, kwargs, "over a tree")
    return layer


class _NotDifferentiable(torch.autograd.Function):
    """Lets a forward run with gradients enabled (people forget no_grad) and fails loudly when they are asked for."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise RuntimeError(NO_GRADIENT)
