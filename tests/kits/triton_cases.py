"""Random plans for the Triton kernels, with a dense float64 answer: used in the interpreter and on a GPU.

``random_case`` is a planner of its own, independent of the package's: it cuts random contexts at random places into
the arrays of docs/kernel_contract.md, so that a kernel and a planner cannot share a misreading unnoticed.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from strip_kit import lay_out


@dataclass
class Case:
    """One call and what each row may see: ``context[row]`` is (slots, positions), both int arrays."""

    q: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    arrays: SimpleNamespace
    context: list[tuple[np.ndarray, np.ndarray]]
    row_positions: np.ndarray


def random_case(
    seed: int,
    *,
    rows: int = 7,
    segments: int = 4,
    max_len: int = 90,
    tile_rows: int = 4,
    num_kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    page_size: int = 16,
    layout: str = "heads",
    device: str = "cpu",
    magnitude: float = 1.0,
    v_dim: int | None = None,
    v_in_k: bool = False,
) -> Case:
    """Contexts of 0-3 segments a row, whole or a prefix; every slot that no row sees holds NaN. v_in_k: V is the first
    v_dim columns of K."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, max_len, segments)
    num_pages = int(sum(-(-n // page_size) for n in lengths)) + 3
    free = rng.permutation(num_pages)
    slots, positions = [], []
    for n in lengths:
        pages, free = free[: -(-n // page_size)], free[-(-n // page_size) :]
        slots.append((pages[:, None] * page_size + np.arange(page_size)).ravel()[:n].astype(np.int32))
        positions.append((rng.integers(0, 40) + np.arange(n)).astype(np.int32))

    sees = [{} for _ in range(rows)]  # row -> segment -> how many of its tokens
    for row in range(rows):
        # Row 0 sees nothing at all, row 1 one whole segment, so that the empty merge and the direct write both occur.
        count = 0 if row == 0 else 1 if row == 1 else int(rng.integers(0, min(3, segments) + 1))
        for segment in sorted(rng.permutation(segments)[:count]):
            whole = row == 1 or rng.random() < 0.5
            sees[row][int(segment)] = int(lengths[segment]) if whole else int(rng.integers(0, lengths[segment] + 1))
    row_positions = rng.integers(30, 40 + max_len, rows).astype(np.int32)

    # Items: each segment cut into chunks, its rows into tiles; a row is in them all, even where it sees nothing.
    items = []  # (segment, begin, end, rows)
    for segment in range(segments):
        who = [row for row in rng.permutation(rows) if segment in sees[row]]
        cuts = np.unique(np.r_[0, rng.integers(1, lengths[segment] + 1, rng.integers(0, 3)), lengths[segment]])
        for begin, end in itertools.pairwise(cuts):
            for at in range(0, len(who), tile_rows):
                items.append((segment, int(begin), int(end), [int(r) for r in who[at : at + tile_rows]]))
    items.sort(key=lambda item: len(item[3]) * group <= 16)  # those of more than 16 packed rows first
    num_wide = sum(len(item[3]) * group > 16 for item in items)
    holders = [[i for i, item in enumerate(items) if row in item[3]] for row in range(rows)]
    merge_rows = [row for row in range(rows) if len(holders[row]) != 1]
    merge_ptr = np.r_[0, np.cumsum([len(holders[row]) for row in merge_rows])].astype(np.int32)
    partial = {}  # (item, row) -> index; rows not in here write directly
    for row, start in zip(merge_rows, merge_ptr[:-1], strict=True):
        partial |= {(item, row): int(start) + j for j, item in enumerate(holders[row])}

    table, ranges, item_rows, limits, dest = [], [], [], [], []
    for i, (segment, begin, end, who) in enumerate(items):
        seen = [min(max(sees[row][segment] - begin, 0), end - begin) for row in who]
        masked = int(any(n < end - begin for n in seen))
        pos = positions[segment][begin:end]
        table.append([0, end - begin, len(item_rows), len(who), masked, pos.max(), row_positions[who].min(), 0])
        ranges.append((slots[segment][begin:end], pos))
        item_rows.extend(who)
        limits.extend(seen if masked else [-(10**9)] * len(who))  # unread when not masked
        dest.extend(partial.get((i, row), -1) for row in who)

    def tensor(values, shape=(-1,)):
        return torch.from_numpy(np.asarray(values, dtype=np.int32).reshape(shape)).to(device)

    strip = min(16, page_size & -page_size)
    kv_strips, kv_spelled, begins = lay_out(ranges, strip, np.random.default_rng(seed))
    for item, begin in zip(table, begins, strict=True):
        item[0] = begin
    arrays = SimpleNamespace(
        items=tensor(table, (-1, 8)), kv_strips=kv_strips.to(device), kv_spelled=kv_spelled.to(device), strip=strip,
        rows=tensor(item_rows), limits=tensor(limits), dest=tensor(dest), row_positions=tensor(row_positions),
        merge_rows=tensor(merge_rows), merge_ptr=tensor(merge_ptr),
        num_items=len(items), num_partials=len(partial), num_merge=len(merge_rows), tile_rows=tile_rows,
        num_wide=num_wide, most_parts=0, counts=None,
    )  # fmt: skip

    context = []
    for row in range(rows):
        parts = [(slots[s][:n], positions[s][:n]) for s, n in sees[row].items()]
        context.append(tuple(np.concatenate([p[i] for p in parts] or [np.zeros(0, np.int32)]) for i in (0, 1)))
    gen = torch.Generator().manual_seed(seed)
    q = torch.randn(rows, num_kv_heads * group, head_dim, generator=gen) * magnitude
    k = torch.randn(num_pages * page_size, num_kv_heads, head_dim, generator=gen)
    v = torch.randn(num_pages * page_size, num_kv_heads, v_dim or head_dim, generator=gen)
    unseen = np.setdiff1d(np.arange(num_pages * page_size), np.concatenate([c[0] for c in context]))
    k[unseen] = v[unseen] = float("nan")
    k, v = (x.view(num_pages, page_size, num_kv_heads, -1).to(dtype) for x in (k, v))
    if layout == "heads":  # as TreeCache lays pages out: the tokens of a head together
        k, v = (x.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3) for x in (k, v))
    k = k.to(device)
    v = k[..., :v_dim] if v_in_k else v.to(device)
    return Case(q.to(device, dtype), k, v, arrays, context, row_positions)


def dense(
    case: Case,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    flat: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every row over its own gathered context, on the CPU: (out [rows, Hq, E], lse [rows, Hq]).

    In float64; with ``flat`` as an ordinary kernel of the inputs' dtype does it: float32 scores, probabilities rounded
    to the dtype, float32 sums, the output rounded.
    """
    work = torch.float32 if flat else torch.float64
    dtype = case.q.dtype
    q, k, v = (x.detach().cpu().to(work) for x in (case.q, case.k_pages, case.v_pages))
    num_q_heads, group = q.shape[1], q.shape[1] // k.shape[2]
    k, v = (x.reshape(-1, *x.shape[2:]) for x in (k, v))
    out = torch.zeros(*q.shape[:2], v.shape[2], dtype=work)
    lse = torch.full(q.shape[:2], -math.inf, dtype=work)
    for row, (slots, positions) in enumerate(case.context):
        if window is not None:
            slots = slots[case.row_positions[row] - positions < window]
        kk, vv = (x[torch.from_numpy(slots).long()].repeat_interleave(group, 1) for x in (k, v))
        s = scale * torch.einsum("hd,nhd->hn", q[row], kk)
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        extra = s.new_zeros(num_q_heads, 0) if sinks is None else sinks.cpu().to(work)[:, None]
        every = torch.cat([s, extra], 1)
        if every.shape[1] == 0:
            continue
        m = every.amax(1, keepdim=True)
        p, total = torch.exp(s - m), torch.exp(every - m).sum(1, keepdim=True)
        if flat:
            p = p.to(dtype).to(work)
        out[row] = torch.einsum("hn,nhd->hd", p, vv) / total
        lse[row] = (m + torch.log(total))[:, 0]
    return (out.to(dtype) if flat else out), lse


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """‖got − want‖ / ‖want‖ in float64."""
    got, want = got.detach().cpu().double(), want.double()
    return float(torch.linalg.vector_norm(got - want) / torch.linalg.vector_norm(want).clamp_min(1e-300))


def check(case: Case, got: tuple[torch.Tensor, torch.Tensor], **options) -> None:
    """float32: 1e-5 of the float64 answer; 16 bits: at most twice a flat kernel's error. Empty rows are exact."""
    out, lse = got
    want, want_lse = dense(case, **options)
    assert out.dtype == case.q.dtype and lse.dtype == torch.float32
    assert torch.isfinite(out).all(), "NaN or inf in the output"
    if case.q.dtype == torch.float32:
        bound = 1e-5
    else:
        bound = 2 * relative_error(dense(case, flat=True, **options)[0], want)
    assert relative_error(out, want) <= bound
    finite = torch.isfinite(want_lse)
    assert torch.equal(torch.isfinite(lse.cpu()), finite)
    assert bool((lse.cpu()[~finite] == -math.inf).all())
    assert bool((out.cpu()[~finite] == 0).all())
    assert torch.allclose(lse.cpu().double()[finite], want_lse[finite], rtol=1e-5, atol=1e-5)
