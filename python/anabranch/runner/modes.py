"""A model in evaluation mode for a while, with each part's own mode given back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ref


@contextmanager
def evaluating(model: Any, modules: Any = None) -> Iterator[None]:
    """``model.eval()`` inside the block; behind it, however it was left, those modules train again that did before.

    modules: the model's, where the caller has them at hand.
    """
    training = [module for module in (model.modules() if modules is None else modules) if module.training]
    if not training:
        yield
        return
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


class Evaluation:
    """`evaluating` again and again, without a walk through the model each time."""

    def __init__(self) -> None:
        self._model: ref[Any] | None = None
        self._modules: list[ref[Any]] = []

    def look_again(self) -> None:
        """The model may have other modules now."""
        self._model = None

    @contextmanager
    def of(self, model: Any) -> Iterator[None]:
        if self._model is None or self._model() is not model:
            self._model, self._modules = ref(model), [ref(module) for module in model.modules()]
        with evaluating(model, (module for there in self._modules if (module := there()) is not None)):
            yield
