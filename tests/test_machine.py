"""The model of GPUs: not whether it is right (no GPU has said so), but whether it hangs together."""

from __future__ import annotations

from dataclasses import replace

import pytest

from anabranch import machine

H100 = machine.GPUS["H100"]


def total(name="1,16,64 / 1024,256,32", gpu=H100, chunk=256, **options):
    nodes, tokens = machine.TREES[name]
    return machine.predict(machine.plan_for(gpu, nodes, tokens, chunk=chunk), gpu, **options)


@pytest.mark.parametrize("name", [n for n in machine.TREES if n != "no sharing 256 / 4096"])
def test_never_below_the_floor_and_faster_memory_never_hurts(name):
    slow, fast = total(name), total(name, replace(H100, memory_TB_s=2 * H100.memory_TB_s))
    assert slow.total_us > slow.floor_us > 0
    assert fast.attention_us <= slow.attention_us and slow.launches <= 2
    assert slow.total_us == pytest.approx(
        slow.attention_us + slow.merge_us + slow.launches * machine.LAUNCH_US["graph"]
    )


def test_what_bounds_what():
    assert total("one chain 1 / 32768").bound in ("bytes", "waiting", "balance")
    starved = replace(H100, bf16_TFLOP_s=1)
    assert total("1,1024 / 2048,32", starved).bound == "operations"
    assert total(mode="eager").total_us > total().total_us


def test_sharing_is_what_is_predicted_to_pay():
    """256 leaves of a shared prefix against the same leaves each with a prefix of its own."""
    shared = machine.plan_for(H100, (1, 64), (1024, 32))
    alone = machine.plan_for(H100, (64, 64), (1024, 32))
    assert machine.predict(alone, H100).attention_us > 3 * machine.predict(shared, H100).attention_us


def test_a_plan_of_nothing():
    from types import SimpleNamespace

    import torch

    empty = SimpleNamespace(
        items=torch.zeros(0, 8, dtype=torch.int32), dest=torch.zeros(0, dtype=torch.int32), num_partials=0, num_merge=0,
        num_rows=0, kv_tokens=0,
    )  # fmt: skip
    found = machine.predict(empty, H100)
    assert found.attention_us == 0 and found.launches == 0 and found.units == 0


def test_tables_of_a_regular_tree():
    tables = machine.block_tables((1, 2, 4), (16, 8, 8), page_size=8)
    assert tables.tolist() == [[0, 1, 2, 4], [0, 1, 2, 5], [0, 1, 3, 6], [0, 1, 3, 7]]


def test_the_command_says_that_nothing_was_measured(capsys):
    import json

    from anabranch.cli import bench
    from anabranch.cli.common import Mistake

    bench.predict(as_json=True, arguments=[])
    out = json.loads(capsys.readouterr().out)
    assert "not measured" in out["what"] and len(out["rows"]) == len(machine.TREES) * len(machine.GPUS)
    assert all(row["total_us"] > 0 and row["launches"] in (1, 2) for row in out["rows"])
    with pytest.raises(Mistake, match="--quick"):
        bench.predict(as_json=False, arguments=["--quick"])
