"""The CUDA C++ kernels on a GPU: what tests/emulator runs on the host-side device, at a GPU's sizes."""

from __future__ import annotations

import kernel_bodies as bodies
import pytest
import torch
from triton_cases import relative_error

import anabranch as ab
from anabranch import backends
from anabranch.backends import cuda

pytestmark = pytest.mark.skipif(
    backends.unavailable("cuda") is not None, reason=f"cuda backend: {backends.unavailable('cuda')}"
)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
HEAD_DIMS = (32, 64, 80, 96, 128, 192, 256, 72, 8)


def run(case, **options):
    options = dict(scale=0.2, softcap=None, window=None, sinks=None) | options
    return cuda.run(case.q, case.k_pages, case.v_pages, case.arrays, **options), options


@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_variant(head_dim, dtype, everything):
    for tile_rows in (1, 5, 16):
        bodies.variant(run, head_dim + tile_rows, head_dim, dtype, tile_rows, everything)


@pytest.mark.parametrize("group", bodies.GROUPS)
def test_groups(group):
    bodies.group_size(run, group)


def test_same_bits_in_fifty_runs():
    bodies.same_bits_in_fifty_runs(run)


def test_captured_graph_follows_the_device_counts():
    bodies.captured_graph_follows_the_device_counts(run)


def test_copying_and_writing_many_pages():
    bodies.copying_and_writing_many_pages(cuda.copy_pages, cuda.write_kv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tree_on_the_gpu_and_its_twin_on_the_cpu(dtype):
    bodies.a_tree_and_its_twin_on_the_cpu(dtype, "cuda")


def test_a_decode_step_is_one_replay():
    """Attention and the plan's own advance in one captured graph; only slots and positions come from the host."""
    cache = ab.TreeCache(1, 2, 64, num_pages=200, page_size=16, dtype=torch.bfloat16, device="cuda")
    gen = torch.Generator("cuda").manual_seed(1)
    trunk = cache.branch()

    def fresh(step):
        k, v = (torch.randn(step.num_rows, 2, 64, generator=gen, device="cuda").bfloat16() for _ in range(2))
        cache.write(0, k, v, step, backend="cuda")

    fresh(cache.step({trunk: 300}))
    kids = cache.fork(trunk, 6)
    tile_config = cuda.tile_config(8, 2, 64, torch.bfloat16, cache.device)
    for _ in range(2):
        step = cache.step({kid: 1 for kid in kids})
        fresh(step)
        arrays = step.plan.arrays(4, tile_config)
    kept = cache.planner.resident((4, tile_config))
    q = torch.randn(6, 8, 64, generator=gen, device="cuda").bfloat16()
    slots, positions = step.slots.clone(), step.position_ids.clone()
    state = {name: x.clone() for name, x in vars(arrays).items() if isinstance(x, torch.Tensor)}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept.advance(slots, positions, cuda.advance)
        out, _ = cuda.run(
            q, cache.k_pages(0), cache.v_pages(0), arrays, scale=0.125, softcap=None, window=None, sinks=None
        )
    for name, x in state.items():  # capturing runs nothing
        assert torch.equal(getattr(arrays, name), x)
    real = kept.advance
    kept.advance = lambda *_: None  # the graph does it
    for _ in range(10):
        step = cache.step({kid: 1 for kid in kids})
        fresh(step)
        slots.copy_(step.slots)
        positions.copy_(step.position_ids)
        assert step.plan.arrays(4, tile_config) is arrays, "the topology did not change"
        graph.replay()
        want = ab.tree_attention(q, cache, 0, step, scale=0.125, backend="reference")
        assert relative_error(out, want.cpu()) <= 6e-3
    kept.advance = real
