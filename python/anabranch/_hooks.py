"""What ``import anabranch`` sets up for later: the torch ops and the attention name, when their hosts are loaded.

So ``import anabranch`` loads neither torch nor Transformers (seconds), and it does not matter which is imported first.
Nothing of theirs is changed: both have registries for this.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any

_REGISTERS = {  # module → (ours, the function to call or None: importing it is enough)
    "torch": ("anabranch.ops", None),  # and with it anabranch.ops
    "transformers.modeling_utils": ("anabranch.hf", "register"),
}


def register_when_imported() -> None:
    """Register what can be registered now, the rest as soon as its host is loaded. `import anabranch` calls this."""
    for name in _REGISTERS:
        if name in sys.modules:
            _register(name)
        elif not any(isinstance(finder, _AfterImport) and finder.name == name for finder in sys.meta_path):
            sys.meta_path.insert(0, _AfterImport(name))


def _register(name: str) -> None:
    module, function = _REGISTERS[name]
    ours = importlib.import_module(module)
    if function is not None:
        getattr(ours, function)()


class _AfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import hook for one module: lets the ordinary finder load it, registers, and is gone."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._loader: importlib.abc.Loader | None = None

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> Any:
        if fullname != self.name:
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
        _register(self.name)
