"""Page pools of more than 2³² elements on the CPU: KV writes, page copies and attention, where nothing but the pages in
use takes memory. An offset kept in 32 bits, of elements or of bytes, would land in other mapped memory and show."""

from __future__ import annotations

import mmap
import sys

import pytest
import torch
from plan_kit import BOUNDS, Batch, dense

import anabranch as ab
from anabranch.backends import cpu

_cpu = pytest.importorskip("anabranch._cpu", reason="the cpu backend is not built")

HEADS, DIM, PAGE = 2, 128, 64
TOKEN = HEADS * DIM  # elements of a slot in a page
MARGIN = 2**31  # elements mapped before a pool and behind it: a truncated offset is a signed 32-bit number at worst
NEAR, MIDDLE, FAR = 1, 2**31 // (PAGE * TOKEN) + 3, 2**32 // (PAGE * TOKEN) + 5  # pages
PAGES = FAR + 2


def mapped(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros of the system, none of which has memory before it is written to; the margins are cut off."""
    if not sys.platform.startswith("linux"):
        pytest.skip("needs Linux's mappings without a reservation")
    no_reserve = 0x4000  # mmap.MAP_NORESERVE, which Python's module names since 3.13
    try:
        memory = mmap.mmap(
            -1, (elements + 2 * MARGIN) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
        )
    except OSError as error:
        pytest.skip(f"the system does not map so much at once: {error}")
    return torch.frombuffer(memory, dtype=dtype)[MARGIN : MARGIN + elements]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=["tokens", "heads"])
def pools(request: pytest.FixtureRequest, dtype: torch.dtype) -> list[torch.Tensor]:
    """K and V [pages, page_size, heads, head_dim], in a user's layout or in TreeCache's."""
    pools = [mapped(PAGES * PAGE * TOKEN, dtype) for _ in range(2)]
    if request.param == "tokens":
        return [pool.view(PAGES, PAGE, HEADS, DIM) for pool in pools]
    return [pool.view(PAGES, HEADS, PAGE, DIM).transpose(1, 2) for pool in pools]


def test_writes(pools: list[torch.Tensor], dtype: torch.dtype, rng: torch.Generator) -> None:
    slots = torch.tensor([page * PAGE + i for page in (FAR, NEAR, MIDDLE, PAGES - 1) for i in (0, 5, PAGE - 1)])
    k, v = (torch.randn(len(slots), HEADS, DIM, generator=rng).to(dtype) for _ in range(2))
    cpu.write_kv(k, v, *pools, slots.int())
    for new, pool in ((k, pools[0]), (v, pools[1])):
        assert torch.equal(pool[slots // PAGE, slots % PAGE], new)


def test_attention(pools: list[torch.Tensor], dtype: torch.dtype, rng: torch.Generator) -> None:
    """Items of many rows and of few, which different kernels take, in each instruction set."""
    batch = Batch(PAGE, [[FAR, MIDDLE, PAGES - 1], [NEAR, FAR + 1, MIDDLE]], [150, 190], [20, 1])
    for pool in pools:
        for page in {page for table in batch.tables for page in table}:
            pool[page] = torch.randn(PAGE, HEADS, DIM, generator=rng).to(dtype)
    q = torch.randn(21, 2 * HEADS, DIM, generator=rng).to(dtype)
    used = [NEAR, MIDDLE, FAR, FAR + 1]
    small = Batch(PAGE, [[used.index(page) for page in table] for table in batch.tables], batch.lengths, batch.queries)
    expected, _ = dense(q, *(pool[used] for pool in pools), small.seen(), 0.2)
    try:
        for isa in _cpu.info()["runnable"]:
            _cpu.use(isa)
            out = ab.paged_tree_attention(q, *pools, batch.plan(), scale=0.2, backend="cpu")
            error = (out.double() - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
            assert bool((error <= BOUNDS[dtype]).all()), isa
    finally:
        _cpu.use("")


def test_page_copies(dtype: torch.dtype, rng: torch.Generator) -> None:
    """Planes, pages and heads all beyond 32 bits: TreeCache's own pool, of four planes."""
    planes, pages = 4, FAR + 2
    pool = mapped(planes * pages * PAGE * TOKEN, dtype).view(planes, pages, HEADS, PAGE, DIM)
    src, dst = torch.tensor([FAR, NEAR, MIDDLE]).int(), torch.tensor([NEAR + 1, MIDDLE + 1, FAR + 1]).int()
    filled = torch.tensor([PAGE, 7, 33]).int()
    for plane in (0, 3):
        for page in src.tolist():
            pool[plane, page] = torch.randn(HEADS, PAGE, DIM, generator=rng).to(dtype)
    cpu.copy_pages(pool, src, dst, filled)
    for plane in (0, 3):
        for s, d, n in zip(src.tolist(), dst.tolist(), filled.tolist(), strict=True):
            assert torch.equal(pool[plane, d, :, :n], pool[plane, s, :, :n])
            assert not pool[plane, d, :, n:].any()
