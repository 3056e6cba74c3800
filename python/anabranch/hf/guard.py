"""Other attention implementations refuse ``tree_step=`` and ``branch_mask=`` instead of swallowing them.

Transformers hands keywords it does not know on to whatever attention a model uses, and every implementation ignores
those it does not know. A model that was saved and loaded again (save_pretrained does not keep the implementation) would
compute ordinary causal attention over a packed row, and a loss. `guard_others` registers each implementation again,
under its own name, behind a check for our two keywords: `AttentionInterface.register` is Transformers' way to make a
library-wide change of this kind. Nothing else changes for a model that does not pass them.

``"eager"`` is not in that registry (each model's file has its own attention), but its mask function is in another one,
and a forward asks for its mask. `guard_eager` has that function look at the keywords of the forward that asks.
Where a model makes its mask by itself, `TreeCache.for_model`'s cache, the mask in `Layout.batch` and, where labels are
given, the loss notice: Transformers hands the keywords on to its loss functions, and `guard_losses` has them refuse a
branch mask that no layer came to.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

_OURS = ("tree_step", "branch_mask")


def guard_others(interface: Any, own: str) -> None:
    """Put the check before every implementation registered with ``AttentionInterface`` but `own`. Idempotent."""
    for name, function in interface().items():
        if name != own and not getattr(function, "_refuses_trees", False):
            interface.register(name, _guarded(name, function))


def _guarded(name: str, function: Callable) -> Callable:
    @functools.wraps(function)
    def attention(module: Any, *args: Any, **kwargs: Any) -> Any:
        for keyword in _OURS:
            if kwargs.get(keyword) is not None:
                raise ValueError(unheard(keyword, type(module).__name__, name))
        return function(module, *args, **kwargs)

    attention._refuses_trees = True  # type: ignore[attr-defined]
    return attention


def guard_eager(interface: Any) -> None:
    """Have the mask function of ``"eager"`` refuse forwards that were given our keywords. Idempotent."""
    function = interface()["eager"]
    if not getattr(function, "_refuses_trees", False):
        interface.register("eager", _guarded_mask(function))


def _guarded_mask(function: Callable) -> Callable:
    @functools.wraps(function)
    def mask(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            module, given = _asking_forward()
            for keyword in _OURS:
                if given.get(keyword) is not None:
                    raise ValueError(unheard(keyword, type(module).__name__, "eager"))
        return function(*args, **kwargs)

    mask._refuses_trees = True  # type: ignore[attr-defined]
    return mask


def _asking_forward() -> tuple[Any, dict[str, Any]]:
    """The module whose forward asks for a mask, and the keywords that it was given beyond those it knows.

    A mask function is not told of them, so they are read off the caller's frame: once a forward, a few frames up.
    """
    frame = sys._getframe(2)
    for _ in range(8):
        module, given = frame.f_locals.get("self"), frame.f_locals.get("kwargs")
        if isinstance(module, torch.nn.Module) and isinstance(given, dict):
            return module, given
        if frame.f_back is None:
            break
        frame = frame.f_back
    return None, {}


def guard_losses(losses: dict[str, Any]) -> None:
    """Have Transformers' loss functions refuse a ``branch_mask`` that no attention layer has seen. Idempotent."""
    for name, function in losses.items():
        if not getattr(function, "_refuses_trees", False):
            losses[name] = _guarded_loss(function)


def _guarded_loss(function: Callable) -> Callable:
    @functools.wraps(function)
    def loss(*args: Any, **kwargs: Any) -> Any:
        mask = kwargs.get("branch_mask")
        if mask is not None and not torch.compiler.is_compiling():
            if not mask.attended:
                raise ValueError(unheard("branch_mask", "the model", "eager"))
            mask.attended = False
        return function(*args, **kwargs)

    loss._refuses_trees = True  # type: ignore[attr-defined]
    return loss


def unheard(keyword: str, where: str, implementation: str) -> str:
    """What to say of a keyword that a model on another implementation would swallow."""
    return (
        f"{keyword}: {where} uses attn_implementation={implementation!r}, which knows no {keyword} and would attend "
        "causally over the packed row; call anabranch.hf.enable(model), or load the model with "
        'attn_implementation="anabranch" (save_pretrained does not keep it)'
    )
