"""A model's own rotary embeddings, found and proved; models whose positions are something else are refused."""

from __future__ import annotations

import pytest
import torch
from hf_kit import FAMILIES, MIXED, build

import anabranch as ab
from anabranch.hf.rotary import rotary_of

PURE = {  # pairs of each layer, neighbours or halves
    "LlamaConfig": ({}, [16, 16, 16], False),
    "Qwen3Config": ({"head_dim": 48}, [24, 24, 24], False),
    "PhiConfig": ({}, [8, 8, 8], False),
    "GPTNeoXConfig": ({}, [4, 4, 4], False),
    "CohereConfig": ({}, [16, 16, 16], True),
    "Glm4Config": ({"head_dim": 32}, [8, 8, 8], True),
    "Gemma3TextConfig": (MIXED | {"head_dim": 32, "query_pre_attn_scalar": 24}, [16, 16, 16], False),
    "SmolLM3Config": ({"no_rope_layers": [1, 0, 1]}, [16, None, 16], False),
}


@pytest.mark.parametrize("name", PURE)
def test_found(name: str) -> None:
    options, pairs, interleaved = PURE[name]
    rotary = rotary_of(build(name, **options))
    assert [None if r is None else len(r.frequencies) for r in rotary] == pairs
    assert {r.interleaved for r in rotary if r is not None} == {interleaved}
    assert not any(r.last for r in rotary if r is not None)


@pytest.mark.parametrize(("family", "interleaved"), [("deepseek-v2", True), ("deepseek-v3", False)])
def test_found_at_the_end_of_a_head(family: str, interleaved: bool) -> None:
    config, options = FAMILIES[family]
    for rotary in rotary_of(build(config, **options)):
        assert (len(rotary.frequencies), rotary.interleaved, rotary.last) == (4, interleaved, True)


def test_layers_may_differ() -> None:
    """Gemma 3 turns its local layers faster."""
    options = PURE["Gemma3TextConfig"][0]
    local, full, _ = rotary_of(build("Gemma3TextConfig", **options))
    assert not torch.equal(local.frequencies, full.frequencies)


REFUSED = {
    "GPT2Config": ({"n_embd": 128, "n_layer": 2, "n_head": 4}, "something else than a rotation"),
    "OPTConfig": ({"word_embed_proj_dim": 128, "ffn_dim": 96}, "something else than a rotation"),
    "LlamaConfig": (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
        "change with the length",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    """At the first step that needs it, before anything changes; the model runs on."""
    options, why = REFUSED[name]
    cache = ab.TreeCache.for_model(build(name, **options), num_pages=8)
    a, b = cache.branch(), cache.branch()
    with pytest.raises(ValueError, match=why):
        cache.step({a: 1, b: 2}, views={a: [ab.Read(b, offset=3)]})
    assert a.length == b.length == 0
    assert cache.step({a: 1, b: 2}, views={a: [ab.Read(b)]}).num_rows == 3
