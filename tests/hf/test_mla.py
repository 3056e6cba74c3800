"""Models of multi-head latent attention (DeepSeek): as Transformers computes them, with expanded heads, and over
latents."""

from __future__ import annotations

import re
from pathlib import Path

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
    assert engine.cache.usage().pages_free == 64


# ---------------------------------------------------------------------------------------------------- over latents


def both(model, kv_format="auto"):
    """The same fork/join program over latents and over expanded heads: the logits of each."""
    found = []
    for latent in (True, False):
        cache = ab.TreeCache.for_model(model, num_pages=64, page_size=4, latent=latent, kv_format=kv_format)
        generator, rows = torch.Generator().manual_seed(1), []

        def step(cache=cache, generator=generator, rows=rows, **counts):
            step = cache.step(counts["of"])
            ids = torch.randint(3, 97, (step.num_rows,), generator=generator)
            more = {"cache": hf.latents_of(step)} if cache.v_in_k else {}
            with torch.no_grad():
                rows.append(model(
                    input_ids=ids[None], position_ids=step.position_ids[None], tree_step=step, use_cache=False, **more
                ).logits[0])  # fmt: skip

        trunk = cache.branch()
        step(of={trunk: 9})
        a, b, c = cache.fork(trunk, 3)
        step(of={b: 2, a: 1, trunk: 3, c: 1})
        cache.truncate(b, 10)
        step(of={b: 4, c: 1})
        cache.join(trunk, [c, a, b])
        step(of={trunk: 2})
        cache.check()
        found.append(torch.cat(rows))
    return found


LATENTS = [("deepseek-v2", {}), ("deepseek-v3", {}), ("deepseek-v3", {"rope_interleave": False, "q_lora_rank": None})]


@pytest.mark.parametrize(("family", "options"), LATENTS, ids=str)
def test_absorbed_products_give_the_models_logits(family, options):
    latent, expanded = both(model_of(family, **options))
    assert (latent - expanded).norm() <= 2e-6 * expanded.norm()


def test_formats_and_bfloat16():
    """Both are near float32's. (No experts: a rounded score may choose another one.)"""
    model = model_of("deepseek-v3", first_k_dense_replace=3)
    exact = both(model)[1]
    for kv_format, dtype, bound in (("int8", "float32", 0.03), ("fp8", "float32", 0.15), ("auto", "bfloat16", 0.05)):
        for got in both(model.to(getattr(torch, dtype)), kv_format):
            assert 0 < (got.float() - exact).norm() <= bound * exact.norm()


@pytest.mark.parametrize("family", ["deepseek-v2", "deepseek-v3"])
def test_the_engine_over_latents(family):
    model = model_of(family)
    engine = ab.Engine(model, None, num_pages=64, page_size=4, latent=True)
    assert engine.cache.v_in_k and (engine.cache.num_kv_heads, engine.cache.head_dim) == (1, 40)
    want = model.generate(torch.tensor([PROMPT]), max_new_tokens=24, do_sample=False)[0, len(PROMPT) :].tolist()
    assert list(engine.generate(PROMPT, max_new_tokens=24).token_ids) == want
    assert list(engine.generate([*PROMPT, *want[:3]], max_new_tokens=21).token_ids) == want[3:]  # from kept latents
    options = dict(strategy=ab.SelfConsistency(n=3), max_new_tokens=12, seed=[1, 2])
    trees = [
        [r.tree for r in one.generate([PROMPT, PROMPT[:3]], **options)]
        for one in (engine, ab.Engine(model, None, num_pages=64, page_size=4))
    ]
    assert trees[0] == trees[1]


def test_what_latents_do_not_go_with_is_said():
    model, llama = model_of("deepseek-v3"), model_of("llama")
    with pytest.raises(hf.UnsupportedModel, match="not one latent and one rotated key a token"):
        ab.TreeCache.for_model(llama, num_pages=4, latent=True)
    with pytest.raises(ValueError, match="latent: expected True or False"):
        ab.TreeCache.for_model(model, num_pages=4, latent=32)
    with pytest.raises(ValueError, match="no batch-invariant form"):
        ab.Engine(model, None, num_pages=4, latent=True, batch_invariant=True)
    with pytest.raises(ValueError, match="not traced"):
        ab.Engine(model, None, num_pages=4, latent=True, compile=True)
    cache = ab.TreeCache.for_model(model, num_pages=4, latent=True)
    step = cache.step({cache.branch(): 3})
    given = dict(input_ids=torch.ones(1, 3).long(), position_ids=step.position_ids[None], use_cache=False)
    with pytest.raises(ValueError, match=r"cache=anabranch\.hf\.latents_of\(step\)"):
        model(**given, tree_step=step)
    with pytest.raises(ValueError, match="use_cache: must be False"):
        model(**given | {"use_cache": True}, tree_step=step, cache=hf.latents_of(step))
    other = ab.TreeCache.for_model(model, num_pages=4)
    with pytest.raises(ValueError, match="expected a Step of a cache of latents"):
        hf.latents_of(other.step({other.branch(): 3}))
    model(**given, tree_step=step, cache=hf.latents_of(step))  # nothing was lost on the way


def test_an_up_projection_that_is_no_plain_layer_is_refused():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(
        model_of("deepseek-v3"), peft.LoraConfig(target_modules=["kv_b_proj"], r=2, init_lora_weights=False)
    )
    with pytest.raises(hf.UnsupportedModel, match=r"adapter on it has to be merged"):
        ab.TreeCache.for_model(model, num_pages=4, latent=True)
    latent, expanded = both(model.merge_and_unload())
    assert (latent - expanded).norm() <= 2e-6 * expanded.norm()


def test_code_of_the_guide_runs():
    page = (Path(__file__).parents[2] / "docs" / "guides" / "attention_shapes.md").read_text(encoding="utf-8")
    names = {"model": model_of("deepseek-v3"), "tokenizer": None, "prompt_ids": torch.arange(3, 12)}
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "attention_shapes", "exec", dont_inherit=True), names)
    assert names["latent"].shape == (5, 8, 64) and names["out"].shape == (5, 8, 24)


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("family", ["deepseek-v2", "deepseek-v3"])
def test_a_row_reads_another_branch_under_a_position_offset(family, latent):
    """As if the branch's tokens stood three positions further on: the rotated numbers are the last of a key."""
    model, eager = model_of(family), model_of(family, attn="eager")
    cache = ab.TreeCache.for_model(model, num_pages=16, page_size=4, latent=latent)
    reader, other = cache.branch(), cache.branch()
    ids = torch.tensor([5, 7, 11, 13, 17, 19])

    def forward(step, ids):
        more = {"cache": hf.latents_of(step)} if latent else {}
        return model(
            input_ids=ids[None], position_ids=step.position_ids[None], tree_step=step, use_cache=False, **more
        ).logits[0]  # fmt: skip

    with torch.no_grad():
        forward(cache.step({other: 5}), ids[:5])
        views = {reader: [ab.Read(other, offset=-3)]}
        got = forward(cache.step({reader: 1}, positions={reader: torch.tensor([8])}, views=views), ids[5:])[0]
        want = eager(input_ids=ids[None], position_ids=torch.tensor([[3, 4, 5, 6, 7, 8]]), use_cache=False).logits[0, 5]
    assert (got - want).norm() <= 1e-5 * want.norm()
