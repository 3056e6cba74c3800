"""The CUDA C++ kernels on a GPU: what tests/emulator runs on the host-side device, at a GPU's sizes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import anabranch as ab
from anabranch import backends
from anabranch.backends import cuda
from triton_cases import check, random_case, relative_error

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
        case = random_case(
            head_dim + tile_rows, rows=45, segments=9, max_len=700, tile_rows=tile_rows, group=4, num_kv_heads=2,
            head_dim=head_dim, dtype=dtype, device="cuda",
        )  # fmt: skip
        options = {}
        if everything:
            sinks = torch.randn(8, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
            options = dict(softcap=3.0, window=400, sinks=sinks)
        got, options = run(case, **options)
        check(case, got, **options)


@pytest.mark.parametrize("group", [1, 3, 7, 20, 71])
def test_groups(group):
    case = random_case(
        group, rows=20, segments=6, max_len=400, tile_rows=max(1, 64 // group), group=group, num_kv_heads=2,
        head_dim=128, dtype=torch.bfloat16, device="cuda",
    )  # fmt: skip
    got, options = run(case)
    check(case, got, **options)


def test_same_bits_in_fifty_runs():
    case = random_case(
        5, rows=200, segments=40, max_len=500, tile_rows=16, group=4, dtype=torch.bfloat16, device="cuda"
    )
    (out, lse), _ = run(case, window=300)
    for _ in range(50):
        again, _ = run(case, window=300)
        assert torch.equal(again[0], out) and torch.equal(again[1], lse)


def test_captured_graph_follows_the_device_counts():
    """One graph, captured at capacity, replayed while plans of other sizes are copied into its arrays."""
    shape = dict(
        rows=12, segments=5, max_len=300, tile_rows=8, group=4, head_dim=64, dtype=torch.float16, device="cuda"
    )
    cases = [random_case(70 + i, **shape) for i in range(3)]
    names = ("items", "kv_slots", "kv_positions", "rows", "limits", "dest", "row_positions", "merge_rows", "merge_ptr")
    static = random_case(69, **shape)
    pages = max(case.k_pages.shape[0] for case in cases)
    static.k_pages, static.v_pages = (
        torch.zeros(pages, 16, 2, 64, dtype=torch.float16, device="cuda") for _ in range(2)
    )
    arrays = static.arrays = SimpleNamespace(**vars(static.arrays))
    for name in names:
        most = max(getattr(case.arrays, name).shape[0] for case in cases)
        setattr(arrays, name, torch.zeros((most, *getattr(arrays, name).shape[1:]), dtype=torch.int32, device="cuda"))
    for name in ("num_items", "num_partials", "num_merge"):
        setattr(arrays, name, max(getattr(case.arrays, name) for case in cases))
    arrays.counts = torch.zeros(3, dtype=torch.int32, device="cuda")

    def load(case):
        a = case.arrays
        for name in names:
            source = getattr(a, name)
            getattr(arrays, name)[: source.shape[0]] = source
        arrays.counts.copy_(torch.tensor([a.num_items, a.num_partials, a.num_merge], dtype=torch.int32))
        static.q.copy_(case.q)
        for mine, theirs in ((static.k_pages, case.k_pages), (static.v_pages, case.v_pages)):
            mine[: theirs.shape[0]] = theirs

    load(cases[0])
    run(static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got, options = run(static)
    for case in [*cases, cases[0]]:
        load(case)
        graph.replay()
        check(case, got, **options)


def test_copying_and_writing_many_pages():
    gen = torch.Generator("cuda").manual_seed(0)
    pool = torch.randn(16, 600, 4, 16, 128, generator=gen, device="cuda").bfloat16()  # planes, pages, heads, tokens, D
    want = pool.clone()
    src, dst = torch.arange(0, 250, dtype=torch.int32), torch.arange(300, 550, dtype=torch.int32)
    filled = torch.arange(250, dtype=torch.int32) % 16 + 1
    for s, d, n in zip(src.tolist(), dst.tolist(), filled.tolist(), strict=True):
        want[:, d, :, :n] = want[:, s, :, :n]
    cuda.copy_pages(pool, src, dst, filled)
    assert torch.equal(pool, want)
    k_pages, v_pages = (pool[i].permute(0, 2, 1, 3) for i in (0, 1))
    slots = torch.randperm(600 * 16, generator=gen, device="cuda")[:5000].int()
    k, v = (torch.randn(5000, 4, 128, generator=gen, device="cuda").bfloat16() for _ in range(2))
    cuda.write_kv(k, v, k_pages, v_pages, slots)
    for pages, rows in ((k_pages, k), (v_pages, v)):
        assert torch.equal(pages[slots // 16, slots % 16], rows)
    assert torch.equal(pool[2:], want[2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tree_on_the_gpu_and_its_twin_on_the_cpu(dtype):
    """The whole way: the same program on two caches, one on the GPU, one on the CPU with the reference."""
    gpu, cpu = (
        ab.TreeCache(2, 2, 128, num_pages=200, page_size=16, dtype=t, device=d)
        for d, t in (("cuda", dtype), ("cpu", torch.float32))
    )
    gpu._backend = cuda
    gen = torch.Generator().manual_seed(3)
    trunks = [c.branch() for c in (gpu, cpu)]

    def step(rows):  # [(gpu branch, cpu branch, n)]
        steps = [c.step({r[i]: r[2] for r in rows}) for i, c in enumerate((gpu, cpu))]
        for layer in range(2):
            q, k, v = (torch.randn(steps[0].num_rows, h, 128, generator=gen).to(dtype) for h in (8, 2, 2))
            gpu.write(layer, k.cuda(), v.cuda(), steps[0], backend="cuda")
            cpu.write(layer, k.float(), v.float(), steps[1])
            out = ab.tree_attention(q.cuda(), gpu, layer, steps[0], window=150, backend="cuda")
            want = ab.tree_attention(q.float(), cpu, layer, steps[1], window=150, backend="reference")
            assert relative_error(out, want) <= (1e-5 if dtype == torch.float32 else 6e-3)

    step([(*trunks, 333)])
    kids = list(zip(gpu.fork(trunks[0], 9), cpu.fork(trunks[1], 9), strict=True))
    step([(*kid, 1) for kid in kids])  # copies the shared tail page nine times
    for _ in range(20):  # plans that advance on the device
        step([(*kid, 1) for kid in kids])
    step([(*kid, 1 + i * 7) for i, kid in enumerate(kids)])
    gpu.join(trunks[0], [kid[0] for kid in kids])
    cpu.join(trunks[1], [kid[1] for kid in kids])
    step([(*trunks, 3)])


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
    profile = cuda.profile(8, 2, 64, torch.bfloat16, cache.device)
    for _ in range(2):
        step = cache.step({kid: 1 for kid in kids})
        fresh(step)
        arrays = step.plan.arrays(4, profile)
    kept = cache._resident[(4, profile)]
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
        assert step.plan.arrays(4, profile) is arrays, "the topology did not change"
        graph.replay()
        want = ab.tree_attention(q, cache, 0, step, scale=0.125, backend="reference")
        assert relative_error(out, want.cpu()) <= 6e-3
    kept.advance = real
