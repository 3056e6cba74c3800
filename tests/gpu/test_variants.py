"""Every compiled variant runs on the GPU and agrees with float64, with contexts of some hundred tokens."""

from __future__ import annotations

import pytest
import torch

from triton_cases import check, dense, random_case, relative_error

pytest.importorskip("triton", reason="Triton is not installed (it has wheels for Linux only)")

from anabranch.kernels import configs, launch
from anabranch.kernels.variants import HEAD_DIMS

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ARCH = launch.device_traits(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")).arch
VARIANTS = [
    (head_dim, dtype, block_m)
    for dtype in DTYPES
    for head_dim in HEAD_DIMS
    for block_m in (16, 32, 64, 128)
    if block_m <= configs.max_block_m(head_dim, DTYPES[dtype].itemsize, ARCH)
]


def run(case, **options):
    options = dict(scale=0.2, softcap=None, window=None, sinks=None) | options
    return launch.attention(case.q, case.k_pages, case.v_pages, case.arrays, **options), options


@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
@pytest.mark.parametrize("head_dim,dtype,block_m", VARIANTS)
def test_variant(head_dim, dtype, block_m, everything):
    case = random_case(
        head_dim + block_m, rows=45, segments=9, max_len=700, tile_rows=block_m // 4, group=4, num_kv_heads=2,
        head_dim=head_dim, dtype=DTYPES[dtype], device="cuda",
    )  # fmt: skip
    options = {}
    if everything:
        sinks = torch.randn(8, generator=torch.Generator().manual_seed(1)).to("cuda", DTYPES[dtype])
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


def test_a_long_chain_of_partials():
    """One row over 40,000 tokens in some hundred and fifty chunks: the merge's long walk."""
    from types import SimpleNamespace

    import numpy as np

    case = random_case(6, rows=1, segments=1, max_len=2, head_dim=128, group=4, dtype=torch.bfloat16, device="cuda")
    tokens, chunk, page_size = 40_000, 256, 16
    gen = torch.Generator("cuda").manual_seed(0)
    shape = (tokens // page_size, page_size, 2, 128)
    case.k_pages, case.v_pages = (torch.randn(shape, generator=gen, device="cuda").bfloat16() for _ in range(2))
    order = np.random.default_rng(0).permutation(tokens).astype(np.int32)
    case.context = [(order, np.arange(tokens, dtype=np.int32))]
    starts = range(0, tokens, chunk)
    items = [[s, min(chunk, tokens - s), i, 1, 0, min(s + chunk, tokens) - 1, tokens, 0] for i, s in enumerate(starts)]

    def ints(values):
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    n = len(items)
    case.arrays = SimpleNamespace(
        items=ints(items), kv_slots=torch.from_numpy(order).cuda(), kv_positions=ints(list(range(tokens))),
        rows=ints([0] * n), limits=ints([0] * n), dest=ints(list(range(n))), row_positions=ints([tokens]),
        merge_rows=ints([0]), merge_ptr=ints([0, n]), num_items=n, num_partials=n, num_merge=1, tile_rows=32,
    )  # fmt: skip
    got, options = run(case, scale=0.5)
    check(case, got, **options)


def test_captured_graph_follows_the_device_counts():
    """One graph, captured at capacity, replayed while plans of other sizes are copied into its arrays."""
    cases = [
        random_case(
            70 + i,
            rows=12,
            segments=5,
            max_len=300,
            tile_rows=8,
            group=4,
            head_dim=64,
            dtype=torch.float16,
            device="cuda",
        )
        for i in range(3)
    ]
    names = ("items", "kv_slots", "kv_positions", "rows", "limits", "dest", "row_positions", "merge_rows", "merge_ptr")
    static = random_case(
        69, rows=12, segments=5, max_len=300, tile_rows=8, group=4, head_dim=64, dtype=torch.float16, device="cuda"
    )
    pages = max(case.k_pages.shape[0] for case in cases)
    static.k_pages, static.v_pages = (
        torch.zeros(pages, 16, 2, 64, dtype=torch.float16, device="cuda") for _ in range(2)
    )
    arrays = static.arrays
    for name in names:
        rows = max(getattr(case.arrays, name).shape[0] for case in cases)
        setattr(arrays, name, torch.zeros((rows, *getattr(arrays, name).shape[1:]), dtype=torch.int32, device="cuda"))
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
    run(static)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got, options = run(static)
    for case in [*cases, cases[0]]:
        load(case)
        graph.replay()
        check(case, got, **options)


def test_hostile_scores():
    case = random_case(8, rows=30, segments=6, max_len=300, magnitude=1e4, device="cuda")
    (out, _), options = run(case)
    assert torch.isfinite(out).all()
    assert relative_error(out, dense(case, **options)[0]) < 2e-2  # a float32 score of 1e4 is good to 1e-3


def test_copying_and_writing_many_pages():
    gen = torch.Generator("cuda").manual_seed(0)
    pool = torch.randn(16, 600, 4, 16, 128, generator=gen, device="cuda").bfloat16()  # planes, pages, heads, tokens, D
    want = pool.clone()
    src, dst = torch.arange(0, 250, dtype=torch.int32), torch.arange(300, 550, dtype=torch.int32)
    filled = torch.arange(250, dtype=torch.int32) % 16 + 1
    for s, d, n in zip(src.tolist(), dst.tolist(), filled.tolist(), strict=True):
        want[:, d, :, :n] = want[:, s, :, :n]
    launch.copy_pages(pool, src, dst, filled)
    assert torch.equal(pool, want)
    k_pages, v_pages = (pool[i].permute(0, 2, 1, 3) for i in (0, 1))
    slots = torch.randperm(600 * 16, generator=gen, device="cuda")[:5000].int()
    k, v = (torch.randn(5000, 4, 128, generator=gen, device="cuda").bfloat16() for _ in range(2))
    launch.write_kv(k, v, k_pages, v_pages, slots)
    for pages, rows in ((k_pages, k), (v_pages, v)):
        assert torch.equal(pages[slots // 16, slots % 16], rows)
    assert torch.equal(pool[2:], want[2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tree_on_the_gpu_and_its_twin_on_the_cpu(dtype):
    """The whole way: the same program on two caches, one on the GPU with Triton, one on the CPU with the reference."""
    import anabranch as ab

    gpu, cpu = (
        ab.TreeCache(2, 2, 128, num_pages=200, page_size=16, dtype=t, device=d)
        for d, t in (("cuda", dtype), ("cpu", torch.float32))
    )
    gen = torch.Generator().manual_seed(3)
    trunks = [c.branch() for c in (gpu, cpu)]

    def step(rows):  # [(gpu branch, cpu branch, n)]
        steps = [c.step({r[i]: r[2] for r in rows}) for i, c in enumerate((gpu, cpu))]
        for layer in range(2):
            q, k, v = (torch.randn(steps[0].num_rows, h, 128, generator=gen).to(dtype) for h in (8, 2, 2))
            gpu.write(layer, k.cuda(), v.cuda(), steps[0])
            cpu.write(layer, k.float(), v.float(), steps[1])
            out = ab.tree_attention(q.cuda(), gpu, layer, steps[0], window=150)
            want = ab.tree_attention(q.float(), cpu, layer, steps[1], window=150, backend="reference")
            assert relative_error(out, want) <= (1e-5 if dtype == torch.float32 else 6e-3)

    step([(*trunks, 333)])
    kids = list(zip(gpu.fork(trunks[0], 9), cpu.fork(trunks[1], 9), strict=True))
    step([(*kid, 1) for kid in kids])  # copies the shared tail page nine times
    step([(*kid, 1 + i * 7) for i, kid in enumerate(kids)])
    gpu.join(trunks[0], [kid[0] for kid in kids])
    cpu.join(trunks[1], [kid[1] for kid in kids])
    step([(*trunks, 3)])
    assert gpu.usage().tokens_physical == cpu.usage().tokens_physical
