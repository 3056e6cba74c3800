"""tree_attention: every backend against the float64 oracle and the naive twin, on random fork/join programs."""

from __future__ import annotations

import itertools

import pytest
import torch
from programs import Twins, backends_here

import anabranch as ab
from anabranch.backends import registry
from anabranch.kv.naive import NaiveCache

FAST = [name for name in backends_here() if name != "reference"]


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-300))


def attend(
    twins: Twins, step: tuple, q: torch.Tensor, backend: str, **options: object
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = ab.tree_attention(q, twins.cache, 0, step[0], backend=backend, return_lse=True, **options)
    assert out.shape == q.shape and out.dtype == q.dtype
    assert lse.shape == q.shape[:2] and not torch.isnan(out).any() and not torch.isnan(lse).any()
    return out, lse


def options_of(seed: int, heads: int) -> dict[str, object]:
    """Every combination of the options turns up over eight seeds."""
    softcap, window, sinks = [(seed >> i) & 1 for i in range(3)]
    chosen: dict[str, object] = {}
    if softcap:
        chosen["softcap"] = 5.0
    if window:
        chosen["window"] = 7
    if sinks:
        chosen["sinks"] = torch.linspace(-2, 2, heads)
    if seed % 3 == 0:
        chosen["scale"] = 0.3
    return chosen


@pytest.mark.parametrize("seed", range(12))
def test_reference_is_the_naive_twin(seed: int) -> None:
    twins = Twins(seed=seed, page_size=4, heads=2, dim=8)
    for _ in range(30):
        twins.random_change()
    step = twins.random_step()
    q = twins.randn(step[0].num_rows, 6, 8)
    options = options_of(seed, 6)
    expected, expected_lse = twins.naive.attention(q, 0, step[1], **options)
    out, lse = attend(twins, step, q, "reference", **options)
    assert relative_error(out, expected) < 1e-6
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("seed", range(24))
def test_float32_random_programs(backend: str, seed: int) -> None:
    """Head shapes, page sizes and options at random; several steps of one program, so that plans are advanced too."""
    light = backend == "triton"
    heads = (1, 2, 3)[seed % 3]
    group = (1, 3, 4, 7, 8)[seed % 5]
    dim = (32, 64, 80, 96, 128, 256)[seed % 6]
    if light and seed >= 8:
        pytest.skip("the interpreter is slow: 8 of 24; tests/kernels/test_triton_kernels.py sweeps the kernels")
    twins = Twins(seed=seed, page_size=(1, 4, 16, 7)[seed % 4], heads=heads, dim=dim, num_pages=2000)
    for _ in range(15 if light else 60):
        twins.random_change(max_rows=5 if light else 40)
    options = options_of(seed, heads * group)
    for _ in range(1 if light else 3):
        step = twins.random_step(max_rows=3 if light else 20)
        q = twins.randn(step[0].num_rows, heads * group, dim)
        expected, expected_lse = attend(twins, step, q, "reference", **options)
        out, lse = attend(twins, step, q, backend, **options)
        assert relative_error(out, expected) <= 1e-5
        torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", FAST)
def test_steady_decoding_keeps_the_plan_and_the_result(backend: str) -> None:
    """Past the plan's slack and over page ends, decode steps stay exact."""
    twins = Twins(page_size=4, heads=2, dim=32, num_pages=900)
    trunk = twins.branch()
    twins.step({0: 21})
    twins.fork(trunk, 3)
    steps = 12 if backend == "triton" else 150
    for i in range(steps):
        step = twins.step({1: 1, 2: 1, 3: 1})
        q = twins.randn(3, 4, 32)
        out, _ = attend(twins, step, q, backend, window=16)
        if i % 5 == 0 or i > steps - 3:
            assert relative_error(out, attend(twins, step, q, "reference", window=16)[0]) <= 1e-5
    built, advanced = twins.cache.plan_stats()
    assert advanced > 5 * built


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 128])
def test_half_precision_is_as_good_as_a_flat_kernel(backend: str, dtype: torch.dtype, dim: int) -> None:
    """At most twice the error of torch's own attention, branch by branch, in the same dtype."""
    twins = Twins(seed=3, page_size=16, heads=2, dim=dim, dtype=dtype, num_pages=900)
    trunk = twins.branch()
    twins.step({0: 70})
    twins.fork(trunk, 3)
    twins.step({1: 9, 2: 1, 3: 30})
    step = twins.step({1: 1, 2: 1, 3: 1})
    q = twins.randn(3, 8, dim)
    expected, _ = attend(twins, step, q, "reference")
    out, _ = attend(twins, step, q, backend)
    flat = torch.empty_like(q)
    for i, (branch, _) in enumerate(twins.pairs[1:]):
        k, v = (x.transpose(0, 1).repeat_interleave(4, 0)[None] for x in twins.cache.read(branch, 0))
        flat[i] = torch.nn.functional.scaled_dot_product_attention(q[i][None, :, None], k, v)[0, :, 0]
    # The oracle in float64, from the same rounded inputs, unrounded.
    exact, _ = twins.naive.attention(q, 0, step[1])
    assert relative_error(out, exact) <= 2 * relative_error(flat, exact)
    assert relative_error(expected, exact) < 0.01


@pytest.mark.parametrize("backend", backends_here())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hostile_scores(backend: str, dtype: torch.dtype) -> None:
    """±1e4 scores, rows of equal scores, and keys of −inf score leave no NaN and the right answer."""
    twins = Twins(page_size=4, heads=1, dim=32, dtype=dtype)
    trunk = twins.branch()
    twins.step({0: 5})
    twins.fork(trunk, 2)
    step = twins.cache.step({twins.pairs[1][0]: 3, twins.pairs[2][0]: 1})
    k = torch.ones(4, 1, 32, dtype=dtype)
    k[0], k[1], k[2] = 100, -100, 0
    twins.cache.write(0, k, torch.arange(4.0).to(dtype).view(4, 1, 1).expand(4, 1, 32).contiguous(), step)
    q = torch.full((4, 2, 32), 3.125, dtype=dtype)  # q·k = ±1e4
    q[:, 1] = -q[:, 1]
    for softcap in (None, 30.0):
        expected, lse = attend(twins, (step,), q, "reference", scale=1.0, softcap=softcap)
        out, got = attend(twins, (step,), q, backend, scale=1.0, softcap=softcap)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(got, lse, rtol=1e-4, atol=1e-3)
    if dtype == torch.float32:  # keys whose score is −inf are worth nothing; the rest go on
        step = twins.cache.step({twins.pairs[1][0]: 1, twins.pairs[2][0]: 1})
        k = torch.full((2, 1, 32), -torch.inf)
        k[1] = 1.0
        twins.cache.write(0, k, torch.ones(2, 1, 32), step)
        q = torch.ones(2, 2, 32)
        torch.testing.assert_close(
            attend(twins, (step,), q, backend), attend(twins, (step,), q, "reference"), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("backend", FAST)
def test_garbage_elsewhere_in_the_pool_does_not_leak(backend: str) -> None:
    """Slots nobody owns hold NaN (conftest poisons them): pages part-filled, truncated and reused stay clean."""
    twins = Twins(page_size=16, heads=1, dim=64)
    trunk = twins.branch()
    twins.step({0: 33})
    twins.truncate(trunk, 17)
    twins.fork(trunk, 2)
    step = twins.step({1: 2, 0: 1, 2: 1})
    assert torch.isnan(twins.cache.k_pages(0)).any()
    q = twins.randn(4, 5, 64)
    assert relative_error(attend(twins, step, q, backend)[0], attend(twins, step, q, "reference")[0]) <= 1e-5


def test_results_do_not_depend_on_strangers_in_the_batch() -> None:
    """A tree's rows are the same to the bit whatever other trees are in the step (backend cpu)."""
    if "cpu" not in FAST:
        pytest.skip("the cpu backend is not built")

    def run(strangers: int) -> torch.Tensor:
        twins = Twins(page_size=16, heads=2, dim=64, num_pages=4000, seed=5)
        trunk = twins.branch()
        twins.step({0: 300})
        twins.fork(trunk, 3)
        for i in range(strangers):
            twins.branch()
            twins.step({4 + i: 50 + 100 * i})
        twins.generator.manual_seed(1)
        rows = {1: 1, 2: 5, 3: 1}
        own = twins.randn(7, 2, 64), twins.randn(7, 2, 64), twins.randn(7, 8, 64)
        more = {4 + i: 1 for i in range(strangers)}
        step = twins.cache.step({twins.pairs[i][0]: n for i, n in (rows | more).items()})
        k, v, q = (torch.cat([x, torch.randn(strangers, x.shape[1], 64)]) for x in own)
        twins.cache.write(0, k, v, step)
        return ab.tree_attention(q, twins.cache, 0, step, backend="cpu")[:7]

    assert torch.equal(run(0), run(3))


def test_absorbed_and_plain_plans_agree() -> None:
    """Short shared spans are read inside their children's items; the answer is the same and fewer items are made."""
    from anabranch.plan.tile_config import TileConfig

    twins = Twins(page_size=1, heads=1, dim=32, num_pages=400)
    root = twins.branch()
    twins.step({0: 40})
    for kid in twins.fork(root, 3):
        twins.step({twins.pairs.index(kid): 2})
        twins.fork(kid, 3)
    leaves = {i: 1 for i in range(4, 13)}
    step = twins.step(leaves)
    cheap = step[0].plan.arrays(8, TileConfig(64, 64, 1, 1, 2))
    dear = step[0].plan.arrays(8, TileConfig(64, 64, 1, 1, 1000))
    assert cheap.num_absorbed == 3 and dear.num_absorbed == 0 and cheap.num_items < dear.num_items
    assert cheap.kv_tokens == dear.kv_tokens + 3 * 2 * 2
    q = twins.randn(9, 8, 32)
    for backend in FAST:
        assert relative_error(attend(twins, step, q, backend)[0], attend(twins, step, q, "reference")[0]) <= 1e-5


# -- the torch op ------------------------------------------------------------------------------------------------------


def small_step() -> tuple[Twins, tuple, torch.Tensor]:
    twins = Twins(page_size=4, heads=2, dim=32)
    trunk = twins.branch()
    twins.step({0: 6})
    twins.fork(trunk, 2)
    step = twins.step({1: 1, 2: 2})
    return twins, step, twins.randn(3, 4, 32)


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("sinks", [None, torch.zeros(4)])
def test_opcheck(return_lse: bool, sinks: torch.Tensor | None) -> None:
    twins, step, q = small_step()
    cache = twins.cache
    args = (q, cache.k_pages(0), cache.v_pages(0), step[0].handle, sinks, 0.2, 0.0, 0, 0, "auto", return_lse)
    torch.library.opcheck(torch.ops.anabranch.tree_attention.default, args)


def test_opcheck_write() -> None:
    cache = ab.TreeCache(num_layers=9, num_kv_heads=2, head_dim=32, num_pages=8)
    step = cache.step({cache.branch(): 3})
    k = torch.ones(3, 2, 32)
    schema = torch.ops.anabranch.write_kv.default
    # Each check runs the op, and a layer is written once: one layer a check.
    for layer, check in enumerate(("test_schema", "test_faketensor", "test_autograd_registration")):
        args = (k, k, cache.k_pages(layer).contiguous(), cache.v_pages(layer).contiguous(), step.handle, layer, "auto")
        torch.library.opcheck(schema, args, test_utils=check)


@pytest.mark.compiled
def test_compile_fullgraph() -> None:
    twins, step, q = small_step()
    expected = ab.tree_attention(q, twins.cache, 0, step[0], softcap=9.0)

    def block(q: torch.Tensor) -> torch.Tensor:
        return ab.tree_attention(q * 1.0, twins.cache, 0, step[0], softcap=9.0) + 1

    torch.testing.assert_close(torch.compile(block, fullgraph=True)(q), expected + 1)


@pytest.mark.compiled
def test_compile_fullgraph_with_the_write() -> None:
    twins, _, q = small_step()
    eager = [b for b, _ in twins.pairs[1:]]

    def block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: ab.Step) -> torch.Tensor:
        twins.cache.write(0, k, v, step)
        return ab.tree_attention(q, twins.cache, 0, step)

    compiled = torch.compile(block, fullgraph=True)
    for _ in range(3):
        k, v = twins.randn(2, 2, 32), twins.randn(2, 2, 32)
        forks = [twins.cache.fork(b)[0] for b in eager]
        step = twins.cache.step({b: 1 for b in forks})
        expected = block(q[:2], k, v, step)
        step = twins.cache.step({b: 1 for b in eager})
        torch.testing.assert_close(compiled(q[:2], k, v, step), expected)
        for b in forks:
            twins.cache.release(b)


def test_no_backward_is_said() -> None:
    twins, step, q = small_step()
    out = ab.tree_attention(q.requires_grad_(), twins.cache, 0, step[0])
    with pytest.raises(RuntimeError, match="branch_attention"):
        out.sum().backward()


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_calls_that_do_not_fit() -> None:
    twins, step, q = small_step()
    cache, now = twins.cache, step[0]
    other = ab.TreeCache(1, 2, 32, 8)
    bad = {
        r"q: expected shape \[3, num_q_heads, 32\]": lambda: ab.tree_attention(q[:2], cache, 0, now),
        r"q: expected a tensor \[rows, num_q_heads, head_dim\], got shape \[12, 32\]": lambda: ab.tree_attention(
            q.view(12, 32), cache, 0, now
        ),
        "3 query heads are not a multiple": lambda: ab.tree_attention(q[:, :3].contiguous(), cache, 0, now),
        "q: expected dtype": lambda: ab.tree_attention(q.half(), cache, 0, now),
        "q: expected device": lambda: ab.tree_attention(q.to("meta"), cache, 0, now),
        "q: must be contiguous": lambda: ab.tree_attention(torch.empty(4, 3, 32).transpose(0, 1), cache, 0, now),
        "layer: must be from 0 to 0": lambda: ab.tree_attention(q, cache, 1, now),
        "another cache": lambda: ab.tree_attention(q, other, 0, now),
        "softcap: must be positive": lambda: ab.tree_attention(q, cache, 0, now, softcap=0.0),
        "window: must be at least 1": lambda: ab.tree_attention(q, cache, 0, now, window=0),
        r"sinks: expected shape \[4\]": lambda: ab.tree_attention(q, cache, 0, now, sinks=torch.zeros(3)),
        "backend: 'fast' is not one of": lambda: ab.tree_attention(q, cache, 0, now, backend="fast"),
        "no K and V yet": lambda: ab.tree_attention(
            q[:1], cache, 0, cache.step({cache.branch(): 1}), backend="reference"
        ),
    }
    for match, call in bad.items():
        with pytest.raises(ValueError, match=match):
            call()
    twins.step({1: 1})
    with pytest.raises(ValueError, match="moved on"):
        ab.tree_attention(q, cache, 0, now)


def test_backends_refuse_what_they_cannot_take() -> None:
    cache = ab.TreeCache(1, 1, 32, 4, dtype=torch.float64)
    step = cache.step({cache.branch(): 1})
    cache.write(0, torch.ones(1, 1, 32, dtype=torch.float64), torch.ones(1, 1, 32, dtype=torch.float64), step)
    q = torch.ones(1, 1, 32, dtype=torch.float64)
    assert torch.equal(ab.tree_attention(q, cache, 0, step), q)  # auto: the reference takes float64
    for backend in FAST:
        with pytest.raises(ValueError, match=f"backend '{backend}'.*float64"):
            ab.tree_attention(q, cache, 0, step, backend=backend)


def test_an_unavailable_backend_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    twins, step, q = small_step()
    monkeypatch.setattr(registry, "unavailable", lambda name: "there is no such chip; buy one")
    with pytest.raises(ab.BackendUnavailable, match="backend 'triton': there is no such chip; buy one"):
        ab.tree_attention(q, twins.cache, 0, step[0], backend="triton")


# -- a page pool of one's own ------------------------------------------------------------------------------------------


def random_tables(seed: int, batch: int, page_size: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Block tables with shared prefixes of random depth, a page met again after a divergence, and ragged ends."""
    g = torch.Generator().manual_seed(seed)
    tables = torch.full((batch, 8), -1)
    lengths = torch.randint(1, 8 * page_size + 1, (batch,), generator=g)
    if seed % 2:
        lengths[-1] = 0
    fresh = itertools.count()
    for b in range(batch):
        parent = int(torch.randint(0, b + 1, (1,), generator=g))
        shared = int(torch.randint(0, 7, (1,), generator=g)) if parent < b else 0
        for j in range(8):
            tables[b, j] = tables[parent, j] if j < shared or (parent < b and j == 6) else next(fresh)
    return tables, lengths, next(fresh)


@pytest.mark.parametrize("backend", backends_here())
@pytest.mark.parametrize("seed", range(4))
def test_paged_pool_of_ones_own(backend: str, seed: int) -> None:
    page_size, batch = 4, 3 if backend == "triton" else 6
    tables, lengths, num_pages = random_tables(seed, batch, page_size)
    queries = torch.minimum(lengths, torch.tensor([1, 3, 2, 1, 7, 1])[:batch]) if seed > 1 else None
    if queries is None:
        queries = torch.ones_like(lengths)
        lengths = lengths.clamp_min(1)
        plan = ab.Plan.from_block_tables(tables, lengths, page_size)
    else:
        plan = ab.Plan.from_block_tables(tables, lengths.tolist(), page_size, query_lengths=queries)
    assert batch == 3 or plan.unique_tokens < int(lengths.sum())
    g = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(num_pages, page_size, 2, 32, generator=g) for _ in range(2))
    q = torch.randn(int(queries.sum()), 4, 32, generator=g)
    window = 9 if seed % 2 else None
    out, lse = ab.paged_tree_attention(q, k, v, plan, window=window, backend=backend, return_lse=True)
    row = 0
    for b in range(batch):
        twin = NaiveCache(1, 2, 32)
        branch = twin.branch()
        n, m = int(lengths[b]), int(queries[b])
        flat = [int(tables[b, j // page_size]) * page_size + j % page_size for j in range(n)]
        keys, values = k.view(-1, 2, 32)[flat], v.view(-1, 2, 32)[flat]
        if n > m:
            step = twin.step({branch: n - m})
            twin.write(0, keys[: n - m], values[: n - m], step)
        if m:
            step = twin.step({branch: m})
            twin.write(0, keys[n - m :], values[n - m :], step)
            expected, expected_lse = twin.attention(q[row : row + m], 0, step, window=window)
            assert relative_error(out[row : row + m], expected) <= 1e-5
            torch.testing.assert_close(lse[row : row + m].double(), expected_lse, rtol=1e-5, atol=1e-5)
        row += m
    assert row == plan.num_rows


@pytest.mark.parametrize("backend", backends_here())
def test_a_row_that_sees_nothing(backend: str) -> None:
    plan = ab.Plan.from_block_tables(torch.tensor([[0], [0]]), [2, 0], 4)
    k = torch.ones(1, 4, 1, 32)
    out, lse = ab.paged_tree_attention(torch.ones(2, 1, 32), k, k, plan, backend=backend, return_lse=True)
    assert torch.equal(out[1], torch.zeros(1, 32)) and lse[1].item() == float("-inf")
    sinks = torch.tensor([0.5])
    out, lse = ab.paged_tree_attention(torch.ones(2, 1, 32), k, k, plan, sinks=sinks, backend=backend, return_lse=True)
    assert torch.equal(out[1], torch.zeros(1, 32)) and lse[1].item() == 0.5


def test_tables_that_do_not_fit() -> None:
    tables = torch.tensor([[0, 1], [0, 2]])
    pages = torch.zeros(3, 4, 1, 32)
    make = ab.Plan.from_block_tables
    bad = {
        "block_tables: expected 2 dimensions": lambda: make(torch.tensor([0]), [1], 4),
        r"lengths: expected shape \[2\]": lambda: make(tables, [1], 4),
        r"lengths\[1\]: must be from 0 to 2 pages × 4 = 8, got 9": lambda: make(tables, [1, 9], 4),
        r"block_tables\[1, 1\]: page -1": lambda: make(torch.tensor([[0, 1], [0, -1]]), [8, 8], 4),
        r"query_lengths\[0\]: 3 rows do not fit": lambda: make(tables, [2, 8], 4, query_lengths=[3, 1]),
        "page_size": lambda: make(tables, [1, 1], 0),
        "k_pages: page size 4, but the plan was made for 8": lambda: ab.paged_tree_attention(
            torch.zeros(2, 1, 32), pages, pages, make(tables, [8, 8], 8)
        ),
        "k_pages: 2 pages, but.*page 2": lambda: ab.paged_tree_attention(
            torch.zeros(2, 1, 32), pages[:2], pages[:2], make(tables, [8, 8], 4)
        ),
        "v_pages: expected shape .* like k_pages": lambda: ab.paged_tree_attention(
            torch.zeros(2, 1, 32), pages, pages[:2], make(tables, [8, 8], 4)
        ),
        "k_pages: the last dimension must have stride 1": lambda: ab.paged_tree_attention(
            torch.zeros(2, 1, 4), pages.transpose(1, 3), pages.transpose(1, 3), make(tables, [8, 8], 32)
        ),
    }
    for match, call in bad.items():
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(TypeError, match="expected integers"):
        make(tables.float(), [1, 1], 4)
    with pytest.raises(TypeError, match="expected a Plan"):
        ab.paged_tree_attention(torch.zeros(2, 1, 32), pages, pages, tables)
