"""How long compiling a forward took on this machine before: ``compile="auto"`` need not wait longer than that.

The notes lie beside what was compiled, and go with it when that folder is deleted.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from anabranch import __version__
from anabranch._cache_folder import cache_folder

# About what it takes to trace a forward of which the compiler's work is kept; once that is known, it counts.
KEPT_SECONDS = 25.0


def expected_seconds(model: Any, backend: str) -> float | None:
    """What compiling this model again will take, about; None where it never was."""
    try:
        told = json.loads(_note(model, backend).read_text(encoding="utf-8"))["again"]
        return KEPT_SECONDS if told is None else float(told)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def note_seconds(model: Any, backend: str, seconds: float) -> None:
    """It took so long. The first time tells nothing of the next, which finds the compiler's work."""
    note = _note(model, backend)
    again = seconds if note.exists() else None
    scratch = note.with_suffix(f".{os.getpid()}")
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps({"model": type(model).__name__, "again": again}), encoding="utf-8")
        scratch.replace(note)
    except OSError:  # a folder that cannot be written to: the next process waits as this one did
        pass


def _note(model: Any, backend: str) -> Path:
    facts = (
        torch.__version__, __version__, type(model).__qualname__, str(getattr(model, "config", None)),
        str(getattr(model, "dtype", None)), backend, torch.get_num_threads(),
    )  # fmt: skip
    name = hashlib.sha256(repr(facts).encode()).hexdigest()[:24]
    return cache_folder() / "compiled" / "times" / f"{name}.json"
