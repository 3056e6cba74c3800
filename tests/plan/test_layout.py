"""The names of a plan's sections and of an item's fields: C++ and Python have the same ones, in the same order."""

from __future__ import annotations

from anabranch import _core
from anabranch.plan.layout import ITEM_FIELDS, SECTIONS, ItemField


def test_the_layout_is_the_planners() -> None:
    sections, fields, stride = _core.plan_layout()
    assert tuple(sections) == SECTIONS
    assert fields == [field.name.lower() for field in sorted(ItemField)]
    assert [field.value for field in sorted(ItemField)] == list(range(len(fields)))
    assert stride == ITEM_FIELDS >= len(fields)
