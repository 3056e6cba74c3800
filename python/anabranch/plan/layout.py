"""The layout of a plan's arrays, named once for Python.

The names and their order are those of ``csrc/plan/layout.hpp``; ``tests/plan/test_layout.py`` holds the two together.
What each field means is in docs/kernel_contract.md.
"""

from __future__ import annotations

from enum import IntEnum

#: Sections of the planner's two int32 buffers, in order: the first two are one, the others (``WORK``) the other.
SECTIONS = ("kv_strips", "kv_spelled", "items", "rows", "limits", "dest", "row_positions", "merge_rows", "merge_ptr")
WORK = SECTIONS.index("items")


class ItemField(IntEnum):
    """Columns of ``PlanArrays.items``."""

    KV_BEGIN = 0
    KV_LEN = 1
    ROW_BEGIN = 2
    ROW_COUNT = 3
    MASKED = 4
    KV_POS_MAX = 5
    ROW_POS_MIN = 6
    PARTS = 7


#: Columns of ``PlanArrays.items``, unused ones included.
ITEM_FIELDS = 8
