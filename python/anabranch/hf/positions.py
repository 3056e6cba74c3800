"""How many positions a model has embeddings for, where it looks them up in a table: found by watching a forward.

GPT-2, OPT and their kin have a learned embedding a position, others a table of sines made once. A position behind the
table's end is an index error, or a device assertion on a GPU. Configurations tell how long a context was promised, not
whether anything stops there (with rotary embeddings nothing does), nor the offset of the table's first row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_TABLE_LOOKUPS: dict[Any, Callable[..., tuple[int, Any]]] = {
    torch.ops.aten.embedding.default: lambda table, index, *_, **__: (table.shape[0], index),
    torch.ops.aten.index_select.default: lambda table, dim, index: (table.shape[dim], index),
    torch.ops.aten.gather.default: lambda table, dim, index, **__: (table.shape[dim], index),
}


class PositionTables(TorchDispatchMode):
    """Watches a forward whose rows are at two positions, `near` and `far`: notes the tables that are read there.

    Attributes:
        limit: positions from 0 that every table read so far has a row for; None: no table was read.
    """

    def __init__(self, near: int, far: int) -> None:
        super().__init__()
        self.near, self.apart = near, far - near
        self.limit: int | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.index.Tensor:
            for dim, index in enumerate(args[1]):
                self._look(args[0].shape[dim], index)
        elif func in _TABLE_LOOKUPS:
            self._look(*_TABLE_LOOKUPS[func](*args, **(kwargs or {})))
        return out

    def _look(self, size: int, index: torch.Tensor | None) -> None:
        """A table that is read at two places as far apart as the positions holds a row a position."""
        if index is None or index.is_floating_point() or index.dtype == torch.bool or size <= self.apart:
            return
        places = index.unique()
        if len(places) == 2 and int(places[1] - places[0]) == self.apart:
            limit = size - int(places[0]) + self.near
            self.limit = limit if self.limit is None else min(self.limit, limit)
