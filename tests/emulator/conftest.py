"""The emulator, compiled once a session; every test of this folder starts with its default settings."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "kits")]

import emulated  # noqa: E402


@pytest.fixture(scope="session")
def compiled() -> ModuleType:
    reason = emulated.why_not()
    if reason is not None:
        pytest.skip(f"the emulator cannot be built: {reason}")
    return emulated.load(*os.environ.get("ANABRANCH_EMULATOR_DEFINES", "").split())


@pytest.fixture
def device(compiled: ModuleType) -> ModuleType:
    compiled.configure()
    compiled.forget_memory()
    compiled.reset_statistics()
    return compiled
