"""The hidden states that a model's language head reads, noted while a forward runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from anabranch.hf.probe import is_compiled

__all__ = ["check_head", "head_inputs"]


def check_head(model: Any) -> None:
    """ValueError for a model whose language head cannot be listened to."""
    if is_compiled(model):
        raise ValueError("hidden: the model is compiled by torch.compile, which skips hooks; pass the model itself")
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"hidden: {type(model).__name__} names no language head (get_output_embeddings() is None), so there is no "
            "telling what it reads; pass a model for causal language modelling"
        )


@contextmanager
def head_inputs(model: Any) -> Iterator[list[Tensor]]:
    """What the head is given inside the block, one tensor [rows, width] a forward: the rows whose logits are kept."""
    found: list[Tensor] = []

    def note(_: Any, inputs: tuple[Any, ...]) -> None:
        found.append(inputs[0].reshape(-1, inputs[0].shape[-1]))

    handle = model.get_output_embeddings().register_forward_pre_hook(note)
    try:
        yield found
    finally:
        handle.remove()
