"""Tensors for a case: the unique KV once, and the layouts that the contenders want, each built when first asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from .shapes import Case


@dataclass
class Workload:
    """One case with numbers in it.

    `keys` and `values` hold the unique tokens in depth-first order, `[tokens, kv_heads, head_dim]`; `q` is
    `[rows, q_heads, head_dim]`, as it comes out of a model's projection, and an output has the same shape.
    """

    case: Case
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.float32).normal_(generator=generator)

        kv = (self.case.unique_tokens, self.num_kv_heads, self.head_dim)
        self.keys = self._filled(kv, normal)
        self.values = self._filled(kv, normal)
        # Scores with a spread of about 2: peaked enough that a wrong weight shows, flat enough that every span counts.
        self.q = (2.0 * normal(len(self.case.rows), self.num_q_heads, self.head_dim)).to(self.dtype)
        self.scale = self.head_dim**-0.5

    def _filled(self, shape: tuple[int, ...], normal) -> torch.Tensor:
        """Random numbers straight into the wanted dtype, a slice at a time: no float32 copy of gigabytes."""
        out = torch.empty(shape, dtype=self.dtype)
        for begin in range(0, shape[0], 1 << 14):
            part = out[begin : begin + (1 << 14)]
            part.copy_(normal(*part.shape))
        return out

    @property
    def group(self) -> int:
        return self.num_q_heads // self.num_kv_heads

    @property
    def itemsize(self) -> int:
        return self.q.element_size()

    @property
    def kv_bytes(self) -> int:
        return 2 * self.case.unique_tokens * self.num_kv_heads * self.head_dim * self.itemsize

    @property
    def logical_kv_bytes(self) -> int:
        """KV bytes when every branch has a dense copy of its own context."""
        tokens = sum(max(self.case.row_lengths[i] for i in rows) for _, rows in self.case.branches)
        return 2 * tokens * self.num_kv_heads * self.head_dim * self.itemsize

    def node_slice(self, node: int) -> slice:
        start = self.case.starts[node]
        return slice(start, start + self.case.lengths[node])

    def context(self, tensor: torch.Tensor, node: int, offset: int) -> torch.Tensor:
        """The part of `tensor` (keys or values) that a row at `(node, offset)` sees: [length, kv_heads, head_dim]."""
        parts = [tensor[self.node_slice(n)] for n in self.case.path(node)[:-1]]
        start = self.case.starts[node]
        return torch.cat([*parts, tensor[start : start + offset + 1]])

    @cached_property
    def head_major(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All unique keys and values as [1, kv_heads, tokens, head_dim], contiguous (dense masked, FlexAttention)."""
        return tuple(t.transpose(0, 1).contiguous()[None] for t in (self.keys, self.values))  # type: ignore[return-value]

    @cached_property
    def row_index(self) -> torch.Tensor:
        """Index of each query row's own token in depth-first order, [rows]."""
        return torch.tensor([self.case.starts[n] + offset for n, offset in self.case.rows])

    @cached_property
    def key_end(self) -> torch.Tensor:
        """One past the subtree of each key's node, [tokens]: row i sees key j when j <= row_index[i] < key_end[j]."""
        lengths = torch.tensor(self.case.lengths)
        return torch.repeat_interleave(torch.tensor(self.case.ends), lengths)

    def packed_q(self, q: torch.Tensor) -> torch.Tensor:
        """[rows, q_heads, D] → [1, kv_heads, rows · group, D]: the query heads of a KV head as rows."""
        rows = q.shape[0]
        packed = q.view(rows, self.num_kv_heads, self.group, self.head_dim).transpose(0, 1)
        return packed.reshape(1, self.num_kv_heads, rows * self.group, self.head_dim)

    def unpacked_o(self, o: torch.Tensor) -> torch.Tensor:
        """The inverse of `packed_q`, for an output."""
        rows = o.shape[2] // self.group
        o = o.view(self.num_kv_heads, rows, self.group, self.head_dim).transpose(0, 1)
        return o.reshape(rows, self.num_q_heads, self.head_dim)


def sampled_rows(case: Case, tokens: int = 150_000) -> list[int]:
    """Query rows spread over the case, as many as `tokens` context tokens allow (at least two)."""
    mean = max(1, case.logical_tokens // len(case.rows))
    count = max(2, min(len(case.rows), tokens // mean))
    if count >= len(case.rows):
        return list(range(len(case.rows)))
    return sorted({round(i * (len(case.rows) - 1) / (count - 1)) for i in range(count)})


def oracle(work: Workload, rows: list[int]) -> torch.Tensor:
    """Attention of the given rows in float64, one row at a time over its dense context: [rows, q_heads, head_dim]."""
    out = torch.empty(len(rows), work.num_q_heads, work.head_dim, dtype=torch.float64)
    for i, row in enumerate(rows):
        node, offset = work.case.rows[row]
        q = work.q[row].double().view(work.num_kv_heads, work.group, work.head_dim)
        k = work.context(work.keys, node, offset).double().transpose(0, 1)
        v = work.context(work.values, node, offset).double().transpose(0, 1)
        weights = torch.softmax(q @ k.transpose(1, 2) * work.scale, dim=-1)
        out[i] = (weights @ v).view(work.num_q_heads, work.head_dim)
    return out


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """‖out − expected‖ / ‖expected‖ in float64."""
    return float((out.double() - expected).norm() / expected.norm())


# What a correct kernel stays under; bf16 and fp16 outputs are rounded once more at the end.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
