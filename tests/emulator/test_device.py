"""The host-side device itself: what it computes, and what it must not let pass."""

from __future__ import annotations

import math

import kit
import pytest
import torch


def probe(device, name, data, n=0, grid=1):
    device.forget_memory()
    device.register_memory(data.data_ptr(), data.numel() * 4, True, "data")
    device.probe(name, data.data_ptr(), n, grid)
    return data


def zeros(n=640):
    return torch.zeros(n)


@pytest.mark.parametrize("name,access", [("store_at", "write"), ("load_at", "read")])
@pytest.mark.parametrize("n", [-1, 640, 10**6])
def test_an_access_out_of_range_traps_with_thread_and_address(device, name, access, n):
    data = zeros()
    with pytest.raises(
        device.Trap, match=rf"block 0, thread 5: {access} of 4 bytes at 0x\w+ is outside every alloc"
    ) as e:
        probe(device, name, data, n)
    assert f"{data.data_ptr() + 4 * n:#x}" in str(e.value)
    probe(device, name, data, 639)  # the device goes on after a trap


def test_shared_memory_has_an_end(device):
    probe(device, "shared_at", zeros(), 511)
    with pytest.raises(device.Trap, match="thread 5: write of 4 bytes"):
        probe(device, "shared_at", zeros(), 512)


def test_what_may_not_be_written(device):
    data = zeros()
    device.register_memory(data.data_ptr(), data.numel() * 4, False, "keys")
    with pytest.raises(device.Trap, match="changes keys, which is read only"):
        device.probe("store_at", data.data_ptr(), 3)


def test_misaligned_vectors(device):
    with pytest.raises(device.Trap, match="not aligned to 16"):
        probe(device, "misaligned", zeros())


def test_unwritten_shared_memory_is_nan(device):
    assert math.isnan(probe(device, "unwritten", zeros())[0])


def test_threads_run_in_an_order_drawn_from_the_seed(device):
    last = []
    for seed in range(12):
        device.configure(**kit.settings(seed))
        last.append(float(probe(device, "order", zeros())[0]))
    assert len(set(last)) > 5
    device.configure(**kit.settings(3))
    assert float(probe(device, "order", zeros())[0]) == last[3]


def test_a_missing_barrier_shows_in_some_order(device):
    want = (torch.arange(128) % 32).float()
    wrong = 0
    for seed in range(12):
        device.configure(**kit.settings(seed))
        assert torch.equal(probe(device, "handed_over", zeros())[:128], want)
        wrong += not torch.equal(probe(device, "handed_over_without_barrier", zeros())[:128], want)
        device.configure(**kit.settings(seed), planted=device.SITES["tile_visible"])
        probe(device, "handed_over", zeros())  # the barrier is skipped by all, so nobody is left behind
    assert wrong >= 6


def test_a_missing_wait_shows_where_copies_land_late(device):
    for seed in range(12):
        device.configure(**kit.settings(seed))
        data = zeros(640)
        data[:4] = torch.arange(4) + 1.0
        assert probe(device, "copied", data)[4:8].tolist() == [1, 2, 3, 4]
        got = probe(device, "copied_without_wait", data)[4:8]
        if kit.settings(seed)["landing"] == "at_once":
            assert got.tolist() == [1, 2, 3, 4]
        if kit.settings(seed)["landing"] == "late":
            assert torch.isnan(got).all()


def test_a_wait_leaves_the_latest_groups_on_their_way(device):
    data = zeros() + 7
    device.configure(landing="late")
    got = probe(device, "groups", data)
    assert got[8] == 7 and math.isnan(got[9]) and got[10] == 0  # the second copied nothing: zeros


def test_copies_that_nobody_waits_for(device):
    device.configure(landing="late")
    with pytest.raises(device.Trap, match="never waited for"):
        probe(device, "never_waits", zeros())


def test_threads_that_do_not_meet(device):
    barrier = device.SITES["tile_visible"]
    with pytest.raises(device.Trap, match=rf"at barrier {barrier}; thread 3 has ended"):
        probe(device, "lost_thread", zeros())
    with pytest.raises(device.Trap, match=r"is at barrier \d+ while thread \d+ is at barrier"):
        probe(device, "two_barriers", zeros())
    with pytest.raises(device.Trap, match=r"shuffle|any"):
        probe(device, "split_warp", zeros())


def test_collectives(device):
    got = probe(device, "collectives", zeros(), 40)
    assert got[:128].tolist() == [sum(range(w * 32, w * 32 + 32)) for w in range(4) for _ in range(32)]
    assert got[128:256].tolist() == [float(t // 32 == 1) for t in range(128)]
    assert got[256:384].tolist() == [t // 32 * 32 + (t + 1) % 32 for t in range(128)]


@pytest.mark.parametrize("name", ["multiply_bf16", "multiply_f16", "multiply_trans_bf16"])
def test_mma_and_ldmatrix(device, name):
    dtype = torch.float16 if "f16" in name and "bf16" not in name else torch.bfloat16
    gen = torch.Generator().manual_seed(1)
    data = torch.randn(640, generator=gen)
    data[:8] = torch.tensor(
        [0.0, -0.0, 1e-7, -6e-8, 6e-5, 70000.0, 1.0 + 2**-9, 1.0 + 3 * 2**-9]
    )  # roundings, subnormals
    data[5] = 65000.0
    a, b = data[:256].reshape(16, 16).to(dtype).double(), data[256:384].to(dtype).double()
    b = b.reshape(16, 8) if "trans" in name else b.reshape(8, 16).T
    want = a @ b + 1
    got = probe(device, name, data.clone())[384:512].reshape(16, 8).double()
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_statistics(device):
    probe(device, "multiply_bf16", zeros(), grid=3)
    counted = device.statistics()
    assert counted["launches"] == 1 and counted["blocks"] == 3 and counted["mma"] == 3
