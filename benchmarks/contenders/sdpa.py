"""One dense K and V a branch and PyTorch's scaled_dot_product_attention: what a model without a tree cache does."""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.nn.functional as F

from ..workload import Workload
from .base import Call, Contender


def batches(work: Workload) -> list[tuple[list[int], list[int], int]]:
    """Branches with equally long contexts and equally many rows together: `(nodes, row indices, rows a branch)`."""
    grouped: dict[tuple[int, int], tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for node, rows in work.case.branches:
        nodes, indices = grouped[(work.case.row_lengths[rows[-1]], len(rows))]
        nodes.append(node)
        indices.extend(rows)
    return [(nodes, rows, count) for (_, count), (nodes, rows) in grouped.items()]


class _PerBranch(Contender):
    def bytes_needed(self) -> float:
        return self.work.logical_kv_bytes

    def _dense(self) -> list[tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor | None, int]]:
        """Per batch: row indices (None: all, in order), K, V [branches, kv_heads, length, D], mask, rows a branch."""
        work, out = self.work, []
        groups = batches(work)
        for nodes, rows, count in groups:
            last = {n: max(o for m, o in (work.case.rows[r] for r in rows) if m == n) for n in nodes}
            k, v = (
                torch.stack([work.context(t, n, last[n]).transpose(0, 1) for n in nodes])
                for t in (work.keys, work.values)
            )
            mask = None
            if count > 1:  # chunked prefill: the rows are the last `count` tokens
                length = k.shape[2]
                mask = torch.ones(count, length, dtype=torch.bool).tril(length - count)
            index = None if len(groups) == 1 else torch.tensor(rows)
            out.append((index, k.contiguous(), v.contiguous(), mask, count))
        return out

    def _run(self, parts, attend) -> torch.Tensor:
        """Call `attend` for every batch and put the rows back in order."""
        work = self.work
        if len(parts) == 1:
            return attend(work.q, *parts[0][1:])
        out = torch.empty_like(work.q)
        for index, *rest in parts:
            out[index] = attend(work.q[index], *rest)
        return out


class SdpaPerBranch(_PerBranch):
    """The usual call: batch = branches, `enable_gqa` (or heads expanded beforehand, where that is faster and fits)."""

    name = "sdpa"
    title = "SDPA per branch"

    def variants(self) -> dict[str, Call]:
        work, parts = self.work, self._dense()

        def attend(gqa: bool):
            def run(q, k, v, mask, count):
                branches = k.shape[0]
                x = q.view(branches, count, work.num_q_heads, work.head_dim).transpose(1, 2)
                o = F.scaled_dot_product_attention(x, k, v, attn_mask=mask, scale=work.scale, enable_gqa=gqa)
                return o.transpose(1, 2).reshape(-1, work.num_q_heads, work.head_dim)

            return run

        ways: dict[str, Call] = {"enable_gqa": lambda: self._run(parts, attend(True))}
        if work.group == 1:
            return {"heads as they are": lambda: self._run(parts, attend(False))}
        if work.logical_kv_bytes * work.group <= 1 << 30:
            wide = [
                (i, k.repeat_interleave(work.group, 1), v.repeat_interleave(work.group, 1), m, c)
                for i, k, v, m, c in parts
            ]
            ways["heads expanded beforehand"] = lambda: self._run(wide, attend(False))
        return ways


class SdpaPacked(_PerBranch):
    """The same dense copies, but the query heads of a KV head go in as rows: SDPA's best layout for GQA decoding.

    Few write it this way; it reads K and V once a KV head instead of once a query head, so it is the fairest
    per-branch number. Without GQA it is the same call as `sdpa`.
    """

    name = "sdpa_packed"
    title = "SDPA per branch, GQA packed"

    def variants(self) -> dict[str, Call]:
        work, parts = self.work, self._dense()

        def attend(q, k, v, mask, count):
            branches = k.shape[0]
            x = q.view(branches, count, work.num_kv_heads, work.group, work.head_dim).transpose(1, 2)
            x = x.reshape(branches, work.num_kv_heads, count * work.group, work.head_dim)
            m = mask if mask is None else mask.repeat_interleave(work.group, 0)
            o = F.scaled_dot_product_attention(x, k, v, attn_mask=m, scale=work.scale)
            o = o.view(branches, work.num_kv_heads, count, work.group, work.head_dim).transpose(1, 2)
            return o.reshape(-1, work.num_q_heads, work.head_dim)

        return {"packed": lambda: self._run(parts, attend)}
