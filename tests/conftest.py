"""Shared by all tests. Triton is told to interpret before anything imports it; empty memory is poisoned with NaN."""

from __future__ import annotations

import os
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite(*(path.stem for path in (Path(__file__).parent / "kits").glob("*.py")))

settings.register_profile(
    "anabranch",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    print_blob=True,
)
settings.load_profile("anabranch")


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.empty`` and its kin return NaN: reading what nobody wrote shows."""
    if request.node.get_closest_marker("compiled"):
        return  # torch.compile traces these functions itself and takes no stand-in for them

    def poison(function):  # type: ignore[no-untyped-def]
        def filled(*args, **kwargs):  # type: ignore[no-untyped-def]
            x = function(*args, **kwargs)
            return (
                x.fill_(float("nan")) if isinstance(x, torch.Tensor) and x.is_floating_point() and not x.is_meta else x
            )

        return filled

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)
