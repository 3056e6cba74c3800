"""A copy on the host of block tables that vLLM keeps on a GPU.

Its newer runner sends new block numbers to the device and keeps no table on the host. Reading one back would have the
host wait for the device in every step. So what the runner writes is written down here too.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import numpy as np

from anabranch.integrations.vllm import batch
from anabranch.integrations.vllm.plugin import logger

#: steps in which the copy is compared with the device's tables before it is relied on
CHECKS = 64


class Mirror:
    """The block tables of this process's runner, as the runner itself was told of them."""

    _installed: Mirror | None = None

    def __init__(self) -> None:
        self._rows: weakref.WeakKeyDictionary[Any, list[np.ndarray]] = weakref.WeakKeyDictionary()
        self._left = CHECKS  # comparisons
        self._right = True

    @classmethod
    def install(cls) -> Mirror:
        """The mirror of this process. The first call has vLLM's ``BlockTables`` report to it, which is to be before a
        runner has any."""
        if cls._installed is None:
            from vllm.v1.worker.gpu.block_table import BlockTables

            mirror = cls._installed = cls()
            append = BlockTables.append_block_ids

            @functools.wraps(append)
            def append_and_tell(tables: Any, req_index: int, new_block_ids: Any, overwrite: bool) -> None:
                begins = [
                    0 if overwrite else int(tables.num_blocks.np[i, req_index]) for i in range(len(new_block_ids))
                ]
                append(tables, req_index, new_block_ids, overwrite)
                mirror.append(tables, req_index, new_block_ids, begins)

            BlockTables.append_block_ids = append_and_tell
        return cls._installed

    def append(self, tables: Any, req_index: int, new_block_ids: Any, begins: list[int]) -> None:
        """Blocks were added to a request's row, behind the first `begins` of each group of layers."""
        kept = self._rows.get(tables)
        if kept is None:
            shapes = [tuple(x.shape) for x in tables.input_block_tables]
            kept = self._rows[tables] = [np.zeros(shape, dtype=np.int32) for shape in shapes]
        for rows, ids, begin in zip(kept, new_block_ids, begins, strict=False):
            rows[req_index, begin : begin + len(ids)] = 0 if tables.redirect_writes_to_null_block else ids

    def tables(self, common: Any, blocks: np.ndarray) -> np.ndarray:
        """The block tables of a step's requests, the first `blocks` of each: from here where that is sure, else copied
        from the device."""
        known = self._find(common) if self._right else None
        if known is None:
            return batch.tables_on_host(common, blocks)
        return self._compared(common, blocks, known) if self._left > 0 else known

    def _find(self, common: Any) -> np.ndarray | None:
        """The rows of the step's requests; None where the tables are none of those that were reported here."""
        if common.req_idx is None:
            return None
        address = common.block_table_tensor.data_ptr()
        for tables, kept in self._rows.items():
            for on_device, rows in zip(tables.input_block_tables, kept, strict=False):
                if on_device.data_ptr() == address:
                    found: np.ndarray = rows[np.asarray(common.req_idx[: common.num_reqs])]
                    return found
        return None

    def _compared(self, common: Any, blocks: np.ndarray, known: np.ndarray) -> np.ndarray:
        """The device's tables; where ours differ, they are not used again."""
        true = batch.tables_on_host(common, blocks)
        if int(common.slot_mapping[0]) < 0:  # a step that only warms up, with tables of zeros
            return true
        self._left -= 1
        in_use = np.arange(known.shape[1]) < blocks[:, None]  # behind that, either may hold what was there before
        if (in_use & (true[: common.num_reqs] != known)).any():
            self._right = False
            logger.warning(
                "anabranch: its copy of the block tables differs from the GPU's own, which are read from now on "
                "(slower, and right). Please report this with the versions of vLLM and anabranch."
            )
        return true
