"""`attn_implementation="anabranch"` for any Hugging Face decoder, through Transformers' own registries.

Nothing is patched. `register()` puts one attention function and one mask function under the name ``"anabranch"`` and
lets the other implementations refuse what only this one knows (hf_guard.py);
hooks.py calls it at the moment Transformers' modelling code is loaded, so that `import anabranch`
neither imports it (seconds) nor depends on which of the two was imported first.

The attention function works in three ways:

* **Over a tree**: ``model(input_ids=ids[None], position_ids=step.position_ids[None], tree_step=step,
  use_cache=False)``. Transformers hands every extra keyword on to the attention function. Each layer writes its keys
  and values to ``step.cache`` and every row attends to its own branch's context there. ``tree_backend=`` picks one.
* **For training with branches**: ``model(input_ids=ids[None], position_ids=mask.positions[None], branch_mask=mask,
  use_cache=False)``, forward and backward; see hf_branch.py.
* **As usual**, without either: a plain ``model(…)`` or ``model.generate(…)``, with padding, static caches and
  so on, computed by Transformers' own code (SDPA, or the model's eager formula where SDPA cannot do it: softcap, sinks,
  attention weights asked for).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import torch

from anabranch.hf_branch import over_branches
from anabranch.hf_call import is_causal, refuse_unheard, remember_window, window_of
from anabranch.hf_guard import guard_others
from anabranch.hf_mask import DeferredMask, beside_branch_mask, made_here, mask, tree_mask
from anabranch.hf_rope import rope_rules
from anabranch.hf_shape import (
    ModelShape,
    Probe,
    UnsupportedModel,
    describe,
    is_compiled,
    refuse_by_config,
    uses_anabranch,
)
from anabranch.hf_tree import NO_GRADIENT, attend, traced

if TYPE_CHECKING:
    from anabranch.cache import Step

__all__ = [
    "ModelShape",
    "UnsupportedModel",
    "beside_branch_mask",
    "describe",
    "enable",
    "is_compiled",
    "register",
    "tree_mask",
    "uses_anabranch",
]

NAME = "anabranch"


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
    guard_others(AttentionInterface, NAME)


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

    Returns ``(out [B, T, Hq, D], weights or None)``. With ``tree_step`` among the keywords it attends over the tree,
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
        return _ordinary(module, query, key, value, attention_mask, *args, **kwargs)
    if isinstance(step, Probe):
        if attention_mask is not None and not isinstance(attention_mask, DeferredMask):
            raise UnsupportedModel(
                f"{type(module).__name__} gives attention a mask of its own making "
                f"(shape {tuple(attention_mask.shape)}), which cannot be honoured over a tree"
            )
        window = remember_window(module, attention_mask, kwargs)
        return step.record(module, query, key, value, window, kwargs), None
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
    if torch.compiler.is_compiling():
        return traced(layer, query, key, value, step, kwargs.get("position_ids"), **options)
    out = attend(step, layer, query, key, value, kwargs.get("position_ids"), **options)
    return _NotDifferentiable.apply(out, query) if query.requires_grad and torch.is_grad_enabled() else out


def _check_tree_call(
    module: torch.nn.Module, attention_mask: torch.Tensor | None, step: Step, kwargs: dict[str, Any]
) -> Any:
    """Raise unless the module and its options are such that attention over a tree can honour them; returns the layer's
    index. What depends on the step's numbers is checked where it is used (hf_tree.py): here it would be traced."""
    from anabranch.cache import Step

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
    bias = _additive(attention_mask, query, key, is_causal(module, kwargs))
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
