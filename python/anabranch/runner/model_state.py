"""What a compiled forward of a model relies on: noticed when it changes between two forwards.

Weights and buffers are inputs of the compiled graphs, so what changes *in* them is always seen. Which modules and
parameters there are, whose forward is covered, which adapters are on: that a graph was made of, and torch.compile's own
guards leave some of it out (by default they look at no hook). Looked at in every step, and so without a glance at the
values that `weights.fingerprint` takes.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from operator import is_
from typing import Any

import torch

from anabranch import _core
from anabranch.runner.weights import adapters


def forward_hooks(model: Any) -> list[Any]:
    """The dictionaries that hold forward hooks, of each module and of all; as long as they are empty there are none."""
    from torch.nn.modules import module as nn

    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    shared = [nn._global_forward_hooks, nn._global_forward_pre_hooks]
    return shared + [d for m in modules for d in (m._forward_hooks, m._forward_pre_hooks)]


class ModelState:
    """A model as it was when this was made.

    >>> state = ModelState(model)
    >>> state.covered() or not state.same(model)     # what was made of the model then does not stand for it now
    """

    def __init__(self, model: torch.nn.Module) -> None:
        modules = list(model.modules())
        self._model = model
        self._attributes = [vars(m) for m in modules]
        self._tables: list[dict[str, Any]] = [d for m in modules for d in (m._modules, m._parameters)]
        self._hooks = forward_hooks(model)
        self._forwards = self._own_forwards()
        self._adapted = [m for m in modules if adapters(m)]
        self._adapters = [adapters(m) for m in self._adapted]
        # Held, not their ids: an id is used again once its object is gone.
        self._parts = list(self._now())

    def covered(self) -> bool:
        """Whether a hook is there, or a module's forward has been replaced since: code that no graph calls."""
        return any(self._hooks) or self._own_forwards() != self._forwards

    def same(self, model: Any) -> bool:
        """Whether the model consists of the same modules and parameters, with the same adapters switched on."""
        if model is not self._model:
            return False
        now = list(self._now())
        if len(now) != len(self._parts) or not all(map(is_, now, self._parts)):
            return False
        return not self._adapted or [adapters(m) for m in self._adapted] == self._adapters

    def _now(self) -> Iterable[Any]:
        return chain.from_iterable(map(dict.values, self._tables))

    def _own_forwards(self) -> list[Any]:
        return [own["forward"] for own in self._attributes if "forward" in own]


class Untouched:
    """Everything that a model's forward may look at, down to the attributes of modules and configurations, and where
    weights and buffers lie. It finds more changes than matter, so a change means to look closer; but in a fraction of
    the time that `ModelState` and torch.compile's guards take to see that there is none.

    What lies inside attributes (an entry of a list, say) is not looked at.

    >>> untouched = Untouched(model)
    >>> untouched(model)
    True
    """

    def __init__(self, model: torch.nn.Module) -> None:
        modules = list(model.modules())
        kinds = list({type(m): None for m in modules})
        configs = {id(c): c for m in modules if hasattr(c := getattr(m, "config", None), "__dict__")}
        tables = [vars(x) for x in (*modules, *configs.values())]
        tables += [d for m in modules for d in (m._modules, m._parameters, m._buffers)]
        self._model, self._kinds = model, kinds
        self._held = _core.HeldValues(tables + [d for d in forward_hooks(model) if isinstance(d, dict)])
        self._forwards = [kind.forward for kind in kinds]
        self._tensors = [*model.parameters(), *model.buffers()]
        self._places = self._now()

    def __call__(self, model: Any) -> bool:
        """Whether the model is the same in all of that."""
        return (
            model is self._model
            and self._held.same()
            and [kind.forward for kind in self._kinds] == self._forwards
            and self._now() == self._places
        )

    def _now(self) -> list[int]:
        return list(map(torch.Tensor.data_ptr, self._tensors))
