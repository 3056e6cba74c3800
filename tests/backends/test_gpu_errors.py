"""What goes wrong around GPUs, with stand-ins for them: every refusal names the reason and the remedy."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch

import anabranch as ab
from anabranch import backends
from anabranch.backends import cuda, registry
from anabranch.plan import plan
from anabranch.plan.tile_config import TileConfig

GPU = torch.device("cuda", 0)


def forget():
    for cached in (cuda.unavailable, cuda._traits, cuda.tile_config, registry.unavailable, registry._auto):
        cached.cache_clear()


@pytest.fixture
def driver(monkeypatch):
    """``driver(arch, built, count)``: the CUDA module sees such a GPU, or none (0), or has no usable driver (−1)."""

    def pretend(arch=90, built="80/90+PTX", count=1):
        module = SimpleNamespace(
            device_count=lambda: count,
            device=lambda index: {"arch": arch, "multiprocessors": 100},
            architectures=lambda: built,
            packed_rows=lambda kind, head_dim: 64,
        )
        monkeypatch.setattr(cuda, "_module", lambda: module)
        forget()

    yield pretend
    forget()


@pytest.mark.parametrize(
    "arch,built,message",
    [
        (75, "80/90+PTX", r"needs compute capability 8\.0 or later, cuda:0 has 7\.5; use backend='reference'"),
        (100, "80/90", r'kernels for 80/90 and cuda:0 is sm_100; rebuild with ANABRANCH_CUDA_ARCHS="100".*triton'),
        (90, "100", r'ANABRANCH_CUDA_ARCHS="90"'),
    ],
    ids=["older than sm_80", "newer than the build", "older than the build"],
)
def test_a_gpu_that_these_kernels_cannot_run_on(driver, arch, built, message):
    driver(arch, built)
    with pytest.raises(ValueError, match=message):
        backends.choose("cuda", GPU, torch.bfloat16, 128)
    driver(90, "80/90+PTX")
    assert backends.choose("cuda", GPU, torch.bfloat16, 128) is cuda


@pytest.mark.parametrize(
    "count,message", [(-1, "driver is too old.*update the driver.*'triton'"), (0, "no NVIDIA GPU is visible.*'cpu'")]
)
def test_a_driver_that_is_too_old_or_no_gpu(driver, count, message):
    driver(count=count)
    with pytest.raises(ab.BackendUnavailable, match=f"backend 'cuda': .*{message}"):
        backends.choose("cuda", GPU, torch.bfloat16, 128)


def test_triton_without_a_device_names_the_driver_too(monkeypatch):
    triton = pytest.importorskip("anabranch.backends.triton")
    pytest.importorskip("triton")
    from anabranch.kernels import launch

    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "driver is too old" in triton.unavailable.__wrapped__()


def test_an_old_gpu_falls_back_to_the_reference_and_says_so_once(driver, monkeypatch):
    pytest.importorskip("triton")
    from anabranch.kernels import launch

    driver()
    monkeypatch.setattr(launch, "device_traits", lambda device: launch.Device(75 if device.index == 0 else 90, 40))
    with pytest.warns(UserWarning, match=r"falls back to the reference backend \(triton: .*8\.0 or later, cuda:0"):
        assert backends.choose("auto", GPU, torch.float16, 64).name == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose("auto", GPU, torch.float16, 64).name == "reference"
        # Another GPU of the same machine is judged by itself.
        assert backends.choose("auto", torch.device("cuda", 1), torch.float16, 64).name == "triton"


def test_tensors_on_two_devices():
    pages = torch.randn(4, 4, 2, 32)
    made = ab.Plan.from_block_tables(torch.tensor([[0, 1]]), [7], page_size=4)
    q, sinks = torch.randn(1, 4, 32), torch.zeros(4)
    calls = {
        "q: expected device cpu like the pages, got meta": lambda: (q.to("meta"), pages, pages, None),
        "v_pages: expected .* on cpu like k_pages, got .* on meta": lambda: (q, pages, pages.to("meta"), None),
        "v_pages: expected .* on meta like k_pages, got .* on cpu": lambda: (q, pages.to("meta"), pages, None),
        "sinks: expected device cpu like q, got meta": lambda: (q, pages, pages, sinks.to("meta")),
    }
    for message, arguments in calls.items():
        q_, k_, v_, sinks_ = arguments()
        with pytest.raises(ValueError, match=message):
            ab.paged_tree_attention(q_, k_, v_, made, sinks=sinks_)


def test_pools_past_32_bits():
    """Elements may be more than 2^31 (the kernels' tests have such a pool); slots may not, and that is said at once."""
    with pytest.raises(ValueError, match=r"num_pages: 134217728 pages × 16 tokens exceed 2\^31 − 1 slots; take fewer"):
        ab.TreeCache(1, 1, 32, num_pages=2**27, page_size=16)
    for page in (2**27, -1):
        with pytest.raises(ValueError, match=rf"block_tables\[0, 1\]: page {page}.*from 0 to 134217726, since slots"):
            ab.Plan.from_block_tables(torch.tensor([[0, page]]), [20], page_size=16)


def test_a_plan_that_a_capture_would_have_to_upload(monkeypatch):
    made = ab.Plan.from_block_tables(torch.tensor([[0, 1]]), [7], page_size=4)
    tile_config = TileConfig(tile=64, chunk=256, parallelism=4, num_kv_heads=2, elem_size=2)
    known = made.arrays(2, tile_config)
    monkeypatch.setattr(plan, "capturing", lambda device: True)
    assert made.arrays(2, tile_config) is known  # what is there already is captured as it is
    with pytest.raises(RuntimeError, match=r"plan: it is not on the GPU yet.*run one call with this plan before"):
        made.arrays(4, tile_config)
