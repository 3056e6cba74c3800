"""`attn_implementation="anabranch"` for any Hugging Face decoder, through Transformers' own registries.

Nothing is patched. `register()` puts one attention function and one mask function under the name ``"anabranch"`` and
lets the other implementations refuse what only this one knows (guard.py);
_hooks.py calls it at the moment Transformers' modelling code is loaded, so that `import anabranch`
neither imports it (seconds) nor depends on which of the two was imported first.

The attention function works in three ways:

* **Over a tree**: ``model(input_ids=ids[None], position_ids=step.position_ids[None], tree_step=step,
  use_cache=False)``. Transformers hands every extra keyword on to the attention function. Each layer writes its keys
  and values to ``step.cache`` and every row attends to its own branch's context there. ``tree_backend=`` picks one.
* **For training with branches**: ``model(input_ids=ids[None], position_ids=mask.positions[None], branch_mask=mask,
  use_cache=False)``, forward and backward; see branch.py.
* **As usual**, without either: a plain ``model(…)`` or ``model.generate(…)``, with padding, static caches and
  so on, computed by Transformers' own code (SDPA, or the model's eager formula where SDPA cannot do it: softcap, sinks,
  attention weights asked for).
"""

from __future__ import annotations

from typing import Any

from anabranch.hf.attention import attention
from anabranch.hf.guard import guard_eager, guard_losses, guard_others
from anabranch.hf.mask import mask
from anabranch.hf.probe import (
    ModelShape,
    describe,
    refuse_by_config,
    uses_anabranch,
)

NAME = "anabranch"


# ------------------------------------------------------------------------------------------------ registration


def register() -> None:
    """Register ``"anabranch"`` as attention implementation and mask function. Idempotent; imports Transformers.

    `import anabranch` calls it as soon as Transformers is loaded (_hooks.py).
    """
    from transformers.loss.loss_utils import LOSS_MAPPING
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NAME, attention)
    # Without a mask function of the same name Transformers passes no mask at all, and padding would be lost silently.
    AttentionMaskInterface.register(NAME, mask)
    guard_losses(LOSS_MAPPING)
    guard_eager(AttentionMaskInterface)
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
