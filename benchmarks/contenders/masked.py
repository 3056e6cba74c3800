"""One dense attention of all query rows over all unique keys under a boolean mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .base import Call, Contender


class MaskedDense(Contender):
    """Reads the unique KV once, but computes every row against every key, seen or not."""

    name = "masked"
    title = "dense masked SDPA"

    def bytes_needed(self) -> float:
        work = self.work
        mask = len(work.case.rows) * work.case.unique_tokens
        return work.kv_bytes + mask * (1 + work.group * (1 + work.itemsize))

    def flops(self) -> float:
        work = self.work
        return 4.0 * len(work.case.rows) * work.case.unique_tokens * work.num_q_heads * work.head_dim

    def variants(self) -> dict[str, Call]:
        work = self.work
        k, v = work.head_major
        keys = torch.arange(work.case.unique_tokens)
        rows = work.row_index[:, None]
        mask = (keys <= rows) & (rows < work.key_end)

        def plain() -> torch.Tensor:
            x = work.q.transpose(0, 1)[None]
            o = F.scaled_dot_product_attention(x, k, v, attn_mask=mask, scale=work.scale, enable_gqa=work.group > 1)
            return o[0].transpose(0, 1)

        ways: dict[str, Call] = {"plain": plain}
        if work.group > 1:
            wide = mask.repeat_interleave(work.group, 0)

            def packed() -> torch.Tensor:
                o = F.scaled_dot_product_attention(work.packed_q(work.q), k, v, attn_mask=wide, scale=work.scale)
                return work.unpacked_o(o)

            ways["GQA packed"] = packed
        return ways
