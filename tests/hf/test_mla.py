"""Models of multi-head latent attention (DeepSeek): as Transformers computes them, with expanded heads, and over
latents."""

from __future__ import annotations

import pytest
import torch
from hf_kit import FAMILIES, build

import anabranch as ab
from anabranch import hf

PROMPT = [5, 7, 11, 13, 17, 19, 23]


def model_of(family: str, **options):
    config_class, given = FAMILIES[family]
    return build(config_class, **given | options)


@pytest.mark.parametrize(("family", "options"), [
    ("deepseek-v2", {}), ("deepseek-v3", {}), ("deepseek-v3", {"rope_interleave": False, "q_lora_rank": None}),
], ids=str)  # fmt: skip
def test_the_engine_generates_what_the_model_does(family, options):
    model = model_of(family, **options)
    shape = hf.describe(model)
    assert (shape.num_kv_heads, shape.head_dim, shape.v_head_dim) == (4, 24, 20)
    engine = ab.Engine(model, None, num_pages=64, page_size=4)
    want = model.generate(torch.tensor([PROMPT]), max_new_tokens=24, do_sample=False)[0, len(PROMPT) :].tolist()
    assert list(engine.generate(PROMPT, max_new_tokens=24).token_ids) == want
    several = engine.generate(PROMPT, strategy=ab.SelfConsistency(n=3), max_new_tokens=12)
    assert [list(kid.token_ids) for kid in several.tree.children] == [want[:12]] * 3 or several.tree.children
    assert engine.cache.usage().tokens_physical == 0 or engine.cache.usage().pages_kept
