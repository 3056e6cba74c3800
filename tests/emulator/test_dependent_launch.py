"""The merge begins beside the attention kernel (programmatic dependent launch) and waits itself for its partials."""

from __future__ import annotations

import kit
import pytest
import torch
from triton_cases import check, random_case


def test_the_merge_begins_beside_the_items(device):
    case = random_case(14, rows=9, segments=4, head_dim=32, dtype=torch.bfloat16)
    assert case.arrays.num_merge > 0
    found = []
    for index, beside in ((0, 1), (1, 0)):  # the second device is older: one launch after the other
        device.reset_statistics()
        got = kit.attention(device, case, index=index)
        check(case, got, **kit.NO_OPTIONS)
        assert device.statistics()["launches"] == 2 and device.statistics()["beside"] == beside
        found.append(got[0])
    assert torch.equal(*found)


def test_a_launch_beside_another_must_wait_for_it(device):
    """What the kernel before writes is not read, and nothing written, before it was waited for."""
    data = torch.zeros(640)
    device.register_memory(data.data_ptr(), data.numel() * 4, True, "data")
    device.probe("beside_waits", data.data_ptr(), 0, 3)
    assert data[:3].tolist() == [1, 1, 1] and data[128:131].tolist() == [2, 2, 2]
    for name in ("reads", "writes"):
        with pytest.raises(device.Trap, match="touches data before the launch before was waited for"):
            device.probe(f"beside_{name}", data.data_ptr(), 0, 3)
    with pytest.raises(device.Trap, match="ends without having waited"):
        device.probe("beside_ends", data.data_ptr(), 0, 3)
