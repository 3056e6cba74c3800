"""Former module names: importable in every way, told apart by a warning, and nothing is loaded for them."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import anabranch as ab
from anabranch._moved import MOVED


@pytest.mark.parametrize("old", sorted(MOVED))
def test_a_former_name_is_the_new_module(old: str) -> None:
    new = importlib.import_module(f"anabranch.{MOVED[old]}")
    former = importlib.import_module(f"anabranch.{old}")
    name = next(name for name in vars(new) if not name.startswith("_"))
    with pytest.warns(DeprecationWarning, match=rf"anabranch\.{old} is now anabranch\.{MOVED[old]}"):
        assert getattr(former, name) is getattr(new, name)
    assert getattr(ab, old) is former


def test_from_imports_and_missing_names() -> None:
    with pytest.warns(DeprecationWarning):
        from anabranch.trace import Trace
    assert Trace is ab.records.Trace
    with pytest.warns(DeprecationWarning), pytest.raises(ImportError, match="nothing_of_the_kind"):
        from anabranch.trace import nothing_of_the_kind  # noqa: F401


def test_nothing_is_loaded_and_nothing_warns_unasked() -> None:
    code = (
        "import warnings; warnings.simplefilter('error'); import anabranch, inspect, sys;"
        "inspect.getmodule(inspect.getmodule); [hasattr(m, '__file__') for m in list(sys.modules.values())];"
        "assert 'torch' not in sys.modules and 'anabranch.kv' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
