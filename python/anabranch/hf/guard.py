"""Other attention implementations refuse ``tree_step=`` and ``branch_mask=`` instead of swallowing them.

Transformers hands keywords it does not know on to whatever attention a model uses, and every implementation ignores
those it does not know. A model that was saved and loaded again (save_pretrained does not keep the implementation) would
compute ordinary causal attention over a packed row, and a loss. `guard_others` registers each implementation again,
under its own name, behind a check for our two keywords: `AttentionInterface.register` is Transformers' way to make a
library-wide change of this kind. Nothing else changes for a model that does not pass them.

``"eager"`` is not in the registry (each model's file has its own): there `TreeCache.for_model`'s cache and the mask in
`Layout.batch` notice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

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


def unheard(keyword: str, where: str, implementation: str) -> str:
    """What to say of a keyword that a model on another implementation would swallow."""
    return (
        f"{keyword}: {where} uses attn_implementation={implementation!r}, which knows no {keyword} and would attend "
        "causally over the packed row; call anabranch.hf.enable(model), or load the model with "
        'attn_implementation="anabranch" (save_pretrained does not keep it)'
    )
