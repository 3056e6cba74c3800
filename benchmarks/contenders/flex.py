"""FlexAttention, compiled; making the block mask is measured apart and compilation is left out."""

from __future__ import annotations

import torch

from ..timing import once
from .base import Call, Contender, Unfit


class Flex(Contender):
    """The mask is one integer a key: row i sees key j exactly when j <= i < end[j] in depth-first order."""

    name = "flex"
    title = "FlexAttention"

    def bytes_needed(self) -> float:
        # create_block_mask evaluates the mask densely, with integers of 8 bytes in between.
        return self.work.kv_bytes + 10.0 * len(self.work.case.rows) * self.work.group * self.work.case.unique_tokens

    def variants(self) -> dict[str, Call]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        work = self.work
        k, v = work.head_major
        rows, keys = len(work.case.rows), work.case.unique_tokens
        end = work.key_end
        torch._dynamo.reset()
        compiled = torch.compile(flex_attention, dynamic=False)
        # The grouped-rows form was the faster one in every trial, and so were small query blocks, which keep branches
        # apart; a prefill chunk has rows enough for the usual block.
        packed = rows * work.group
        index = work.row_index.repeat_interleave(work.group)
        block = 128 if work.case.group == "prefill" else (16, 128)

        def mask_mod(b, h, q, kv):
            return (kv <= index[q]) & (index[q] < end[kv])

        def make():
            return create_block_mask(mask_mod, None, None, packed, keys, device="cpu", BLOCK_SIZE=block)

        mask = make()
        self.extra["mask_us"] = min(once(make) for _ in range(2)) * 1e6

        def call() -> torch.Tensor:
            with torch.no_grad():
                o = compiled(work.packed_q(work.q), k, v, block_mask=mask, scale=work.scale)
            return work.unpacked_o(o)

        try:
            call()
        except Exception as error:
            reason = str(error).strip().splitlines()[0][:160]
            raise Unfit(f"FlexAttention does not run here: {type(error).__name__}: {reason}") from error
        return {f"GQA packed, block {block}": call}
