"""What `TreeCache.for_model` asks about a Hugging Face model.

The cache knows no model. `anabranch.hf` does, and puts its answer here when it is loaded, which happens as soon as
Transformers' modelling code is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from anabranch.kv.watch import Watch


class CacheShape(NamedTuple):
    """The part of a model that its cache has to fit."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    max_positions: int | None  # positions the model has embeddings for; None: no limit
    watch: Watch  # knows what the model can serve
    v_head_dim: int  # of V; head_dim is K's
    latent: Callable[[], tuple[int, int]]  # the same two of a cache of latents; ValueError where there are none
    rotary: Callable[[], list[Any]]  # rotary embeddings of each layer; ValueError where they are no pure rotation


_reader: Callable[[Any], CacheShape] | None = None


def set_reader(reader: Callable[[Any], CacheShape]) -> None:
    """Let `reader` answer for models from now on."""
    global _reader
    _reader = reader


def shape_for(model: Any) -> CacheShape:
    """The `CacheShape` of a Hugging Face decoder.

    Raises:
        TypeError: no Hugging Face model.
        ValueError: a model that no tree cache can serve.
    """
    if _reader is None:
        raise TypeError(
            f"model: expected a Hugging Face decoder, got {type(model).__name__}; Transformers is not loaded"
        )
    return _reader(model)
