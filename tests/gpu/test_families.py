"""Hugging Face families on the GPU: a fork/join program's logits equal a dense recomputation of every context."""

from __future__ import annotations

import pytest
import torch
from hf_kit import FAMILIES, Run, assert_close, build, program

import anabranch as ab

BOUND = 1e-4  # float32 matrix products of other shapes add up in another order


@pytest.fixture(autouse=True)
def exact_products():
    """No TF32: the tree run and its recomputation have other shapes, hence other rounding."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def small(family, attn):
    config_class, options = FAMILIES[family]
    model = build(config_class, attn=attn, **options)
    if family == "gpt-oss":  # experts one by one: a grouped product would round by what else is in the batch
        model.set_experts_implementation("eager")
    return model.cuda()


@pytest.mark.parametrize("family", FAMILIES)
def test_fork_join_program_equals_dense_recomputation(family):
    model, eager = (small(family, attn) for attn in ("anabranch", "eager"))
    for backend in ("triton", "cuda"):
        if ab.backends.unavailable(backend):
            assert backend == "cuda", ab.backends.unavailable(backend)  # CUDA C++ may not be built, Triton must run
            continue
        run = Run(model, backend, seed=1)
        program(run)
        assert_close(torch.cat(run.got), run.oracle.logits(eager), BOUND)
        run.cache.check()


def test_bfloat16_stays_near_its_float32_twin():
    model, eager = small("gemma2", "anabranch").bfloat16(), small("gemma2", "eager")
    run = Run(model, "auto", seed=2)
    program(run)
    got, want = torch.cat(run.got).float(), run.oracle.logits(eager)
    assert (got - want).norm() < 0.1 * want.norm()
