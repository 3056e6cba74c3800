"""Shared by the tests of training with branches."""

from __future__ import annotations

import pytest

from anabranch import backends


@pytest.fixture(autouse=True)
def working_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default backend falls back to the reference where the CPU backend has no branch attention."""
    choose = backends.choose

    def chosen(name, *args):  # type: ignore[no-untyped-def]
        found = choose(name, *args)
        return found if name != "auto" or hasattr(found, "branch_forward") else choose("reference", *args)

    monkeypatch.setattr(backends, "choose", chosen)
