"""A model in evaluation mode for a while, with each part's own mode given back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """``model.eval()`` inside the block; behind it, however it was left, those modules train again that did before."""
    training = [module for module in model.modules() if module.training]
    if not training:
        yield
        return
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True
