"""Training with branches: what ``branch_mask=`` does in an attention layer of a Hugging Face model.

``model(input_ids=ids[None], position_ids=mask.positions[None], branch_mask=mask, use_cache=False)``: one packed row in
which every token attends as the `BranchMask` says, forward and backward; softcap, window and sinks are the module's
own. ``branch_backend=`` picks a backend of ``branch_attention``.
"""

from __future__ import annotations

from typing import Any

import torch

from anabranch.attention.mask import BranchMask
from anabranch.hf.checks import is_causal, refuse_unheard, window_of
from anabranch.hf.mask import DeferredMask
from anabranch.hf.probe import UnsupportedModel
from anabranch.hf.rope import check_branch_mask, rope_rules


def over_branches(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    mask: BranchMask,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """``query [1, Hq, T, D]``, ``key [1, Hkv, T, D]``, ``value [1, Hkv, T, E]`` → ``[1, T, Hq, E]``; T is
    ``mask.num_tokens``."""
    from anabranch.attention.branch import branch_attention

    _check(module, query, key, attention_mask, mask, kwargs)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    sinks = kwargs.get("s_aux")
    if not torch.compiler.is_compiling():
        mask.attended = True
    out = branch_attention(
        q,
        k,
        v,
        mask,
        scale=kwargs.get("scaling"),
        softcap=kwargs.get("softcap"),
        window=window_of(module, attention_mask, kwargs),
        sinks=None if sinks is None else sinks.reshape(-1),
        backend=kwargs.get("branch_backend") or "auto",
    )
    return out.unsqueeze(0)


def _check(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    mask: BranchMask,
    kwargs: dict[str, Any],
) -> None:
    """Raise unless this layer call is one that a branch mask can describe."""
    if not isinstance(mask, BranchMask):
        raise TypeError(f"branch_mask: expected a BranchMask, got {type(mask).__name__}")
    where, rows = type(module).__name__, mask.num_tokens
    if query.shape[0] != 1:
        raise ValueError(
            f"input_ids: with branch_mask the batch must be 1, got {query.shape[0]}; pack several sequences in one row "
            "with BranchMask.pack"
        )
    if query.shape[2] != rows:
        raise ValueError(
            f"branch_mask: made for {rows} tokens in {mask.num_segments} segments (the last, segment "
            f"{mask.num_segments - 1}, ends at {rows}), but the model was given {query.shape[2]}; "
            "pass the mask of this batch"
        )
    if key.shape[2] != rows or kwargs.get("use_cache") or kwargs.get("past_key_values") is not None:
        raise ValueError(
            "use_cache: must be False with branch_mask, and no past_key_values may be given: the row is complete"
        )
    if not is_causal(module, kwargs) or getattr(module, "is_cross_attention", False):
        raise UnsupportedModel(f"branch_mask: {where} is not causal self-attention; only decoder layers can use it")
    given = None if isinstance(attention_mask, DeferredMask) else attention_mask
    if given is not None and not torch.compiler.is_compiling():
        raise ValueError(
            f"attention_mask: must not be given with branch_mask (got shape {tuple(given.shape)}): the mask says it "
            "all, and a packed row has no padding; leave the argument out"
        )
    if dropout := kwargs.get("dropout") or 0.0:
        raise ValueError(
            f"dropout: {where} asks for {dropout} on the attention weights, which are never formed; "
            "set config.attention_dropout = 0"
        )
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions: branch attention forms no weights; pass output_attentions=False")
    refuse_unheard(module, kwargs, "under a branch mask")
    if mask.device != query.device:
        raise ValueError(
            f"branch_mask: is on {mask.device}, the model's input on {query.device}; pass "
            f"branch_mask=mask.to({str(query.device)!r})"
        )
    rules = rope_rules(getattr(module, "config", None))
    if rules and getattr(module, "layer_idx", 0) == 0:
        check_branch_mask(mask, rules)
    if not torch.compiler.is_compiling():
        _check_positions(module, mask, kwargs.get("position_ids"))


def _check_positions(module: torch.nn.Module, mask: BranchMask, given: Any) -> None:
    """Most decoders hand position_ids on to attention; without them, sibling branches would stand one behind another
    and no error would say so."""
    if getattr(module, "layer_idx", 0) != 0 or not isinstance(given, torch.Tensor) or given.ndim != 2:
        return
    if given.data_ptr() == mask.positions.data_ptr() and given.numel() == mask.num_tokens:
        return
    wrong = (given[0].to(mask.device) != mask.positions).nonzero()
    if wrong.numel():
        i = int(wrong[0])
        raise ValueError(
            f"position_ids: token {i} (segment {int(mask.segment_ids[i])}) is at {int(given[0, i])}, in branch_mask at "
            f"{int(mask.positions[i])}; pass position_ids=mask.positions[None], or make the mask with positions=…"
        )
