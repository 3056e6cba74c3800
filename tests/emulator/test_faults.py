"""Every barrier and wait of the kernels is needed: taken away one by one, some seed shows it."""

from __future__ import annotations

import kit
import pytest
import torch
from triton_cases import random_case

SEEDS = 18  # each landing and schedule three times
SITES = [
    "window_reduced", "places_visible", "queries_landed", "queries_visible", "tile_landed", "tile_visible",
    "ring_done", "results_visible", "ahead_landed", "ahead_visible", "launch_before",
]  # fmt: skip
VARIANTS = {
    "bf16": dict(dtype=torch.bfloat16, head_dim=32),
    "bf16-wide": dict(dtype=torch.bfloat16, head_dim=192),  # queries stay in shared memory
    "float32": dict(dtype=torch.float32, head_dim=32),
}


def case_of(variant):
    return random_case(
        6, rows=9, segments=2, max_len=300, tile_rows=8, group=2, num_kv_heads=1, **VARIANTS[variant]
    )  # fmt: skip


def compute(device, case, seed, site=None):
    device.configure(**kit.settings(seed), planted=device.SITES[site] if site else 0)
    return kit.attention(device, case, ring=2 + seed % 3, grid=2, window=180)


def test_the_sites_are_all_there(device):
    assert set(device.SITES) == set(SITES)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_is_needed(device, variant):
    case = case_of(variant)
    want, want_lse = compute(device, case, 0)
    passed = device.statistics()["sites"]
    unnoticed = []
    for site, number in device.SITES.items():
        if variant != "bf16" and site.startswith("queries"):
            assert passed[number] == 0, "queries that stay where they are need no wait of their own"
            continue
        assert passed[number] > 0, f"{site} was never passed"
        for seed in range(SEEDS):
            try:
                out, lse = compute(device, case, seed, site)
            except device.Trap:
                break
            if not (torch.equal(out, want) and torch.equal(lse, want_lse)):
                break
        else:
            unnoticed.append(site)
    assert unnoticed == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_with_all_of_them_no_seed_differs(device, variant):
    case = case_of(variant)
    want = compute(device, case, 0)
    for seed in range(1, 7):
        assert all(torch.equal(a, b) for a, b in zip(compute(device, case, seed), want, strict=True)), seed
