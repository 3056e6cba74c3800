"""Prefill, chunks and decode over shared pages in one plan, on the GPU: the batches of tests/test_plan_fuzz.py."""

from __future__ import annotations

import random

import pytest
import torch
from plan_kit import GROUPS, KNOWN, check_attention, random_batch

from anabranch import backends

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    if reason := backends.unavailable(request.param):
        pytest.skip(reason)
    return request.param


@pytest.mark.parametrize("batch", KNOWN.values(), ids=KNOWN)
def test_known_batches(backend, batch):
    check_attention(
        batch, random.Random(0), backend, torch.float32, (1, 8, 32), {"scale": 0.3, "window": 5}, device="cuda"
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_batches(backend, dtype):
    for seed in range(60):
        r = random.Random(f"{seed} {dtype}")
        batch = random_batch(r)
        group = r.choice(GROUPS) if backend == "cuda" else 8  # Triton compiles for each tile
        try:
            check_attention(batch, r, backend, dtype, (2, group, 64), device="cuda")
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, group {group}: {batch}") from error
