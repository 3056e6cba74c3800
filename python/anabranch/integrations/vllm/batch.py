"""From what vLLM says of a step to a plan: which rows read which pages, and what they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anabranch.plan import Plan

#: (vLLM's metadata, blocks in use of each request [requests]) → block tables [requests, columns], int32, on the host
Tables = Callable[[Any, np.ndarray], np.ndarray]


def plan_of(common: Any, block_size: int, tables_of: Tables) -> Plan | None:
    """The plan of a step; None where it has no rows.

    Prefilling, decoding and chunks of prompts are alike: a request's rows are its last tokens.

    Args:
        common: vLLM's ``CommonAttentionMetadata``.
        block_size: tokens a block.
        tables_of: asked only where there are rows.

    Raises:
        ValueError: attention that is not causal, or numbers that contradict one another.
    """
    if common.causal is not True:
        raise ValueError("attn_metadata: only causal attention is supported; leave out --attention-backend CUSTOM")
    starts = common.query_start_loc_cpu[: common.num_reqs + 1].numpy().astype(np.int64)
    rows = np.diff(starts)
    real = rows > 0  # requests without rows only fill up a batch
    if not real.any():
        return None
    lengths = np.where(real, lengths_of(common), 0)
    blocks = -(-lengths // block_size)
    # As wide as the longest request there is, not as the longest there could be.
    tables = tables_of(common, blocks)[: common.num_reqs, : int(blocks.max())]
    as_tensor = torch.from_numpy
    return Plan.from_block_tables(as_tensor(tables), as_tensor(lengths), block_size, as_tensor(rows))


def lengths_of(common: Any) -> np.ndarray:
    """Tokens of each request, this step's included, on the host: int64 [requests].

    On a GPU the numbers themselves are on the device; the host knows upper bounds, which are exact as long as nobody
    guesses tokens ahead (speculative decoding, which is refused).
    """
    lengths: Tensor = common.seq_lens
    if lengths.device.type != "cpu":
        known: Tensor | None = common.seq_lens_cpu_upper_bound
        lengths = lengths.cpu() if known is None else known
    return lengths[: common.num_reqs].numpy().astype(np.int64)


def tables_on_host(common: Any, blocks: np.ndarray) -> np.ndarray:
    """The block tables as vLLM gives them; from a GPU they are copied, and everything before is waited for."""
    array: np.ndarray = common.block_table_tensor.cpu().numpy()
    return array
