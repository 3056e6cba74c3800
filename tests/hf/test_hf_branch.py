"""Hugging Face decoders under a branch mask: losses and gradients against dense eager attention, trainers, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_kit import FAMILIES, WINDOW, build, one_thread  # noqa: F401

import anabranch as ab
from anabranch import hf, training

# Two prompts in a row; threads fork, fork again and join; positions restart, so that windows hide other tokens than
# distance in the row would.
LAYOUT = training.Layout.pack(
    [
        training.multiverse(
            [5, 6, 7],
            [[8, 9], training.Block([[[10], training.Block([[11, 12, 13], [14]]), [15]], [16, 17]], [[20], [21]], [22]),
             [30, 31, 32]],
        ),
        training.grpo([40, 41, 42, 43], [[50, 51, 52, 53, 54, 55], [60, 61]]),
    ]
)  # fmt: skip


def dense_masks(config, layout: training.Layout) -> torch.Tensor | dict[str, torch.Tensor]:
    visible, position = layout.mask.dense(), layout.position_ids
    near = position[:, None] - position[None, :] < WINDOW
    masks = {}
    for kind, seen in (("full_attention", visible), ("sliding_attention", visible & near)):
        masks[kind] = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
    if getattr(config, "layer_types", None):
        return masks
    return masks["sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"]


def loss_of(model, layout: training.Layout, **kwargs) -> torch.Tensor:
    logits = model(
        input_ids=layout.input_ids[None], position_ids=layout.position_ids[None], use_cache=False, **kwargs
    ).logits[0]
    rows, tokens = layout.mask.previous[layout.learnt], layout.input_ids[layout.learnt]
    return torch.nn.functional.cross_entropy(logits[rows], tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_dense_attention(family):
    config_class, options = FAMILIES[family]
    model, eager = build(config_class, **options).train(), build(config_class, attn="eager", **options).train()
    loss = loss_of(model, LAYOUT, branch_mask=LAYOUT.mask)
    want = loss_of(eager, LAYOUT, attention_mask=dense_masks(eager.config, LAYOUT))
    torch.testing.assert_close(loss, want, atol=1e-5, rtol=1e-5)
    loss.backward()
    want.backward()
    for (name, ours), theirs in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            scale = theirs.grad.norm().clamp(min=1e-3)
            assert (ours.grad - theirs.grad).norm() < 1e-4 * scale, f"{name}: gradients differ"
    # The loss that Transformers itself computes from a collator's batch is the same one.
    batch = training.BranchCollator()([LAYOUT])
    torch.testing.assert_close(model(**batch, use_cache=False).loss, want, atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_and_autocast():
    model = build("LlamaConfig").train()
    loss = loss_of(model, LAYOUT, branch_mask=LAYOUT.mask)
    loss.backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss_of(model, LAYOUT, branch_mask=LAYOUT.mask).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name], atol=1e-6, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        lower = loss_of(model, LAYOUT, branch_mask=LAYOUT.mask)
    assert abs(float(lower.detach()) - float(loss.detach())) < 0.05 * float(loss.detach())


MISUSES = {
    "batch": (
        {"input_ids": torch.zeros(2, 8, dtype=torch.long), "position_ids": ...},
        ValueError,
        "input_ids.*batch must be 1, got 2.*BranchMask.pack",
    ),
    "another batch's mask": (
        {"input_ids": torch.zeros(1, 7, dtype=torch.long), "position_ids": torch.arange(7)[None]},
        ValueError,
        "branch_mask: made for 8 tokens in 3 segments.*segment 2.*given 7",
    ),
    "another device": (
        {"branch_mask": ab.BranchMask.from_tree([4, 2, 2], [-1, 0, 0]).to("meta"), "position_ids": ...},
        ValueError,
        "branch_mask: is on meta.*input on cpu",
    ),
    "use_cache": ({"use_cache": True}, ValueError, "use_cache: must be False with branch_mask"),
    "padding": ({"attention_mask": torch.tensor([[0, *[1] * 7]])}, ValueError, "attention_mask: must not be given"),
    "positions": (
        {"position_ids": torch.arange(8)[None]},
        ValueError,
        r"position_ids: token 6 \(segment 2\) is at 6, in branch_mask at 4",
    ),
    "attentions": ({"output_attentions": True}, ValueError, "output_attentions"),
    "not a mask": ({"branch_mask": 7}, TypeError, "branch_mask: expected a BranchMask, got int"),
    "backend": ({"branch_backend": "abacus"}, ValueError, "backend: 'abacus'"),
    "backend alone": ({"branch_mask": None, "branch_backend": "cpu"}, ValueError, "branch_backend: given without"),
    "not causal": ({"is_causal": False}, ValueError, "not causal"),
    "packed": ({"cu_seq_lens_q": torch.tensor([0, 8])}, ValueError, "cu_seq_lens_q"),
}


@pytest.fixture(scope="module")
def llama():
    return build("LlamaConfig")


@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse_is_refused(misuse, llama):
    change, error, message = MISUSES[misuse]
    mask = ab.BranchMask.from_tree([4, 2, 2], [-1, 0, 0])
    given = {"input_ids": torch.arange(3, 11)[None], "position_ids": mask.positions[None], "branch_mask": mask,
             "use_cache": False} | change  # fmt: skip
    with pytest.raises(error, match=message), torch.no_grad():
        llama(**{k: v for k, v in given.items() if v is not ...})


def test_a_step_beside_a_mask_and_dropout_are_refused(llama):
    mask = ab.BranchMask.from_tree([4, 2, 2], [-1, 0, 0])
    cache = ab.TreeCache.for_model(llama, num_pages=8)
    step = cache.step({cache.branch(): 8})
    ids = torch.arange(3, 11)[None]
    with pytest.raises(ValueError, match="branch_mask: given beside tree_step"), torch.no_grad():
        llama(ids, position_ids=step.position_ids[None], tree_step=step, branch_mask=mask, use_cache=False)
    model = copy.deepcopy(llama).train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"dropout.*attention_dropout = 0"):
        model(ids, position_ids=mask.positions[None], branch_mask=mask, use_cache=False)


# ---------------------------------------------------------------------------------------------------- trainers


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


COMMON = {"num_train_epochs": 3, "per_device_train_batch_size": 2, "learning_rate": 3e-3, "logging_steps": 1,
          "report_to": [], "remove_unused_columns": False, "save_strategy": "no", "use_cpu": True,
          "lr_scheduler_type": "constant", "disable_tqdm": True}  # fmt: skip


@pytest.mark.parametrize("logits", ["all", "needed"])
def test_trainer(tmp_path, logits):
    pytest.importorskip("accelerate", reason="Trainer needs accelerate: pip install 'anabranch[train]'")
    from transformers import Trainer, TrainingArguments

    model = build("Qwen3Config", head_dim=32)
    layouts = [LAYOUT, training.grpo([3, 4], [[5, 6], [7]])]
    with torch.no_grad():
        first = -training.Layout.pack(layouts).logprobs(model).mean()
    trainer = Trainer(
        model,
        TrainingArguments(tmp_path, **COMMON),
        data_collator=training.BranchCollator(logits=logits),
        train_dataset=layouts,
        eval_dataset=layouts,
    )
    trainer.train()
    found = losses(trainer)
    assert abs(found[0] - float(first)) < 1e-3 and found[-1] < 0.8 * found[0]
    trainer.args.prediction_loss_only = True
    assert trainer.evaluate()["eval_loss"] < found[-1] + 1e-3


def test_sft_trainer(tmp_path):
    pytest.importorskip("trl", reason="SFTTrainer needs TRL: pip install 'anabranch[train]'")
    from datasets import Dataset
    from engine_kit import byte_tokenizer
    from trl import SFTConfig, SFTTrainer

    model = build("LlamaConfig")
    layouts = [LAYOUT, training.grpo([3, 4], [[5, 6], [7]])]
    with torch.no_grad():
        first = -training.Layout.pack(layouts).logprobs(model).mean()
    trainer = SFTTrainer(
        model,
        SFTConfig(str(tmp_path), dataset_kwargs={"skip_prepare_dataset": True}, max_length=None, bf16=False, **COMMON),
        data_collator=training.BranchCollator(),
        train_dataset=Dataset.from_list([layout.as_dict() for layout in layouts]),
        processing_class=byte_tokenizer(),
    )
    trainer.train()
    found = losses(trainer)
    assert abs(found[0] - float(first)) < 1e-3 and found[-1] < 0.8 * found[0]


def test_the_model_is_told_to_be_ready(llama):
    """`describe` proves that keywords reach every attention layer: a model that drops them would train unmasked."""
    assert hf.describe(llama).num_layers == 3
    with pytest.raises(ValueError, match=r"attn_implementation=.*anabranch"):
        LAYOUT.logprobs(build("LlamaConfig", attn="eager"))
