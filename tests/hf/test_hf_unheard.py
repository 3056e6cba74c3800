"""A model that does not use "anabranch" (any longer) must say so instead of swallowing tree_step= and branch_mask=."""

from __future__ import annotations

import pickle

import pytest
import torch
from hf_kit import FAMILIES, assert_close, build
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import anabranch as ab
from anabranch import hf, training

REMEDY = r"hf\.enable\(model\)"
IDS = list(range(5, 25))


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return {attn: build("LlamaConfig", attn=attn) for attn in ("anabranch", "sdpa", "eager")}


def call(model: nn.Module, step: ab.Step, ids: list[int], **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(
            torch.tensor([ids]), position_ids=step.position_ids[None], tree_step=step, use_cache=False, **kwargs
        ).logits[0]  # fmt: skip


def llama() -> tuple[nn.Module, ab.TreeCache, ab.Branch]:
    model = build("LlamaConfig")
    cache = ab.TreeCache.for_model(model, num_pages=16)
    return model, cache, cache.branch()


# ---------------------------------------------------------------------------------------------------- other attention


@pytest.mark.parametrize("name", sorted(set(ALL_ATTENTION_FUNCTIONS) - {"anabranch"}))
@pytest.mark.parametrize("keyword", ["tree_step", "branch_mask"])
def test_every_registered_implementation_refuses(name, keyword):
    with pytest.raises(ValueError, match=rf"{keyword}: Linear uses attn_implementation='{name}'.*{REMEDY}"):
        ALL_ATTENTION_FUNCTIONS[name](nn.Linear(1, 1), None, None, None, None, **{keyword: object()})


@torch.no_grad()
def test_and_is_otherwise_what_it_was(models):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    assert ALL_ATTENTION_FUNCTIONS["sdpa"].__wrapped__ is sdpa_attention_forward
    hf.register()  # once more changes nothing
    assert ALL_ATTENTION_FUNCTIONS["sdpa"].__wrapped__ is sdpa_attention_forward
    ids = torch.tensor([IDS])
    assert_close(models["sdpa"](ids).logits[0], models["eager"](ids).logits[0])


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("logits", ["needed", "all"])
def test_a_batch_of_ours(models, attn, logits):
    batch = training.grpo(IDS, [[3, 4, 5], [6, 7, 8]]).batch(logits)
    moved = {name: value.to(torch.device("cpu"), torch.long) for name, value in batch.items() if name == "input_ids"}
    for given in (batch, batch | moved, batch | {"attention_mask": batch["attention_mask"].clone().detach()}):
        with pytest.raises(ValueError, match=f"branch_mask.*{REMEDY}"):
            models[attn](**given, use_cache=False)
    assert models["anabranch"](**batch, use_cache=False).loss.isfinite()


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama"])
def test_a_batch_of_ours_in_every_familys_eager_formula(family):
    config_class, options = FAMILIES[family]
    batch = training.grpo(IDS, [[3, 4, 5], [6, 7, 8]]).batch()
    with pytest.raises(ValueError, match=f"branch_mask=….*{REMEDY}"):
        build(config_class, attn="eager", **options)(**batch, use_cache=False)


def test_a_saved_and_reloaded_checkpoint(models, tmp_path):
    models["anabranch"].save_pretrained(tmp_path)
    reloaded, layout = AutoModelForCausalLM.from_pretrained(tmp_path), training.grpo(IDS, [[3, 4], [6]])
    mask = layout.mask
    with pytest.raises(ValueError, match=f"branch_mask: LlamaAttention uses.*{REMEDY}"):
        reloaded(layout.input_ids[None], position_ids=mask.positions[None], branch_mask=mask, use_cache=False)
    with pytest.raises(ValueError, match=r"uses attn_implementation='sdpa'.*hf\.enable"):
        layout.logprobs(reloaded)
    hf.enable(reloaded)
    torch.testing.assert_close(layout.logprobs(reloaded), layout.logprobs(models["anabranch"]))


def test_a_trainer_on_a_reloaded_checkpoint(models, tmp_path):
    pytest.importorskip("accelerate", reason="Trainer needs it")
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        report_to=[],
        remove_unused_columns=False,
        use_cpu=True,
    )
    layouts = [training.grpo(IDS, [[3, 4], [6]]), training.grpo(IDS[:4], [[3], [6]])]
    trainer = Trainer(build("LlamaConfig", attn="sdpa"), arguments, training.BranchCollator(), layouts)
    with pytest.raises(ValueError, match=f"branch_mask: LlamaAttention uses attn_implementation='sdpa'.*{REMEDY}"):
        trainer.train()


def test_collators_leave_the_attention_mask_out():
    layout = training.grpo(IDS, [[3, 4], [6]])
    item = {"prompt_ids": IDS, "completion_ids": [[3, 4], [6]]}
    assert "attention_mask" not in training.BranchCollator()([layout])
    assert "attention_mask" not in training.GRPOCollator()([item])
    pickle.dumps(training.BranchCollator()([layout]))  # on its way out of a worker


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_a_tree_mask(models, attn):
    _, cache, branch = llama()
    step = cache.step({branch: 4})
    with pytest.raises(ValueError, match=f"tree_step.*{REMEDY}"):
        call(models[attn], step, IDS[:4], attention_mask=hf.tree_mask(step))


# ---------------------------------------------------------------------------------------------------- switched


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_a_model_switched_behind_its_cache(attn):
    model, cache, branch = llama()
    call(model, cache.step({branch: 4}), IDS[:4])
    model.set_attn_implementation(attn)
    before = cache.usage()
    with pytest.raises(ValueError, match=f"model: LlamaForCausalLM uses attn_implementation='{attn}' now.*{REMEDY}"):
        cache.step({branch: 1})
    assert cache.usage() == before and branch.length == 4
    hf.enable(model)
    call(model, cache.step({branch: 1}), [3])


def test_an_engine_whose_model_was_switched():
    engine = ab.Engine(build("LlamaConfig"), num_pages=16)
    engine.model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=f"model: .*attn_implementation='sdpa'.*{REMEDY}"):
        engine.generate(IDS, max_new_tokens=3)
    assert engine.cache.usage().pages_free == 16


# ---------------------------------------------------------------------------------------------------- never written


def test_rows_that_no_layer_wrote_are_noticed_at_the_next_step(models):
    """A step, and a forward that was not given it: nobody is left to notice it sooner."""
    _, cache, branch = llama()
    other = cache.branch()
    step = cache.step({branch: 4})
    models["eager"](torch.tensor([IDS[:4]]), position_ids=step.position_ids[None], use_cache=False)
    with pytest.raises(ValueError, match=r"index 0 on whose keys.* missing in all layers; run the.*truncate\(.*, 0\)"):
        cache.step({branch: 1})
    cache.step({other: 1})  # they are not its rows
    kid = cache.fork(branch, 1)[0]
    for refused in (lambda: cache.step({kid: 1, other: 1}), lambda: cache.join(branch, [kid])):
        with pytest.raises(ValueError, match="index 0 on whose keys and values are missing"):
            refused()
    with pytest.raises(ValueError, match="index 0 on whose keys and values are missing"):
        cache.step({other: 1})  # its turn now


def test_layers_that_the_step_did_not_reach_are_named(models):
    model, cache, branch = llama()
    call(model, cache.step({branch: 4}), IDS[:4])
    layer = model.model.layers[1].self_attn
    layer.config = models["eager"].config
    call(model, cache.step({branch: 2}), IDS[:2])
    with pytest.raises(ValueError, match=r"index 4 on whose keys and values are missing in layer 1 \(1 of 3 layers\)"):
        cache.step({branch: 1})


def test_rows_may_be_given_up():
    model, cache, branch = llama()
    call(model, cache.step({branch: 4}), IDS[:4])
    want = call(model, cache.step({branch: 1}), [7])
    cache.truncate(branch, 4)
    cache.step({branch: 3})
    with pytest.raises(ValueError):
        cache.truncate(branch, 99)  # refused, and forgets nothing
    cache.truncate(branch, 6)
    with pytest.raises(ValueError, match="index 4 on"):
        cache.step({branch: 1})
    kid = cache.fork(branch)[0]
    cache.truncate(branch, 4)
    cache.truncate(kid, 2)
    gone = cache.fork(branch)[0]
    cache.step({gone: 1})
    cache.release(gone)
    ended = cache.fork(branch)[0]
    cache.step({ended: 1})
    cache.join(branch, [ended], mode="discard")
    assert_close(call(model, cache.step({branch: 1, kid: 2}), [7, 3, 4])[:1], want)
    assert not cache._watch._open_steps()  # nothing is kept of all that


def test_steps_may_be_written_in_any_order_and_after_a_fork():
    model, cache, a = llama()
    b = cache.branch()
    first, second = cache.step({a: 3}), cache.step({b: 2})
    kids = cache.fork(a, 2)
    call(model, second, IDS[:2])
    call(model, first, IDS[:3])
    call(model, cache.step({kids[0]: 1, kids[1]: 1, b: 1, a: 1}), [3, 4, 5, 6])


def test_hand_made_caches_are_their_owners():
    cache = ab.TreeCache(num_layers=2, num_kv_heads=2, head_dim=32, num_pages=4)
    branch = cache.branch()
    for _ in range(3):
        cache.step({branch: 1})
    assert branch.length == 3


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_a_bare_branch_mask_beside_labels(models, attn):
    """No mask of ours among the arguments, as from a collator: where labels are given, the loss notices."""
    layout = training.grpo(IDS[:6], [[3, 4, 5], [6, 7, 8]])
    batch = {name: value for name, value in layout.batch().items() if name != "attention_mask"}
    with pytest.raises(ValueError, match=r"branch_mask: .*knows no branch_mask.*hf\.enable\(model\)"):
        models[attn](**batch, use_cache=False)
    for _ in range(2):  # a mask that was attended under once is not taken for one that was attended under now
        assert torch.isfinite(models["anabranch"](**batch, use_cache=False).loss)
    with pytest.raises(ValueError, match="knows no branch_mask"):
        models[attn](**batch, use_cache=False)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_the_very_first_forward_of_any_familys_eager_model(family):
    """No cache that knows the model, no mask of ours, no labels: nothing but the keyword."""
    config_class, options = FAMILIES[family]
    model = build(config_class, attn="eager", **options)
    layout = training.grpo(IDS[:6], [[3, 4, 5], [6, 7, 8]])
    given = dict(input_ids=layout.input_ids[None], position_ids=layout.position_ids[None], use_cache=False)
    with pytest.raises(ValueError, match=rf"branch_mask: .*'eager'.*{REMEDY}"):
        model(**given, branch_mask=layout.mask)
    cache = ab.TreeCache(num_layers=3, num_kv_heads=2, head_dim=32, num_pages=8)
    step = cache.step({cache.branch(): 4})
    with pytest.raises(ValueError, match=rf"tree_step: .*'eager'.*{REMEDY}"):
        call(model, step, IDS[:4])
    assert model(**given).logits.isfinite().all()  # without them it is as ever
