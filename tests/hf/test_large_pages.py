"""Weights that are copied into large pages are the same weights, in the same parameters, tied as they were."""

from __future__ import annotations

import hf_kit
import pytest
import torch
from torch import nn

import anabranch as ab
from anabranch.backends import cpu
from anabranch.hf import weight_pages as module


@pytest.fixture(autouse=True)
def small_is_enough(monkeypatch):
    monkeypatch.setattr(module, "LEAST", 0)
    monkeypatch.setattr(module, "_setting", lambda: "always [madvise] never")
    monkeypatch.setattr(cpu, "large_pages", lambda memory: memory.data_ptr() % module.PAGE == 0)


def test_a_model(monkeypatch):
    model = hf_kit.build("LlamaConfig", tie_word_embeddings=True)
    twin = hf_kit.build("LlamaConfig", tie_word_embeddings=True)
    before = list(model.parameters())
    places = [p.data_ptr() for p in before]
    assert ab.hf.large_pages(model) == sum(p.numel() * 4 for p in before)
    after = list(model.parameters())
    assert all(a is b for a, b in zip(before, after, strict=True))
    assert not set(places) & {p.data_ptr() for p in after} and all(p.data_ptr() % 64 == 0 for p in after)
    for one, other in zip(after, twin.parameters(), strict=True):
        assert torch.equal(one, other) and one.requires_grad == other.requires_grad and one.shape == other.shape
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.arange(5)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, twin(ids).logits)
    memory = {p.untyped_storage().data_ptr() for p in after}
    assert len(memory) == 1, "one piece of memory for all"


def test_parameters_tied_by_their_memory():
    """Two parameters of the same numbers stay so; other views of one memory are left where they are."""
    same, views = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    model = nn.ModuleList([same, nn.Linear(8, 8, bias=False), views, nn.Linear(8, 4, bias=False), nn.Linear(3, 3)])
    model[1].weight.data = same.weight.data
    model[3].weight.data = views.weight.data[4:]
    values = [p.detach().clone() for p in model.parameters()]
    place = views.weight.data_ptr()
    assert ab.hf.large_pages(model) == 4 * (64 + 9 + 3)
    assert model[0].weight.data_ptr() == model[1].weight.data_ptr()
    assert views.weight.data_ptr() == place and model[3].weight.data_ptr() == place + 4 * 32
    assert all(map(torch.equal, model.parameters(), values))


def test_nothing_to_do(monkeypatch):
    model = nn.Linear(64, 64)
    place = model.weight.data_ptr()
    for patch in ({"LEAST": 1 << 30}, {"_setting": lambda: "always madvise [never]"}):
        with monkeypatch.context() as changed:
            for name, value in patch.items():
                changed.setattr(module, name, value)
            assert ab.hf.large_pages(model) == 0
    with monkeypatch.context() as changed:
        changed.setattr(cpu, "large_pages", lambda memory: False)
        assert ab.hf.large_pages(model) == 0
    assert ab.hf.large_pages(nn.Linear(8, 8, device="meta")) == 0
    assert model.weight.data_ptr() == place


def test_the_setting_of_a_system_without_any(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setattr(module, "_SYSTEM", tmp_path / "enabled")
    assert module._setting() == "[never]"
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    assert "[madvise]" in module._setting()
