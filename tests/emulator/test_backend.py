"""backend="cuda" from the public functions down to the kernels, with the host-side device in the GPU's place."""

from __future__ import annotations

import pytest
import torch
from triton_cases import relative_error
from views_kit import grown

import anabranch as ab
from anabranch import backends
from anabranch.backends import cuda
from anabranch.errors import TopologyChanged
from anabranch.plan import planner, resident


@pytest.fixture
def emulated_backend(device, monkeypatch):
    """The backend's module is the emulator; "the GPU" is the CPU's memory."""
    device.configure(seed=1)
    monkeypatch.setattr(cuda, "_module", lambda: device)
    monkeypatch.setattr(cuda, "_on_device", lambda where: where.type == "cpu")
    monkeypatch.setattr(cuda, "_stream", lambda where: 0)
    caches = (cuda.unavailable, cuda._traits, cuda.tile_config, backends.unavailable)
    for cache in caches:
        cache.cache_clear()
    yield device
    for cache in caches:
        cache.cache_clear()


class Pair:
    """A cache whose kernels are the emulated ones; every step is checked against the reference in float64."""

    def __init__(self, dtype, **options):
        self.cache = ab.TreeCache(2, 2, 32, num_pages=40, page_size=8, dtype=dtype)
        self.cache._backend = cuda
        self.gen = torch.Generator().manual_seed(5)
        self.bound = 1e-5 if dtype == torch.float32 else 6e-3
        self.options = options

    def step(self, rows):
        s = self.cache.step(rows)
        for layer in range(2):
            q, k, v = (torch.randn(s.num_rows, h, 32, generator=self.gen).to(self.cache.dtype) for h in (6, 2, 2))
            self.cache.write(layer, k, v, s, backend="cuda")
            out, lse = ab.tree_attention(q, self.cache, layer, s, backend="cuda", return_lse=True, **self.options)
            want, want_lse = ab.tree_attention(
                q, self.cache, layer, s, backend="reference", return_lse=True, **self.options
            )
            assert relative_error(out, want) <= self.bound
            assert torch.allclose(lse, want_lse, atol=1e-4 if self.bound > 1e-5 else 1e-5)


@pytest.mark.parametrize("dtype,window", [(torch.float32, None), (torch.bfloat16, 20), (torch.float16, None)], ids=str)
def test_a_tree_grows_forks_and_joins(emulated_backend, dtype, window):
    pair = Pair(dtype, window=window)
    cache = pair.cache
    trunk = cache.branch()
    pair.step({trunk: 21})
    kids = cache.fork(trunk, 3)
    pair.step({kid: 1 for kid in kids})  # copies the shared tail page, all layers at once
    assert cache.usage().pages_copied == 3
    pair.step({kid: 1 for kid in kids})  # an advanced plan
    pair.step({kids[0]: 5, kids[2]: 1, trunk: 2})
    cache.join(trunk, kids)
    pair.step({trunk: 1})
    cache.check()


def test_launches_of_a_step(emulated_backend):
    """Three a layer at most: KV, items, merge; one for all copied pages."""
    pair = Pair(torch.bfloat16)
    trunk = pair.cache.branch()
    pair.step({trunk: 20})
    kids = pair.cache.fork(trunk, 2)
    emulated_backend.reset_statistics()
    pair.step({kid: 1 for kid in kids})
    assert emulated_backend.statistics()["launches"] <= 1 + 2 * 3


def test_own_pages(emulated_backend):
    gen = torch.Generator().manual_seed(2)
    k_pages, v_pages = (torch.randn(12, 4, 2, 32, generator=gen) for _ in range(2))
    tables = torch.tensor([[3, 5, 7], [3, 5, 1], [3, 2, -1]])
    plan = ab.Plan.from_block_tables(tables, [11, 9, 5], page_size=4, query_lengths=[2, 1, 1])
    q = torch.randn(4, 4, 32, generator=gen)
    sinks = torch.randn(4, generator=gen)
    options = dict(scale=0.3, softcap=4.0, sinks=sinks)
    out = ab.paged_tree_attention(q, k_pages, v_pages, plan, backend="cuda", **options)
    want = ab.paged_tree_attention(q, k_pages, v_pages, plan, backend="reference", **options)
    assert relative_error(out, want) <= 1e-5


def test_profile_and_info(emulated_backend):
    p = cuda.tile_config(8, 2, 32, torch.bfloat16, torch.device("cpu"))
    assert (p.tile, p.parallelism, p.narrow) == (64, 6, 0)
    assert cuda.info()["devices"][0]["arch"] == 90


def test_what_it_refuses(emulated_backend, monkeypatch):
    cpu = torch.device("cpu")
    assert cuda.refuses(cpu, torch.bfloat16, 128) is None
    assert "meta" in cuda.refuses(torch.device("meta"), torch.float32, 64)
    assert "float64" in cuda.refuses(cpu, torch.float64, 64)
    assert "257" in cuda.refuses(cpu, torch.float32, 264).replace("264", "257")
    assert "multiple of 8" in cuda.refuses(cpu, torch.bfloat16, 36)
    assert cuda.refuses(cpu, torch.float32, 36) is None
    monkeypatch.setattr(cuda, "_traits", lambda index: {"arch": 75, "multiprocessors": 40})
    assert "capability 8.0" in cuda.refuses(cpu, torch.float32, 64)
    monkeypatch.setattr(cuda, "_traits", lambda index: {"arch": 90, "multiprocessors": 132})
    monkeypatch.setattr(cuda, "_module", lambda: type("M", (), {"architectures": staticmethod(lambda: "100")}))
    assert 'ANABRANCH_CUDA_ARCHS="90"' in cuda.refuses(cpu, torch.float32, 64)


@pytest.mark.parametrize(
    "built,arch,runs",
    [
        ("80/86/90+PTX", 80, True), ("80/86/90+PTX", 89, True), ("80", 86, True), ("86", 80, False),
        ("80/90", 100, False), ("80/90+PTX", 100, True), ("90a", 90, True), ("90a", 100, False), ("100", 103, True),
        ("80/90+PTX", 86, True), ("the emulator", 80, True), ("90+PTX", 80, False), ("90a", 91, False),
        ("90a+PTX", 100, False),
    ],
)  # fmt: skip
def test_which_gpus_a_build_runs_on(built, arch, runs):
    assert cuda.runs_on(built, arch) is runs


def test_pages_that_cannot_be_copied_16_bytes_at_a_time(emulated_backend):
    pages = torch.randn(4, 4, 1, 40)[..., :32]
    plan = ab.Plan.from_block_tables(torch.tensor([[0]]), [3], page_size=4)
    odd = torch.randn(4 * 4 * 33 + 1)[1:].as_strided((4, 4, 1, 32), (132, 33, 33, 1))
    q = torch.randn(1, 1, 32)
    ab.paged_tree_attention(q, pages, pages, plan, backend="cuda")  # wide strides are fine
    with pytest.raises(ValueError, match="v_pages: the cuda backend copies 16 bytes at a time"):
        ab.paged_tree_attention(q, pages, odd, plan, backend="cuda")


def test_queries_of_any_strides(emulated_backend):
    gen = torch.Generator().manual_seed(2)
    pages = torch.randn(4, 4, 1, 32, generator=gen)
    plan = ab.Plan.from_block_tables(torch.tensor([[0, 1]]), [7], page_size=4)
    wide = torch.randn(1, 2, 37, generator=gen)
    out = cuda.attention(
        wide[..., 3:35], pages, pages, plan, scale=0.2, softcap=None, window=None, sinks=None, return_lse=False
    )[0]
    want = ab.paged_tree_attention(wide[..., 3:35].contiguous(), pages, pages, plan, scale=0.2, backend="reference")
    assert relative_error(out, want) <= 1e-5


def test_into_a_tensor_of_the_callers(emulated_backend):
    """In place; through a copy where it does not begin at a multiple of 16 bytes."""
    pages = torch.randn(4, 4, 1, 32)
    plan = ab.Plan.from_block_tables(torch.tensor([[0, 1], [0, 2]]), [7, 6], page_size=4)
    q = torch.randn(2, 2, 32)
    want = ab.paged_tree_attention(q, pages, pages, plan, backend="cuda")
    for offset in (0, 1, 4):
        around = torch.full((q.numel() + 8,), 77.0)
        out = around[offset : offset + q.numel()].view(q.shape)
        assert ab.paged_tree_attention(q, pages, pages, plan, backend="cuda", out=out) is out
        assert torch.equal(out, want) and (around == 77).sum() == 8


def test_without_the_module_or_a_gpu(monkeypatch):
    def missing():
        raise ImportError("no module named _cuda")

    for module, text in (
        (missing, "ANABRANCH_CUDA=1"),
        (lambda: type("M", (), {"device_count": staticmethod(lambda: -1)}), "update the driver"),
        (lambda: type("M", (), {"device_count": staticmethod(lambda: 0)}), "no NVIDIA GPU"),
    ):
        monkeypatch.setattr(cuda, "_module", module)
        cuda.unavailable.cache_clear()
        backends.unavailable.cache_clear()
        try:
            assert text in cuda.unavailable()
            with pytest.raises(ab.BackendUnavailable, match="backend 'cuda'"):
                backends.choose("cuda", torch.device("cpu"), torch.float32, 64)
        finally:
            cuda.unavailable.cache_clear()
            backends.unavailable.cache_clear()


def on_a_device(cache):
    """The cache keeps its plans as it does on a GPU: copied once a topology, advanced there."""
    cache.planner.on_host = False
    return cache


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "operators"])
def test_plans_advance_on_the_device(emulated_backend, monkeypatch, kernel):
    """A decode step with the tree unchanged: the same addresses and shapes, nothing uploaded, no plan built."""
    uploads = []
    split = resident.split_buffers
    monkeypatch.setattr(
        resident, "split_buffers", lambda result, *a, **k: uploads.append(result) or split(result, *a, **k)
    )
    cache = on_a_device(ab.TreeCache(1, 2, 32, num_pages=60, page_size=8))
    cache.planner.advance_kernel = cuda.advance if kernel else None
    group, tile_config = 3, cuda.tile_config(6, 2, 32, torch.float32, torch.device("cpu"))
    trunk = cache.branch()
    cache.step({trunk: 37})
    kids = cache.fork(trunk, 5)
    cache.step({kids[0]: 3})
    first = cache.step({kid: 1 for kid in kids}).plan.arrays(group, tile_config)
    addresses = {name: (x.data_ptr(), x.shape) for name, x in vars(first).items() if isinstance(x, torch.Tensor)}
    for _ in range(20):
        assert len(uploads) == 1
        step = cache.step({kid: 1 for kid in kids})
        arrays = step.plan.arrays(group, tile_config)
        assert arrays is first
        assert addresses == {n: (x.data_ptr(), x.shape) for n, x in vars(arrays).items() if isinstance(x, torch.Tensor)}
    # What the planner did on the host meanwhile, in its own buffers, is what happened here, to the last integer.
    for name, want in vars(split(uploads[0], torch.device("cpu"))).items():
        if name == "kv_spelled":  # its first entry is nobody's
            assert torch.equal(arrays.kv_spelled[1:], want[1:])
        elif isinstance(want, torch.Tensor) and name != "kv":
            assert torch.equal(getattr(arrays, name), want), name
    cache.fork(kids[1], 1)  # another topology: noticed, and uploaded
    changed = cache.step({kid: 1 for kid in kids}).plan.arrays(group, tile_config)
    assert changed is not first and len(uploads) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decoding_on_the_device(emulated_backend, dtype):
    pair = Pair(dtype)
    on_a_device(pair.cache)
    trunk = pair.cache.branch()
    pair.step({trunk: 13})
    kids = pair.cache.fork(trunk, 3)
    for _ in range(5):  # over a page's end
        pair.step({kid: 1 for kid in kids})
    pair.step({kids[0]: 1, kids[2]: 1})
    pair.cache.join(trunk, kids)
    for _ in range(3):
        pair.step({trunk: 1})


def test_a_topology_change_inside_a_capture(emulated_backend, monkeypatch):
    cache = on_a_device(ab.TreeCache(1, 2, 32, num_pages=60, page_size=8))
    tile_config = cuda.tile_config(6, 2, 32, torch.float32, torch.device("cpu"))
    trunk = cache.branch()
    cache.step({trunk: 5})
    kids = cache.fork(trunk, 2)
    cache.step({kid: 1 for kid in kids}).plan.arrays(3, tile_config)
    steady = cache.step({kid: 1 for kid in kids})
    assert steady.slots.shape == steady.position_ids.shape  # they are on the GPU now
    monkeypatch.setattr(planner, "capturing", lambda where: True)
    steady.plan.arrays(3, tile_config)  # the same topology: nothing to upload
    with pytest.raises(TopologyChanged, match="make and use steps outside the capture"):
        _ = cache.step({kid: 1 for kid in kids}).position_ids
    changed = cache.step({kids[0]: 1})
    with pytest.raises(RuntimeError, match="topology changed, which a captured CUDA graph cannot follow"):
        changed.plan.arrays(3, tile_config)


@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_rows_that_read_other_branches(emulated_backend, dtype, bound):
    """Under position offsets too: against scores of keys that are turned, in float64."""
    problem = grown(2, dim=32, dtype=dtype, page_size=8)
    problem.cache._backend = cuda

    def check(out, want, lse, want_lse):
        assert float((out.double() - want).norm() / want.norm()) <= bound
        assert torch.allclose(lse.double(), want_lse, atol=10 * bound)

    for _ in range(3):
        step, views = problem.grow(turning=True)
        problem.attend(step, views, "cuda", check, ["cuda"])
