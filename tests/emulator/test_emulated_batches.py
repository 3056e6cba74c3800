"""The CUDA kernels on mixed batches at random: the whole way from block tables through the planner to the kernels."""

from __future__ import annotations

import random

import pytest
import torch
from plan_kit import GROUPS, KNOWN, check_attention, random_batch
from test_backend import emulated_backend  # noqa: F401  (a fixture)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("batch", KNOWN.values(), ids=KNOWN)
def test_known_batches(emulated_backend, batch):  # noqa: F811
    for window in (None, 5):
        check_attention(batch, random.Random(0), "cuda", torch.float32, (1, 8, 32), {"scale": 0.3, "window": window})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_batches(emulated_backend, dtype):  # noqa: F811
    for seed in range(20):
        r = random.Random(f"{seed} {dtype}")
        batch = random_batch(r, max_tokens=80)
        try:
            check_attention(batch, r, "cuda", dtype, (r.choice((1, 2)), r.choice(GROUPS), r.choice((32, 64))))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {batch}") from error
