"""One forward of a model over a tree, run as it is."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from anabranch.hf.latent import latent_keywords, latents_of
from anabranch.hf.mask import tree_mask
from anabranch.kv.step import Step


def forward(model: Any, ids: Tensor, step: Step, backend: str = "auto", keep: Tensor | None = None) -> Tensor:
    """One packed forward over a tree: scores [rows, vocabulary], or those of the rows `keep` (int64) alone.

    ids: int64 [rows] on the cache's device, in the step's order.
    """
    options: dict[str, Any] = {} if backend == "auto" else {"tree_backend": backend}
    if keep is not None:
        options["logits_to_keep"] = keep
    if step.cache.v_in_k:
        options |= latent_keywords(model, latents_of(step))
    return model(
        input_ids=ids[None],
        position_ids=step.position_ids[None],
        tree_step=step,
        use_cache=False,
        attention_mask=tree_mask(step),
        **options,
    ).logits[0]
