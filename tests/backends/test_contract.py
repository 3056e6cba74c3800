"""Every registered backend has the members of `base.Backend`, with the same parameters."""

import inspect

import pytest
import torch

from anabranch import backends
from anabranch.backends import base

CONTRACTS = (base.Backend, base.BranchAttention, base.AdvancesPlans, base.PreparesPool)


def members(protocol: type) -> list[str]:
    return [name for name, value in vars(protocol).items() if inspect.isfunction(value) and not name.startswith("_")]


@pytest.mark.parametrize("name", backends.NAMES)
def test_a_backend_has_the_members_of_its_protocols(name: str) -> None:
    backend = backends.get(name)
    assert backend.name == name
    assert backend.device_type in ("cpu", "cuda")
    assert all(type(getattr(backend, trait)) is bool for trait in ("capturable", "batch_invariant"))
    for protocol in CONTRACTS:
        if protocol is not base.Backend and not isinstance(backend, protocol):
            continue
        for member in members(protocol):
            stated = list(inspect.signature(getattr(protocol, member)).parameters.values())[1:]
            given = list(inspect.signature(getattr(backend, member)).parameters.values())
            assert [(p.name, p.kind) for p in given[: len(stated)]] == [(p.name, p.kind) for p in stated], member
            assert all(p.default is not p.empty for p in given[len(stated) :]), f"{member}: more required parameters"


def test_what_auto_prefers_on_each_device() -> None:
    assert backends.PREFERRED == {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")}


def test_a_backend_without_branch_attention_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from anabranch.backends import registry

    monkeypatch.setattr(registry, "unavailable", lambda name: None)  # as on a machine with a GPU
    message = "'cuda': has no branch attention; pass backend='auto', 'reference' or 'cpu' or 'triton'"
    with pytest.raises(ValueError, match=message):
        backends.choose("cuda", torch.device("cuda"), torch.float32, 16, branch=True)
