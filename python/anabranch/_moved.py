"""Former module names, kept for one release: ``import anabranch.records.trace`` still works and warns once."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from types import ModuleType
from typing import Any

MOVED = {
    "branch": "attention.branch",
    "branch_mask": "attention.mask",
    "cache": "kv",
    "graph": "runner.graph",
    "hooks": "_hooks",
    "machine": "backends.cost_model",
    "mask_picture": "attention.mask_plot",
    "metrics": "records.metrics",
    "naive": "kv.naive",
    "trace": "records.trace",
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads a former name as the module that it became."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> Any:
        package, _, name = fullname.partition(".")
        return importlib.machinery.ModuleSpec(fullname, self) if package == "anabranch" and name in MOVED else None

    def create_module(self, spec: Any) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        new = f"anabranch.{MOVED[old.partition('.')[2]]}"
        warnings.warn(f"{old} is now {new}; the old name goes with the next release", DeprecationWarning, stacklevel=2)
        sys.modules[old] = importlib.import_module(new)  # the import system returns what it finds here


def install() -> None:
    """Make the former names importable. Idempotent."""
    if not any(type(finder).__name__ == "_Finder" and finder.__module__ == __name__ for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
