"""Former module names, kept for one release: ``import anabranch.trace`` still works, and warns when it is used."""

from __future__ import annotations

import importlib
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


class _Moved(ModuleType):
    """Stands where a module was; looks everything up in the module that it became."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked of every module by inspect, pickle and the like; nothing is loaded for that
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        new = f"anabranch.{MOVED[self.__name__.partition('.')[2]]}"
        warnings.warn(
            f"{self.__name__} is now {new}; the old name goes with the next release", DeprecationWarning, stacklevel=2
        )
        return getattr(importlib.import_module(new), name)


def install() -> None:
    """Make the former names importable. Idempotent; loads nothing."""
    for name in MOVED:
        full = f"anabranch.{name}"
        sys.modules.setdefault(full, _Moved(full, f"Now anabranch.{MOVED[name]}."))
