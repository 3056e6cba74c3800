"""tests/gpu needs a CUDA device and Triton without its interpreter; elsewhere every test is skipped, and says why."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kits"))


def why_skipped() -> str | None:
    if not torch.cuda.is_available():
        return "needs a CUDA device (run `python tests/gpu/run.py` on a machine with one)"
    try:
        from anabranch.kernels import launch
    except ImportError as error:
        return f"needs Triton: {error}"
    return "TRITON_INTERPRET is set: unset it to test the GPU" if launch.INTERPRETED else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    reason = why_skipped()
    for item in items:
        if here in item.path.parents:
            item.add_marker("gpu")
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))
