"""anabranch: fork, think in parallel, join.

Tree attention kernels, a copy-on-write paged KV cache, and a fork/join runtime for Hugging Face models.
``import anabranch as ab``; names are loaded when first used.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from anabranch import _moved
from anabranch._hooks import register_when_imported

__version__: str

if not (Path(__file__).parent / "kernels").is_dir():
    # A checkout on PYTHONPATH: anabranch.kernels is the folder kernels/ at its root.
    __path__.append(str(Path(__file__).resolve().parents[2]))

_HOME = {
    "TreeCache": "kv",
    "KVFormat": "kv",
    "Branch": "kv",
    "Step": "kv",
    "Read": "kv",
    "Rotary": "ops",
    "Usage": "kv",
    "Plan": "plan",
    "tree_attention": "attention",
    "paged_tree_attention": "attention",
    "BranchMask": "attention",
    "branch_attention": "attention",
    "DecodeGraph": "runner",
    "OutOfPages": "errors",
    "DeadBranch": "errors",
    "BackendUnavailable": "errors",
    "RankLost": "errors",
    "RemoteError": "errors",
    "RemoteEngine": "remote",
    "SegmentVectors": "hf",
    "QueueFull": "errors",
    "DeadlineExceeded": "errors",
    "AsyncEngine": "engine",
    "Engine": "engine",
    "Handle": "engine",
    "Result": "records",
    "replay": "engine",
    "Strategy": "strategies",
    "APR": "strategies",
    "Aspects": "strategies",
    "AsyncThink": "strategies",
    "BeamSearch": "strategies",
    "STEP": "strategies",
    "BestOfN": "strategies",
    "DeepConf": "strategies",
    "ParallelProbe": "strategies",
    "PruneRefork": "strategies",
    "ScorerFailed": "strategies",
    "SlimSC": "strategies",
    "StepBeamSearch": "strategies",
    "TreeOfThoughts": "strategies",
    "DraftTree": "strategies",
    "EntropyFork": "strategies",
    "LeaP": "strategies",
    "PaCoRe": "strategies",
    "RunningSummary": "strategies",
    "SelectPassages": "strategies",
    "ParaThinker": "strategies",
    "ParallelR1": "strategies",
    "MedVerse": "strategies",
    "Multiverse": "strategies",
    "NPR": "strategies",
    "PASTA": "strategies",
    "GroupThink": "strategies",
    "Hogwild": "strategies",
    "HogwildPrompts": "strategies",
    "SelfConsistency": "strategies",
    "SPRINT": "strategies",
    "SSFT": "strategies",
    "Sequential": "strategies",
    "SkeletonOfThought": "strategies",
    "ThreadWeaver": "strategies",
}
_MODULES = (
    "attention",
    "backends",
    "cli",
    "engine",
    "errors",
    "evaluation",
    "hf",
    "kv",
    "models",
    "ops",
    "plan",
    "records",
    "remote",
    "runner",
    "strategies",
    "training",
    "viz",
)

__all__ = ["__version__", *_HOME]

_moved.install()
register_when_imported()


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("anabranch")
    except PackageNotFoundError:  # a checkout on PYTHONPATH
        return "0+checkout"


def __getattr__(name: str) -> Any:
    if name == "__version__":
        globals()[name] = value = _version()
        return value
    if name in _HOME:
        value = getattr(importlib.import_module(f"anabranch.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    if name in _MODULES or name in _moved.MOVED:
        return importlib.import_module(f"anabranch.{name}")
    raise AttributeError(f"module 'anabranch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])
