"""Mixed batches over a page pool, at random, and what their rows see, told without the planner: token by token for its
arrays (``check``), and as dense attention in float64, a row at a time, for its kernels (``check_attention``)."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from strip_kit import tokens

import anabranch as ab
from anabranch.plan.arrays import PlanArrays
from anabranch.plan.plan import Plan
from anabranch.plan.tile_config import TileConfig

PAGE_SIZES = (1, 2, 3, 4, 5, 7, 8, 12, 16, 24, 32, 48, 128)
GROUPS = (1, 2, 3, 4, 7, 8, 16)
TILE_CONFIGS = [
    TileConfig(64, 256, 1), TileConfig(16, 8, 64, 2, 2), TileConfig(1, 1, 1000, 1, 4), TileConfig(128, 32, 7, 3, 2),
    TileConfig(128, 256, 264, 8, 2, 16), TileConfig(64, 256, 1, subtree=64), TileConfig(32, 16, 3, 2, 2, subtree=24),
]  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """Sequences in pages of one pool: what ``Plan.from_block_tables`` is told."""

    page_size: int
    tables: list[list[int]]
    lengths: list[int]
    queries: list[int]

    @property
    def num_pages(self) -> int:
        return max(map(max, self.tables)) + 1

    def plan(self) -> Plan:
        return Plan.from_block_tables(torch.tensor(self.tables), self.lengths, self.page_size, self.queries)

    def seen(self) -> list[np.ndarray]:
        """For each query row the slots of its context, the i-th at position i; the row's own token is the last."""
        rows = []
        for table, length, queries in zip(self.tables, self.lengths, self.queries, strict=True):
            slots = np.array([table[i // self.page_size] * self.page_size + i % self.page_size for i in range(length)])
            rows += [slots[: length - queries + 1 + j] for j in range(queries)]
        return rows


# Batches that once went wrong, or that reveal a mistake that all others pass.
KNOWN = {
    "a prefill, and a decode on its pages": Batch(4, [[0, 1, 2], [0, 1, 3]], [12, 9], [12, 1]),
    "two prefills that part": Batch(4, [[0, 1, 2], [0, 1, 3]], [12, 10], [12, 2]),
    "the same prefill twice": Batch(4, [[0, 1], [0, 1]], [8, 8], [8, 8]),
    "a chunk, and a decode that shares it": Batch(4, [[0, 1, 2], [0, 1, 3]], [12, 9], [5, 1]),
    "pages of one token": Batch(1, [[0, 1, 2], [0, 1, 3], [0, 4, 2]], [3, 3, 3], [3, 2, 1]),
    "a shared page behind pages of one's own": Batch(4, [[0, 2], [1, 2]], [8, 8], [1, 1]),
    "the same, prefilled": Batch(4, [[0, 2], [1, 2]], [8, 8], [8, 8]),
    "pages that change places": Batch(4, [[0, 1], [1, 0]], [8, 8], [1, 1]),
    "a page seen to three lengths": Batch(8, [[0, 1], [0, 1], [0, 1]], [16, 11, 3], [9, 11, 2]),
    "parted in the middle": Batch(2, [[0, 1, 2], [0, 3, 2]], [6, 6], [6, 5]),
}


def random_batch(r: random.Random, max_tokens: int = 160, page_sizes: Sequence[int] = PAGE_SIZES) -> Batch:
    """Prefills, chunks and decodes side by side. Tables part from one another at any depth and may meet again; a page
    may stand in two columns; sequences that share pages share new tokens as well, seen to different lengths."""
    page_size = r.choice(page_sizes)
    columns = r.randint(1, max(1, min(8, max_tokens // page_size)))
    fresh = itertools.count()
    tables: list[list[int]] = []
    lengths: list[int] = []
    queries: list[int] = []
    for _ in range(r.randint(1, 6)):
        table = [next(fresh) for _ in range(columns)]
        length = r.choice((columns * page_size, r.randint(0, columns * page_size)))
        if tables and r.random() < 0.8:
            i = r.randrange(len(tables))
            depth = r.choice((columns, r.randint(0, columns)))
            table[:depth] = tables[i][:depth]
            if r.random() < 0.3:
                meet = r.randrange(columns)
                table[meet:] = tables[i][meet:]
            if r.random() < 0.3:
                length = lengths[i]
        if r.random() < 0.15:
            table[r.randrange(columns)] = r.choice(r.choice([*tables, table]))
        tables.append(table)
        lengths.append(length)
        queries.append(min(length, r.choice((length, r.randint(0, length), r.randint(1, 4), 1, 1))))
    place = list(range(next(fresh)))
    r.shuffle(place)
    return Batch(page_size, [[place[page] for page in table] for table in tables], lengths, queries)


def seen_by_step(cache: ab.TreeCache, step: ab.Step) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each row of a step the slots and positions of its context, from the branches."""
    rows = []
    for branch in step.branches:
        slots, positions = cache._core.slots(branch), cache._core.positions(branch)
        n = step.rows[branch].stop - step.rows[branch].start
        rows += [(slots[: len(slots) - n + 1 + j], positions[: len(slots) - n + 1 + j]) for j in range(n)]
    return rows


def check(arrays: PlanArrays, seen: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    """Every row meets every token (slot and position) that it sees exactly once, and every result has its place."""
    num_rows = len(seen)
    rows, limits, dest = arrays.rows.tolist(), arrays.limits.tolist(), arrays.dest.tolist()
    row_positions = arrays.row_positions.tolist()
    met: list[list[np.ndarray]] = [[] for _ in range(num_rows)]
    places: list[list[int]] = [[] for _ in range(num_rows)]
    parts_left, head = 0, slice(0)  # of an item that holds a subtree
    for begin, length, row_begin, row_count, masked, kv_pos_max, row_pos_min, parts in arrays.items.tolist():
        listed = slice(row_begin, row_begin + row_count)
        assert 0 < row_count <= arrays.tile_rows and (parts >= 0) == (parts_left == 0)
        if parts > 0:
            assert length == masked == 0
            parts_left, head = parts, listed
            for row, place in zip(rows[listed], dest[listed], strict=True):
                places[row].append(place)
            continue
        shown = limits[listed]
        if parts < 0:  # its rows see all of it
            parts_left -= 1
            assert 0 < length and masked == 0 and head.start <= listed.start and listed.stop <= head.stop
            shown = [length] * row_count
        least, most = min(shown), max(shown)
        assert 0 < least and most == length and (masked != 0) == (least < length)
        slots, positions = tokens(arrays, begin, length)
        assert kv_pos_max == positions.max()
        item = slots.astype(np.int64) << 32 | positions
        assert row_pos_min <= min(row_positions[row] for row in rows[listed])
        for row, limit in zip(rows[listed], shown, strict=True):
            met[row].append(item[:limit])
        if parts == 0:  # else the rows have their places with the item
            for row, place in zip(rows[listed], dest[listed], strict=True):
                places[row].append(place)
    assert parts_left == 0
    for row, (slots, positions) in enumerate(seen):
        expected = np.sort(np.asarray(slots, np.int64) << 32 | positions)
        found = np.sort(np.concatenate(met[row])) if met[row] else expected[:0]
        assert np.array_equal(found, expected), f"row {row} does not meet just what it sees"
        assert row_positions[row] == positions[-1]
    # Rows with one partial write directly; the partials of all others are neighbours, each used once.
    ptr = arrays.merge_ptr.tolist()
    merge = {row: list(range(ptr[i], ptr[i + 1])) for i, row in enumerate(arrays.merge_rows.tolist())}
    for row in range(num_rows):
        assert sorted(places[row]) == merge.get(row, [-1])
    assert arrays.num_partials == sum(map(len, merge.values()))


def check_batch(batch: Batch, arrays: PlanArrays) -> None:
    check(arrays, [(slots, np.arange(len(slots))) for slots in batch.seen()])


# -- numbers -----------------------------------------------------------------------------------------------------------

# Largest error of a row, as a share of that row. Sixteen bits: some backends round the weights too.
BOUNDS = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def random_options(r: random.Random, num_q_heads: int) -> dict[str, object]:
    """A scale, and each of softcap, window and sinks in a third of the cases."""
    options: dict[str, object] = {"scale": r.choice((0.1, 0.3))}
    if r.random() < 0.33:
        options["softcap"] = r.choice((2.0, 20.0))
    if r.random() < 0.33:
        options["window"] = r.choice((1, 2, 5, 17, 60))
    if r.random() < 0.33:
        options["sinks"] = torch.linspace(-2, 2, num_q_heads)
    return options


def dense(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, seen: Sequence[np.ndarray], scale: float,
    softcap: float | None = None, window: int | None = None, sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Attention in float64, a row at a time, of nothing but the slots it sees: out [rows, Hq, D], lse [rows, Hq]."""
    num_kv_heads, v_dim = v_pages.shape[2:]
    k, v = (pages.reshape(-1, *pages.shape[2:]) for pages in (k_pages, v_pages))
    out, lse = torch.zeros(*q.shape[:2], v_dim, dtype=torch.float64), torch.zeros(q.shape[:2], dtype=torch.float64)
    for row, slots in enumerate(seen):
        visible = torch.from_numpy(slots[-window:] if window else slots)
        queries = q[row].double().view(num_kv_heads, -1, q.shape[2])
        s = torch.einsum("hgd,thd->hgt", queries, k[visible].double()).flatten(0, 1) * scale
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        lse[row] = torch.logsumexp(s if sinks is None else torch.cat([s, sinks.double()[:, None]], 1), 1)
        p = torch.exp(s - lse[row][:, None]).view(num_kv_heads, -1, len(visible))
        out[row] = torch.einsum("hgt,thd->hgd", p, v[visible].double()).flatten(0, 1)
    return out, lse


def random_pools(
    r: random.Random, batch: Batch, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V pages in one of two layouts; slots that no row sees hold NaN."""
    generator = torch.Generator().manual_seed(r.randrange(2**32))
    unused = np.setdiff1d(np.arange(batch.num_pages * batch.page_size), np.concatenate([[0], *batch.seen()]))
    pools = []
    for _ in range(2):
        x = torch.randn(batch.num_pages * batch.page_size, num_kv_heads, head_dim, generator=generator).to(dtype)
        x[unused] = float("nan")
        pools.append(x.view(batch.num_pages, batch.page_size, num_kv_heads, head_dim))
    if r.random() < 0.5:  # as TreeCache keeps them: the tokens of a head side by side
        pools = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in pools]
    return pools[0], pools[1]


def check_attention(
    batch: Batch, r: random.Random, backend: str, dtype: torch.dtype, shape: tuple[int, int, int],
    options: dict[str, object] | None = None, poison: bool = False, device: str = "cpu",
) -> None:  # fmt: skip
    """One call against ``dense``. ``shape``: KV heads, group, head_dim.

    With ``poison``, some tokens hold NaN or infinity in K and V, and one row NaN in q: the rows that see none of these
    tokens, and all rows but that one, must not notice.
    """
    num_kv_heads, group, head_dim = shape
    options = random_options(r, num_kv_heads * group) if options is None else options
    seen = batch.seen()
    k, v = random_pools(r, batch, num_kv_heads, head_dim, dtype)
    q = torch.randn(len(seen), num_kv_heads * group, head_dim, generator=torch.Generator().manual_seed(len(seen)))
    q = q.to(dtype)
    clean = torch.ones(len(seen), dtype=torch.bool)
    if poison and seen:
        # The last tokens of some rows: whole contexts of others lie before them.
        bad = {int(r.choice(seen)[-1]) for _ in range(r.randint(1, 3))}
        for slot in bad:
            where = divmod(slot, batch.page_size)
            k[where][..., r.randrange(head_dim)] = r.choice((float("nan"), float("inf"), -float("inf")))
            v[where][..., r.randrange(head_dim)] = r.choice((float("nan"), float("inf"), -float("inf")))
        window = options.get("window")
        for row, slots in enumerate(seen):
            clean[row] = bad.isdisjoint(slots[-window:].tolist() if isinstance(window, int) else slots.tolist())
        lost = r.randrange(len(seen))
        q[lost, r.randrange(num_kv_heads * group)] = float("nan")
        clean[lost] = False
    there = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    out, lse = ab.paged_tree_attention(
        q.to(device), k.to(device), v.to(device), batch.plan(), backend=backend, return_lse=True, **there
    )
    assert out.dtype == dtype and out.shape == q.shape
    out, lse = out.cpu(), lse.cpu()
    expected, expected_lse = dense(q, k, v, seen, **options)  # type: ignore[arg-type]
    error = (out.double() - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    wrong = clean & ~(error <= BOUNDS[dtype])
    assert not wrong.any(), f"rows {wrong.nonzero().flatten().tolist()}: errors {error[wrong].tolist()}"
    torch.testing.assert_close(lse[clean].double(), expected_lse[clean], rtol=1e-5, atol=1e-4)
