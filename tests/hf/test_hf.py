"""Hugging Face decoders, built small and random (hf_kit.py): over a tree, as usual, and refused."""

from __future__ import annotations

import copy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from hf_kit import FAMILIES, MIXED, SMALL, VOCAB, WINDOW, Run, assert_close, build, program
from torch import nn

import anabranch as ab
from anabranch import hf
from anabranch.hf.checks import window_of
from anabranch.hf.mask import DeferredMask, mask


@pytest.fixture(scope="module")
def models():
    """family → (model with anabranch, its eager twin); built once."""
    made: dict[str, tuple[nn.Module, nn.Module]] = {}

    def get(family: str) -> tuple[nn.Module, nn.Module]:
        if family not in made:
            config_class, options = FAMILIES[family]
            made[family] = build(config_class, **options), build(config_class, attn="eager", **options)
        return made[family]

    return get


# ---------------------------------------------------------------------------------------------------- over a tree


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fork_join_program_equals_dense_recomputation(models, family, backend):
    if reason := ab.backends.unavailable(backend):
        pytest.skip(reason)
    model, eager = models(family)
    for seed in (1, 2):
        run = Run(model, backend, seed)
        program(run)
        assert_close(torch.cat(run.got), run.oracle.logits(eager))
        run.cache.check()


@pytest.mark.parametrize("family", FAMILIES)
def test_one_branch_equals_plain_forward_without_any_mask(models, family):
    """The oracle's hand-made masks aside: an unforked branch is an ordinary sequence."""
    model, eager = models(family)
    run = Run(model, "auto", seed=3)
    branch = run.branch()
    for rows in (11, 1, 1, 5, 1):
        run.step({branch: rows})
    with torch.no_grad():
        want = eager(input_ids=torch.tensor([run.oracle.ids]), use_cache=False).logits[0]
    assert_close(torch.cat(run.got), want)


def tree_call(model, rows=5, page_size=4, **kwargs):
    """One forward over a new one-branch tree; returns (output, cache, branch)."""
    cache = ab.TreeCache.for_model(model, num_pages=16, page_size=page_size)
    branch = cache.branch()
    step = cache.step({branch: rows})
    given = {"input_ids": torch.arange(3, 3 + rows)[None], "position_ids": step.position_ids[None], "tree_step": step,
             "use_cache": False} | {k: v(step) if callable(v) else v for k, v in kwargs.items()}  # fmt: skip
    return model(**{k: v for k, v in given.items() if v is not ...}), cache, branch


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_to_keep_and_tree_mask(models, family):
    model, _ = models(family)
    everything = tree_call(model)[0].logits
    last = tree_call(model, logits_to_keep=lambda step: step.last_rows, attention_mask=hf.tree_mask)[0].logits
    assert last.shape == (1, 1, VOCAB)
    torch.testing.assert_close(last[:, 0], everything[:, -1])


@torch.no_grad()
def test_no_dense_mask_is_built_over_a_tree(models, monkeypatch):
    model, _ = models("mistral")
    monkeypatch.setattr(DeferredMask, "resolve", lambda self: pytest.fail("the mask was built"))
    tree_call(model)


def test_gradients_fail_loudly_instead_of_being_cut(models):
    model, _ = models("llama")
    logits = tree_call(model)[0].logits
    with pytest.raises(RuntimeError, match="branch_attention"):
        logits.sum().backward()
    model.zero_grad()


@torch.no_grad()
def test_bfloat16(models):
    model, eager = copy.deepcopy(models("gemma2")[0]).bfloat16(), models("gemma2")[1]
    output, cache, _ = tree_call(model, rows=12)
    want = eager(input_ids=torch.arange(3, 15)[None]).logits
    assert cache.dtype == torch.bfloat16
    assert (output.logits.float() - want).norm() < 0.05 * want.norm()


MISUSES = {
    "batch": (
        {"input_ids": torch.zeros(2, 5, dtype=torch.long), "position_ids": ...},
        ValueError,
        "input_ids.*batch of 2",
    ),
    "rows": ({"input_ids": torch.zeros(1, 4, dtype=torch.long), "position_ids": ...}, ValueError, "5 rows.*4 tokens"),
    "use_cache": ({"use_cache": True}, ValueError, "use_cache: must be False"),
    "use_cache by default": ({"use_cache": ...}, ValueError, "use_cache: must be False"),
    "padding": ({"attention_mask": torch.tensor([[0, 1, 1, 1, 1]])}, ValueError, "attention_mask: must not be given"),
    "4-D mask": ({"attention_mask": torch.ones(1, 1, 5, 5)}, ValueError, "attention_mask: must not be given"),
    "positions": ({"position_ids": torch.arange(5)[None] + 1}, ValueError, r"position_ids.*step\.position_ids"),
    "positions but the last": ({"position_ids": torch.tensor([[3, 1, 2, 3, 4]])}, ValueError, "got other pos"),
    "attentions": ({"output_attentions": True}, ValueError, "output_attentions"),
    "not a step": ({"tree_step": 7}, TypeError, "tree_step: expected the Step.*got int"),
    "backend": ({"tree_backend": "abacus"}, ValueError, "backend: 'abacus'"),
    "not causal": ({"is_causal": False}, ValueError, "not causal"),
    "packed": ({"cu_seq_lens_q": torch.tensor([0, 5])}, ValueError, "cu_seq_lens_q"),
}


@pytest.mark.parametrize("misuse", MISUSES)
@torch.no_grad()
def test_misuse_is_refused_before_anything_is_written(models, misuse):
    kwargs, error, message = MISUSES[misuse]
    model, _ = models("llama")
    step = None

    def remember(s):
        nonlocal step
        step = s
        return s

    with pytest.raises(error, match=message):
        tree_call(model, **{"tree_step": remember} | kwargs)
    if step is not None:  # still good: nothing was written with it
        model(input_ids=torch.arange(5)[None], position_ids=step.position_ids[None], tree_step=step, use_cache=False)


@torch.no_grad()
def test_training_mode_is_refused(models):
    model = copy.deepcopy(models("llama")[0]).train()
    with pytest.raises(ValueError, match=r"training mode.*model\.eval\(\)"):
        tree_call(model)


@torch.no_grad()
def test_cache_of_another_model_is_refused(models):
    model, _ = models("llama")
    cache = ab.TreeCache(num_layers=2, num_kv_heads=2, head_dim=32, num_pages=4)
    step = cache.step({cache.branch(): 3})
    with pytest.raises(ValueError, match="layer 2, but the cache has layers 0…1"):
        model(input_ids=torch.ones(1, 3, dtype=torch.long), position_ids=step.position_ids[None], tree_step=step,
              use_cache=False)  # fmt: skip


# ---------------------------------------------------------------------------------------------------- as usual


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_ordinary_use_equals_eager(models, family):
    model, eager = models(family)
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, VOCAB, (3, 17), generator=generator)
    padding = torch.ones_like(ids)
    padding[0, :5] = padding[2, :9] = 0
    visible = padding.bool()
    assert_close(model(ids, attention_mask=padding).logits[visible], eager(ids, attention_mask=padding).logits[visible])
    assert_close(model(ids[1:2]).logits[0], eager(ids[1:2]).logits[0])  # the deferred mask, looked at
    assert not torch.allclose(eager(ids).logits[visible], eager(ids, attention_mask=padding).logits[visible])
    for cache in (None, "static"):
        options = {"max_new_tokens": 10, "do_sample": False, "cache_implementation": cache, "attention_mask": padding}
        assert torch.equal(model.generate(ids, **options), eager.generate(ids, **options))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss"])
@torch.no_grad()
def test_attention_weights_come_from_the_eager_formula(models, family):
    model, eager = models(family)
    ids = torch.arange(3, 12)[None]
    got, want = model(ids, output_attentions=True).attentions, eager(ids, output_attentions=True).attentions
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_deferred_mask_is_an_ordinary_tensor_to_others():
    made = mask(1, 4, 4, device="cpu", local_size=2, mask_function=lambda b, h, q, k: (k <= q) & (k > q - 2))
    assert isinstance(made, DeferredMask) and made.window == 2 and made.shape == (1, 1, 4, 4)
    band = torch.ones(4, 4, dtype=torch.bool).tril().triu(-1)
    assert torch.equal(made[0, 0, :, :], band)
    assert torch.equal(torch.where(made, 1.0, 0.0)[0, 0], band.float())
    with pytest.raises(ValueError, match="serves only forwards with tree_step"):
        DeferredMask((1, 1, 4, 4), "cpu", None, None).resolve()


def test_the_window_of_a_layer_as_its_mask_tells_it():
    """Where another mask stands in for the model's own, a layer of full attention needs no probe, others do. What is
    local in another way than the model says is no window: chunks, and windows of another size."""
    config = SimpleNamespace(sliding_window=4, layer_types=["full_attention", "sliding_attention"])
    full, sliding = nn.Module(), nn.Module()
    for at, layer in enumerate((full, sliding)):
        layer.config, layer.layer_idx = config, at
    stand_in = DeferredMask((1, 1, 6, 6), "cpu", None, None)
    own = mask(1, 6, 6, device="cpu", local_size=4, mask_function=lambda b, h, q, k: (k <= q) & (k > q - 4))
    assert window_of(full, stand_in, {}) is None
    assert window_of(sliding, stand_in, {"sliding_window": 4}) == window_of(sliding, own, {}) == 4
    with pytest.raises(hf.UnsupportedModel, match=r"call anabranch\.hf\.describe"):
        window_of(sliding, stand_in, {})
    with pytest.raises(hf.UnsupportedModel, match="local to 4 tokens"):
        window_of(sliding, own, {"sliding_window": 8})
    config.attention_chunk_size = 4
    with pytest.raises(hf.UnsupportedModel, match="local to 4 tokens"):
        window_of(sliding, own, {})


def test_tree_backend_without_tree_step_is_refused(models):
    with pytest.raises(ValueError, match="tree_backend: given without tree_step"):
        models("llama")[0](torch.ones(1, 3, dtype=torch.long), tree_backend="cpu")


# ---------------------------------------------------------------------------------------------------- describe, enable


def test_describe(models):
    shape = hf.describe(models("gpt-oss")[0])
    assert shape == hf.ModelShape(
        num_layers=3, num_q_heads=4, num_kv_heads=2, head_dim=32, dtype=torch.float32, device=torch.device("cpu"),
        windows=(WINDOW, None, WINDOW), softcap=None, sinks=True, max_positions=256,
    )  # fmt: skip
    assert hf.describe(models("gemma2")[0]).softcap == 2.0
    assert hf.describe(models("qwen2")[0]).windows == (None, WINDOW, WINDOW)


def test_describe_leaves_model_and_random_state_alone(models):
    model = copy.deepcopy(models("llama")[0]).train()
    model.model.layers[1].eval()
    before, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    hf.describe(model)
    assert torch.equal(before, torch.get_rng_state()) and modes == [m.training for m in model.modules()]


def test_describe_notices_a_new_dtype(models):
    model = copy.deepcopy(models("llama")[0])
    assert hf.describe(model).dtype == torch.float32
    assert hf.describe(model.bfloat16()).dtype == torch.bfloat16


def test_enable_and_uses(models):
    model = build("LlamaConfig", attn="sdpa")
    assert not hf.uses_anabranch(model)
    with pytest.raises(ValueError, match=r"uses attn_implementation='sdpa'.*anabranch\.hf\.enable"):
        ab.TreeCache.for_model(model)
    assert hf.enable(model) == hf.describe(models("llama")[0])
    assert hf.uses_anabranch(model)
    with pytest.raises(TypeError, match="model: expected a Transformers model"):
        hf.describe(nn.Linear(2, 2))


REFUSED = {
    "encoder": ("BertConfig", {}, "BertLMHeadModel", "not causal"),
    "encoder–decoder": ("T5Config", {"d_kv": 32, "num_layers": 2}, "T5ForConditionalGeneration", "encoder–decoder"),
    "cross-attention": ("GPT2Config", {"add_cross_attention": True}, "GPT2LMHeadModel", "cross-attention"),
    "state-space": ("MambaConfig", {"state_size": 8}, "MambaForCausalLM", "linear_attention|mamba|recurrent"),
    "hybrid": ("Qwen3NextConfig", {"head_dim": 32, "num_experts": 4}, "Qwen3NextForCausalLM", "linear_attention"),
    "convolution": ("Lfm2Config", {"full_attn_idxs": [1]}, "Lfm2ForCausalLM", "conv"),
    "chunked": ("Llama4TextConfig", {"num_local_experts": 2, "head_dim": 32}, "Llama4ForCausalLM", "chunked_attention"),
    "own mask": ("DogeConfig", {}, "DogeForCausalLM", "mask of its own"),
    "two head dims": ("Gemma4TextConfig", MIXED | {"head_dim": 32, "global_head_dim": 64, "num_kv_shared_layers": 0,
                      "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB}, "Gemma4ForCausalLM",
                      "differ in head_dim: 32 .layer 0., 64 .layer 1."),
    "no registry": ("BloomConfig", {"n_head": 4, "n_layer": 2}, "BloomForCausalLM", "_supports_attention_backend"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_cannot_run_over_a_tree_are_refused_unchanged(kind):
    config_class, options, model_class, message = REFUSED[kind]
    config = getattr(transformers, config_class)(**SMALL | options)
    model = getattr(transformers, model_class)(config).eval()
    before = model.config._attn_implementation
    with pytest.raises(hf.UnsupportedModel, match=message):
        hf.enable(model)
    assert model.config._attn_implementation == before


def test_keywords_lost_on_the_way_are_noticed(models):
    model = copy.deepcopy(models("llama")[0])
    layer = model.model.layers[1].self_attn
    forward = layer.forward

    def forgetful(hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        return forward(hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask)

    layer.forward = forgetful
    with pytest.raises(hf.UnsupportedModel, match=r"3 layers.*for layers \[0, 2\]"):
        hf.describe(model)


def test_mixing_outside_attention_is_noticed(models):
    class Shift(nn.Module):
        def forward(self, x):
            return x + x.cumsum(1)

    model = copy.deepcopy(models("llama")[0])
    model.model.layers[1].mlp = Shift()
    with pytest.raises(hf.UnsupportedModel, match="mixes tokens outside of attention"):
        hf.describe(model)


class OverTheForward(nn.Module):
    """Normalises by the mean of all rows: equal rows stay equal."""

    def forward(self, x):
        return x - x.mean(1, keepdim=True)


class LimitedExperts(nn.Module):
    """Takes the first `capacity` rows and passes over the others, as a router whose expert is full."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity

    def forward(self, x):
        return torch.cat([x[:, : self.capacity], torch.zeros_like(x[:, self.capacity :])], dim=1)


@pytest.mark.parametrize(
    "mlp, message",
    [(OverTheForward(), "other logits when the other tokens"), (LimitedExperts(5), "experts of limited capacity")],
    ids=["statistics", "capacity"],
)
def test_layers_that_look_at_the_whole_forward_are_noticed(models, mlp, message):
    model = copy.deepcopy(models("llama")[0])
    model.model.layers[1].mlp = mlp
    with pytest.raises(hf.UnsupportedModel, match=message):
        hf.describe(model)


def test_layers_of_different_shape_are_refused(models):
    model = copy.deepcopy(models("llama")[0])
    attn = model.model.layers[2].self_attn
    attn.k_proj, attn.v_proj = nn.Linear(128, 128, bias=False), nn.Linear(128, 128, bias=False)
    with pytest.raises(hf.UnsupportedModel, match=r"differ in kv_heads: 2 \(layer 0\), 4 \(layer 2\)"):
        hf.describe(model)


# ---------------------------------------------------------------------------------------------------- registration


@pytest.mark.parametrize("imports", ["import anabranch, transformers", "import transformers.modeling_utils, anabranch"])
def test_registered_whichever_is_imported_first(imports):
    code = f"""{imports}
import inspect, sys
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
assert "anabranch" in ALL_ATTENTION_FUNCTIONS and "anabranch" in ALL_MASK_ATTENTION_FUNCTIONS
assert "class PreTrainedModel" in inspect.getsource(PreTrainedModel)
assert not [f for f in sys.meta_path if type(f).__module__.startswith("anabranch")]
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_importing_anabranch_imports_neither_torch_nor_transformers():
    code = "import anabranch, sys; assert not {'torch', 'transformers'} & set(sys.modules), 'heavy import'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
