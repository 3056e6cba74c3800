"""The Triton kernels against a dense float64 computation (tests/triton_cases.py).

Without a GPU they run in the interpreter of Triton (tests/conftest.py sets TRITON_INTERPRET=1 before Triton is
imported), on a machine with one they run there. tests/gpu adds what only a GPU can show.
"""

from __future__ import annotations

import math

import kernel_bodies as bodies
import kernel_extremes as extremes
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (it has wheels for Linux only)")

from anabranch.kernels import configs, launch
from anabranch.kernels.merge import merge_kernel
from kernel_bodies import DTYPES, OPTIONS, with_sinks
from triton_cases import check, random_case, relative_error

DEVICE = "cpu" if launch.INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(
    not launch.INTERPRETED and not torch.cuda.is_available(),
    reason="no GPU, and Triton was imported without TRITON_INTERPRET=1",
)
NO_OPTIONS = dict(softcap=None, window=None, sinks=None)


def make_case(seed, **shape):
    return random_case(seed, device=DEVICE, **shape)


def run(case, **options):
    options = {"scale": 0.25, **NO_OPTIONS, **options}
    got = launch.attention(case.q, case.k_pages, case.v_pages, case.arrays, **options)
    return got, options


# 80, 96, 192 are two parts, 72 and 40 padded; group 7 leaves lanes idle; group 20 gives a tile of 128 rows, two of 32
SHAPES = [
    dict(head_dim=32, group=1),
    dict(head_dim=64, group=4),
    dict(head_dim=80, group=7, layout="tokens"),
    dict(head_dim=96, group=3),
    dict(head_dim=128, group=2, page_size=12),
    dict(head_dim=192, group=1, num_kv_heads=3),
    dict(head_dim=256, group=2, page_size=1),
    dict(head_dim=72, group=5, rows=4),
    dict(head_dim=40, group=20, num_kv_heads=1, rows=5, segments=3),
]


@pytest.mark.parametrize(
    "dtype,options",
    [(torch.float32, {}), *((dtype, OPTIONS["everything"]) for dtype in DTYPES)],
    ids=["float32-plain", "float32", "float16", "bfloat16"],
)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"d{s['head_dim']}g{s['group']}")
def test_attention_shapes(shape, dtype, options):
    case = make_case(shape["head_dim"] + shape["group"], dtype=dtype, **{"rows": 5, "max_len": 70, **shape})
    got, options = run(case, **with_sinks(options, case))
    check(case, got, **options)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_attention_options(options, seed):
    case = make_case(100 + seed, rows=9, segments=5, head_dim=64, tile_rows=3, dtype=DTYPES[seed])
    got, options = run(case, **with_sinks(options, case))
    check(case, got, **options)


# The second: wide and narrow tiles step by 32 and 64 tokens there, and an item of four rows just fills a narrow one.
@pytest.mark.parametrize(
    "shape", [dict(group=2), dict(group=4, head_dim=128, dtype=torch.float16, num_kv_heads=1)], ids=["narrow", "full"]
)
def test_same_bits_every_time_and_whoever_else_is_there(shape):
    case = make_case(0, rows=9, segments=5, max_len=200, **shape)
    (out, lse), _ = run(case, window=60)
    again, _ = run(case, window=60)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])
    # Drop the earliest row of every item: the others must not notice, though window and limits now cut elsewhere.
    dropped, full = set(), False
    arrays, items = case.arrays, case.arrays.items.clone()
    for item in items:
        begin, end = int(item[2]), int(item[2] + item[3])
        full = full or (end - begin) * shape["group"] == 16
        if end - begin > 1:
            earliest = begin + int(arrays.row_positions[arrays.rows[begin:end].long()].argmin())
            for entries in (arrays.rows, arrays.limits, arrays.dest):
                entries[[earliest, end - 1]] = entries[[end - 1, earliest]]
            dropped.add(int(arrays.rows[end - 1]))
            item[3] -= 1
            item[6] = arrays.row_positions[arrays.rows[begin : end - 1].long()].min()
    arrays.items = items
    (fewer, _), _ = run(case, window=60)
    kept = [row for row in range(9) if row not in dropped]
    assert len(kept) > 2 and full == (shape["group"] == 4)
    assert torch.equal(fewer[kept], out[kept])


def test_grid_larger_than_the_work():
    bodies.a_grid_larger_than_the_work(run, make_case(11, rows=8))


class Counted:
    """In a kernel's place: notes the grid and the constants of every launch, and launches."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def start(*arguments, **constants):
            self.launches.append((self.kernel.__name__, grid, constants))
            return self.kernel[grid](*arguments, **constants)

        return start


@pytest.fixture
def launches(monkeypatch):
    """Every launch from here on, as (kernel's name, grid, constants)."""
    found = []
    for name in ("tree_attention_kernel", "merge_kernel", "write_kv_kernel", "copy_pages_kernel"):
        monkeypatch.setattr(launch, name, Counted(getattr(launch, name), found))
    return found


class Forest:
    """A tree of our own and, maybe, strangers beside it; ``rows`` computes one decode step of all of them."""

    def __init__(self, strangers, heads=2, dim=96, dtype=torch.float16):
        import anabranch as ab

        self.ab, self.heads, self.dim = ab, heads, dim
        self.cache = ab.TreeCache(1, heads, dim, num_pages=400, page_size=16, dtype=dtype, device=DEVICE)
        self.gen = torch.Generator()
        trunk = self.cache.branch()
        self._fill({trunk: 150}, 1)
        self.kids = self.cache.fork(trunk, 3)
        self._fill({self.kids[0]: 20}, 2)
        self.others = []
        for i, kids in enumerate(strangers):
            root = self.cache.branch()
            self._fill({root: 60 + 30 * i}, 10 + i)
            self.others += self.cache.fork(root, kids) if kids > 1 else [root]

    def _randn(self, *shape):
        return torch.randn(*shape, generator=self.gen).to(DEVICE, self.cache.dtype)

    def _fill(self, rows, seed):
        step = self.cache.step(rows)
        self.gen.manual_seed(seed)
        self.cache.write(0, *(self._randn(step.num_rows, self.heads, self.dim) for _ in range(2)), step)

    def rows(self, group=4, **options):
        """Our rows' output and LSE: one token a kid, and five for the last."""
        own = {self.kids[0]: 1, self.kids[1]: 1, self.kids[2]: 5}
        step = self.cache.step(own | dict.fromkeys(self.others, 1))
        shapes = [self.heads, self.heads, self.heads * group]
        self.gen.manual_seed(3)
        ours = [self._randn(7, h, self.dim) for h in shapes]
        theirs = [self._randn(step.num_rows - 7, h, self.dim) for h in shapes]
        k, v, q = (torch.cat(x) for x in zip(ours, theirs, strict=True))
        self.cache.write(0, k, v, step, backend="triton")
        out, lse = self.ab.tree_attention(q, self.cache, 0, step, backend="triton", return_lse=True, **options)
        return out[:7], lse[:7]


@pytest.mark.parametrize("dtype,window", [(torch.float32, 100), (torch.float16, None)], ids=str)
def test_the_same_bits_whoever_else_is_in_the_batch(dtype, window):
    """Strangers of one row, of some, of more than a wide tile; ours has narrow and wide items."""
    alone = Forest([], dtype=dtype).rows(window=window)
    for strangers in ([1], [5, 1], [20]):
        got = Forest(strangers, dtype=dtype).rows(window=window)
        assert all(torch.equal(x, y) for x, y in zip(got, alone, strict=True)), strangers


def test_at_most_three_launches_a_layer(launches):
    """KV write, attention and merge, with wide and narrow items in one step, and in every constant the same variant."""
    forest = Forest([20, 1])
    launches.clear()
    forest.rows()
    assert [name for name, _, _ in launches if name != "copy_pages_kernel"] == [
        "write_kv_kernel", "tree_attention_kernel", "merge_kernel",
    ]  # fmt: skip
    assert len(launches) <= 4  # the pages that a step's forks copy: one launch for all layers
    constants = next(x for name, _, x in launches if name == "tree_attention_kernel")
    launches.clear()
    Forest([]).rows()
    alone = next(x for name, _, x in launches if name == "tree_attention_kernel")
    assert alone == constants


def test_what_is_compiled_for_the_table_is_what_is_launched(launches):
    """The same constants, head dims that are no multiple of 16 included."""
    from anabranch.kernels import variants

    for head_dim, dtype in ((72, torch.float16), (40, torch.float32), (128, torch.float16)):
        launches.clear()
        Forest([], dim=head_dim, dtype=dtype).rows()
        for kernel, name in (("attention", "tree_attention_kernel"), ("write_kv", "write_kv_kernel")):
            short = {torch.float16: "fp16", torch.float32: "fp32"}[dtype]
            variant = variants.Variant(kernel, launch.device_traits(torch.device(DEVICE)).arch, short, head_dim)
            _, constants, options = variants.BUILDERS[kernel](variant)
            given = next(x for found, _, x in launches if found == name)
            want = {**constants, **options}
            if kernel == "write_kv":
                want["BLOCK_H"] = 2  # the table has more heads
            assert given == want, kernel


def test_strides_say_how_wide_a_load_may_be():
    assert [launch.stride_alignment(torch.empty(4, 3, d)) for d in (128, 80, 72, 40, 36, 33)] == [16, 16, 8, 8, 4, 1]
    whole = torch.empty(6, 5, 4, 64)
    assert launch.stride_alignment(whole, whole.permute(0, 2, 1, 3)) == 16
    assert launch.stride_alignment(whole, torch.empty(4, 3, 72)) == 8
    assert launch.stride_alignment(torch.empty(4, 3, 65)[:, :, :64]) == 1
    assert launch.stride_alignment(torch.empty(64).as_strided((1, 1, 64), (1, 3, 1))) == 16  # strides of nothing
    assert launch.stride_alignment(torch.empty(3, 1, 64).expand(3, 5, 64)) == 16


@pytest.mark.parametrize("packed", [1, 4, 5, 16, 17])
def test_items_at_the_border_of_the_tiles(packed):
    """Items of one to five rows of four heads, and of one row of 16 and of 17: narrow and wide, and just so."""
    group, rows = (4, packed) if packed <= 5 else (packed, 1)
    case = make_case(70 + packed, rows=7, segments=4, tile_rows=rows, group=group, num_kv_heads=1)
    got, options = run(case, window=50)
    check(case, got, **options)


def test_no_items_at_all():
    case = make_case(5, rows=3)
    case.arrays.num_items = case.arrays.num_partials = case.arrays.num_merge = 0
    (out, lse), _ = run(case)
    assert torch.isnan(out).all() and torch.isnan(lse).all()  # as they were


HIDDEN = [
    dict(head_dim=32, group=1, num_kv_heads=1, rows=9, segments=2),
    dict(head_dim=40, group=7, num_kv_heads=1, rows=9, segments=2),
    dict(head_dim=96, group=5, num_kv_heads=1, rows=12, segments=2, tile_rows=12),
    dict(head_dim=32, group=71, num_kv_heads=1, rows=5, segments=2, tile_rows=2),
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of infinities
@pytest.mark.parametrize("value,window", [(math.nan, None), (math.inf, 40), (-math.inf, None)])
def test_hidden_values(value, window):
    for i, shape in enumerate(HIDDEN):
        case = make_case(200 + i, dtype=DTYPES[i % 3], **{"max_len": 100, "tile_rows": 6, **shape})
        extremes.hidden_values(run, case, value, window=window)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("columns", [slice(0, 64), slice(64, None)], ids=["first", "second"])
def test_hidden_values_in_one_part_of_the_columns_of_v(columns):
    shape = dict(head_dim=96, group=5, num_kv_heads=1, rows=12, segments=2, tile_rows=12, max_len=100)
    extremes.hidden_values(run, make_case(202, **shape), math.nan, columns)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinities_of_one_sign_in_every_token_of_a_step(value):
    """As many in one column as a step has tokens, and none of the other sign: what is counted does not run over."""
    case = make_case(200, head_dim=32, group=1, num_kv_heads=1, rows=9, segments=2, max_len=100, tile_rows=6)
    extremes.seen_infinities(run, case, 3, (value,))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("window", [None, 40])
def test_seen_infinities(window):
    for i, shape in enumerate(HIDDEN):
        case = make_case(200 + i, dtype=DTYPES[i % 3], **{"max_len": 100, "tile_rows": 6, **shape})
        extremes.seen_infinities(run, case, **with_sinks(dict(window=window, sinks=True), case))


def test_window_never_reads_what_nobody_sees():
    bodies.window_never_reads_what_nobody_sees(run, make_case(21, rows=5, segments=2, max_len=200, head_dim=32))


def test_all_rows_empty():
    bodies.all_rows_empty(run, make_case(5, rows=3))


@pytest.mark.parametrize("magnitude", [1e4, -1e4, 1e-4])
def test_hostile_scores(magnitude):
    bodies.hostile_scores(run, make_case(31, rows=6, magnitude=magnitude), magnitude)


def test_sinks_of_minus_infinity_are_no_sinks():
    bodies.sinks_of_minus_infinity_are_no_sinks(run, make_case(41, rows=6))


def test_strided_queries():
    bodies.strided_queries(run, make_case(51, rows=6))


def test_offsets_beyond_32_bits(tmp_path):
    case = make_case(61, rows=4, segments=2, max_len=20, head_dim=32, dtype=torch.float16, page_size=64)
    bodies.offsets_beyond_32_bits(run, case, tmp_path)


on_the_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="needs sparse files as the device's memory")


@on_the_cpu
def test_writes_beyond_32_bits(tmp_path):
    extremes.writes_beyond_32_bits(launch.write_kv, tmp_path)


@on_the_cpu
def test_copies_beyond_32_bits(tmp_path):
    extremes.copies_beyond_32_bits(launch.copy_pages, tmp_path)


@on_the_cpu
def test_partials_beyond_32_bits(tmp_path, monkeypatch):
    def sparse(shape, dtype, device):
        return extremes.sparse(tmp_path, f"{len(list(tmp_path.iterdir()))}", math.prod(shape), dtype).view(shape)

    monkeypatch.setattr(launch.torch, "empty", sparse)
    case = make_case(61, rows=4, segments=2, max_len=20, head_dim=256, dtype=torch.float16)
    extremes.partials_beyond_32_bits(run, case)


@on_the_cpu
def test_rows_beyond_32_bits(tmp_path, monkeypatch):
    def sparse(shape, dtype, device):
        return extremes.sparse(tmp_path, f"{len(list(tmp_path.iterdir()))}", math.prod(shape), dtype).view(shape)

    monkeypatch.setattr(launch.torch, "empty", sparse)
    case = make_case(65, rows=4, segments=2, max_len=20, head_dim=256, dtype=torch.float16)
    extremes.rows_beyond_32_bits(run, case, tmp_path)


def test_blind_tiles():
    extremes.blind_tiles(run, make_case(63, rows=6, segments=2, max_len=700, head_dim=32, group=1, num_kv_heads=1))


def merging(acc, m, l, rows, ptr, sinks):  # noqa: E741
    """The merge kernel alone, as the shared tests call it."""
    heads, dim = acc.shape[1:]
    out = torch.full((6, heads, dim), math.nan, device=DEVICE)
    lse = torch.full((6, heads), math.nan, device=DEVICE)
    acc, ml, rows, ptr = (x.to(DEVICE) for x in (acc, torch.stack([m, l], -1).contiguous(), rows, ptr))
    merge_kernel[(len(rows) * heads,)](
        acc, ml, rows, ptr, out, lse, torch.zeros(heads, device=DEVICE) if sinks is None else sinks.to(DEVICE),
        ptr, len(rows), heads,
        HEAD_DIM=dim, BLOCK_D=32, BLOCK_P=8, HAS_SINKS=sinks is not None, HAS_COUNTS=False,
    )  # fmt: skip
    return out.cpu(), lse.cpu()


def test_merges_of_many_partials():
    extremes.merges_of_many_partials(merging, 24)


@pytest.mark.parametrize("sink", [None, -math.inf, 0.7], ids=["no-sink", "sink-inf", "sink"])
def test_merge(sink):
    bodies.merge(merging, 24, sink)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads,dim,page_size", [(2, 64, 16), (3, 80, 7), (40, 32, 4)])
def test_write_kv(heads, dim, page_size, dtype):
    bodies.write_kv(launch.write_kv, heads, dim, page_size, dtype, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copy_pages(dtype):
    bodies.copy_pages(launch.copy_pages, 96, dtype, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_writes_and_copies_at_any_address(dtype):
    bodies.write_kv_at_any_address(launch.write_kv, dtype, DEVICE)
    bodies.copy_pages_at_any_address(launch.copy_pages, dtype, DEVICE)


def test_column_split():
    for head_dim in range(1, 257):
        d0, d1 = configs.column_split(head_dim)
        assert d0 & (d0 - 1) == 0 and d1 & (d1 - 1) == 0 and d0 >= 16 and (d1 == 0 or d1 >= 16)
        assert head_dim <= d0 + d1 < 2 * max(16, head_dim)
    assert configs.column_split(80) == (64, 16) and configs.column_split(192) == (128, 64)
    assert configs.column_split(128) == (128, 0)


def test_every_variant_has_a_configuration():
    for arch in (configs.AMD, 80, 86, 89, 90, 100, 120):
        for head_dim in range(1, 257):
            for itemsize in (2, 4):
                for plain in (True, False):
                    config = configs.attention_config(head_dim, itemsize, arch, plain)
                    assert config.wide in (32, 64) and min(config.wide_n, config.narrow_n) >= 16
                    assert min(config.wide_stages, config.narrow_stages) >= 2
                    assert arch != configs.AMD or "maxnreg" not in config.options  # unknown to their compiler


def test_backend_contract():
    from anabranch.backends import triton as backend

    assert backend.name == "triton" and backend.unavailable() is None
    device = torch.device(DEVICE)
    assert backend.refuses(device, torch.bfloat16, 128) is None
    assert "float64" in backend.refuses(device, torch.float64, 128)
    assert "577" in backend.refuses(device, torch.float32, 577)
    assert "meta" in backend.refuses(torch.device("meta"), torch.float32, 64)
    tile_config = backend.tile_config(32, 8, 128, torch.bfloat16, device)
    assert tile_config.tile == 64 and tile_config.chunk > 0 and tile_config.parallelism > 0
    case = make_case(71, rows=5)
    calls = []

    class OnePlan:
        num_rows = case.q.shape[0]

        def arrays(self, group, tile_config):
            calls.append((group, tile_config))
            return case.arrays

    options = dict(scale=0.3, softcap=None, window=None, sinks=None)
    out, lse = backend.attention(case.q, case.k_pages, case.v_pages, OnePlan(), return_lse=True, **options)
    check(case, (out, lse), **options)
    out, lse = backend.attention(case.q, case.k_pages, case.v_pages, OnePlan(), return_lse=False, **options)
    assert lse is None and calls[0][0] == 2


@pytest.mark.parametrize("group", [1, 4, 7, 16])  # 16: items of one row hold just as many as a narrow tile
def test_planner_parts_wide_and_narrow_items(group):
    """The package's planner puts the items of more than ``narrow`` packed rows first, each part by cost."""
    import anabranch as ab

    cache = ab.TreeCache(1, 2, 64, num_pages=64, page_size=8)
    trunk = cache.branch()
    cache.step({trunk: 30})
    kids = cache.fork(trunk, 19)
    step = cache.step({kid: 1 + 2 * (i % 9 == 0) for i, kid in enumerate(kids)})
    tile_config = ab.plan.TileConfig(tile=64, chunk=16, parallelism=1, num_kv_heads=2, elem_size=2, narrow=16)
    arrays = step.plan.arrays(group, tile_config)
    packed = arrays.items[:, 3] * group
    assert 0 < arrays.num_wide <= arrays.num_items
    assert bool((packed[: arrays.num_wide] > 16).all()) and bool((packed[arrays.num_wide :] <= 16).all())


@pytest.mark.parametrize("window", [None, 20])
def test_through_a_cache(window):
    """The package's own planner: prefill, fork, uneven growth, join and decode, against the reference in float64."""
    import anabranch as ab

    gen = torch.Generator().manual_seed(5)
    cache = ab.TreeCache(1, 2, 64, num_pages=32, page_size=8, dtype=torch.float32, device=DEVICE)
    trunk = cache.branch()

    def step(rows):
        s = cache.step(rows)
        k, v = (torch.randn(s.num_rows, 2, 64, generator=gen).to(DEVICE) for _ in range(2))
        cache.write(0, k, v, s, backend="triton")
        q = torch.randn(s.num_rows, 6, 64, generator=gen).to(DEVICE)
        out, lse = ab.tree_attention(q, cache, 0, s, window=window, backend="triton", return_lse=True)
        want, want_lse = ab.tree_attention(q, cache, 0, s, window=window, backend="reference", return_lse=True)
        assert relative_error(out, want.cpu()) <= 1e-5
        assert torch.allclose(lse, want_lse.float(), atol=1e-5)

    step({trunk: 21})
    kids = cache.fork(trunk, 3)
    step({kids[0]: 1, kids[1]: 1, kids[2]: 1})
    step({kids[0]: 5, kids[2]: 1, trunk: 2})
    cache.join(trunk, kids)
    step({trunk: 1})
