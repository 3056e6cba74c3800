"""A Hugging Face decoder as `anabranch.kv` asks for it: the shape of its cache, and a watch over what it can serve."""

from __future__ import annotations

from typing import Any

from anabranch.hf.latent import latent_dims
from anabranch.hf.probe import describe, text_config
from anabranch.hf.rotary import rotary_of
from anabranch.hf.watch import ModelWatch
from anabranch.kv.model import CacheShape


def cache_shape(model: Any) -> CacheShape:
    """What a `TreeCache` for this model has to fit; raises as `describe` does."""
    shape = describe(model)
    return CacheShape(
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        dtype=shape.dtype,
        device=shape.device,
        max_positions=shape.position_limit,
        watch=ModelWatch(type(model).__name__, text_config(model), shape),
        v_head_dim=shape.v_head_dim,
        latent=lambda: latent_dims(model),
        rotary=lambda: rotary_of(model),
    )
