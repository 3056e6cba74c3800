"""How the kernels use memory, counted by the host-side device: banks, sectors, bytes on their way."""

from __future__ import annotations

import os

import kit
import pytest
import torch
from triton_cases import random_case

FEW = "ANABRANCH_FEW_HEAD_DIMS" in os.environ.get("ANABRANCH_EMULATOR_DEFINES", "")
HEAD_DIMS = (32, 256) if FEW else (32, 64, 80, 96, 128, 192, 256)


def counted(device, dtype, head_dim, ring=4, **shape):
    """Of one launch on pages whose tokens of a head are contiguous, as a cache lays them out."""
    case = random_case(
        7, dtype=dtype, head_dim=head_dim, page_size=16, num_kv_heads=1,
        **dict(rows=6, segments=2, max_len=400, group=2, tile_rows=8) | shape,
    )  # fmt: skip
    device.configure(seed=1, landing="late")
    device.reset_statistics()
    kit.attention(device, case, ring=ring, grid=1)
    return device.statistics()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_copies_meet_all_banks_and_whole_sectors(device, head_dim, dtype):
    seen = counted(device, dtype, head_dim)
    assert seen["copy_instructions"] * 32 == seen["copies"] > 0
    assert seen["copy_wavefronts"] == 4 * seen["copy_instructions"]  # 512 bytes, 128 at a time
    assert seen["copy_sectors"] <= 16 * seen["copy_instructions"]  # 512 bytes, none of them fetched twice


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_matrices_are_read_without_bank_conflicts(device, head_dim):
    seen = counted(device, torch.bfloat16, head_dim)
    assert seen["ldmatrix_wavefronts"] == 4 * seen["ldmatrix"] > 0


@pytest.mark.parametrize("ring", range(2, 9))
def test_all_of_the_ring_but_one_tile_is_on_its_way(device, ring):
    seen = counted(device, torch.bfloat16, 32, ring, segments=1, max_len=900)
    tile = 64 * 32 * 2
    assert seen["most_in_flight"] >= (ring - 1) * tile
