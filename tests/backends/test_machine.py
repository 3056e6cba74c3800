"""The model of GPUs: not whether it is right (no GPU has said so), but whether it hangs together."""

from __future__ import annotations

from dataclasses import replace

import pytest

from anabranch.backends import cost_model as machine

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


@pytest.mark.parametrize(
    "name,memory",
    [
        ("NVIDIA H100 80GB HBM3", 3.35), ("NVIDIA H100 PCIe", 2.0), ("NVIDIA H100 NVL", 3.9), ("NVIDIA H200", 4.8),
        ("NVIDIA A100-SXM4-40GB", 1.555), ("NVIDIA A100-SXM4-80GB", 2.04), ("NVIDIA B200", 8.0),
        ("NVIDIA GeForce RTX 4090", None), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("AMD Instinct MI300X", None),
    ],
)  # fmt: skip
def test_gpus_are_known_by_the_name_that_the_driver_gives(name, memory):
    gpu = machine.gpu_of(name, 77)
    assert (gpu and (gpu.memory_TB_s, gpu.multiprocessors)) == (memory and (memory, 77))


def test_the_cut_is_the_cheapest_of_those_weighed():
    """Among the reference trees no other chunk and split has a smaller mean of predicted time ÷ floor."""
    chosen = machine.choose(H100)

    def cost(chunk, waves):
        tile_config = machine.TileConfig(64, chunk, waves * H100.multiprocessors, 8, 2)
        ratio = 1.0
        for plan in machine._reference_plans():
            found = machine.predict(plan.arrays(4, tile_config), H100)
            ratio *= found.total_us / found.floor_us
        return ratio

    costs = {(c, w * H100.multiprocessors): cost(c, w) for c in machine.CHUNKS for w in machine.WAVES}
    assert costs[chosen.chunk, chosen.parallelism] <= min(costs.values()) * (1 + 1e-5)
    assert max(costs.values()) > min(costs.values()) * 1.01, "nothing to choose"


def test_the_choice_follows_the_machine(monkeypatch):
    """Where every unit waits long before it streams, fewer and longer ones are better."""
    before = machine.choose.__wrapped__(H100)
    monkeypatch.setattr(machine, "LATENCY_US", 30.0)
    slow = machine.choose.__wrapped__(H100)
    assert slow.chunk >= before.chunk and slow != before


def test_backends_take_the_cut_of_their_device(monkeypatch):
    import torch

    triton = pytest.importorskip("anabranch.backends.triton")
    pytest.importorskip("triton")
    from anabranch.kernels import launch

    device = torch.device("cuda", 0)
    monkeypatch.setattr(launch, "device_traits", lambda where: launch.Device(90, 114))
    made = {}
    for name in ("NVIDIA H100 PCIe", "Some GPU"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda where, name=name: name)
        triton.tile_config.cache_clear()
        made[name] = triton.tile_config(32, 8, 128, torch.bfloat16, device)
        assert triton.tile_config(32, 8, 128, torch.bfloat16, device) is made[name]
        assert triton.tile_config(32, 8, 128, torch.bfloat16, device, chunk=48).chunk == 48  # what is asked for wins
        with pytest.raises(ValueError, match="chunk: must be at least 1 token"):
            triton.tile_config(32, 8, 128, torch.bfloat16, device, chunk=0)
    triton.tile_config.cache_clear()
    known = machine.choose(machine.gpu_of("NVIDIA H100 PCIe", 114), tile=64)
    assert (made["NVIDIA H100 PCIe"].chunk, made["NVIDIA H100 PCIe"].parallelism) == (known.chunk, known.parallelism)
    assert (made["Some GPU"].chunk, made["Some GPU"].parallelism) == (machine.DEFAULT_CHUNK, 2 * 114)


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
