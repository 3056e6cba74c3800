"""Registers ``attn_implementation="anabranch"`` at the moment Transformers' modelling code is loaded.

So `import anabranch` neither loads Transformers (seconds) nor depends on which of the two was imported first. Nothing
of Transformers is changed: its registries are there for this. This file imports no torch: `import anabranch` is fast.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any

_MODELLING = "transformers.modeling_utils"


def register_when_imported() -> None:
    """Register now if Transformers' modelling code is loaded, else as soon as it is. Called by ``import anabranch``."""
    if _MODELLING in sys.modules:
        _register()
    elif not any(isinstance(finder, _RegisterOnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterOnImport())


def _register() -> None:
    from anabranch.hf import register

    register()


class _RegisterOnImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import hook for one module: lets the ordinary finder load it, registers, and is gone."""

    def __init__(self) -> None:
        self._loader: importlib.abc.Loader | None = None

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> Any:
        if fullname != _MODELLING:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: Any) -> ModuleType | None:
        assert self._loader is not None
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert self._loader is not None and module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader  # inspect.getsource and reload see the real loader
        self._loader.exec_module(module)
        _register()
