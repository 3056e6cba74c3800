"""Whole numbers and numbers as callers pass them, checked in one place. Imports neither torch nor NumPy.

A whole number is what Python itself takes as an index: ints, NumPy's integers, tensors and arrays of no dimension. Not
bools, and no floats, whole or not: they are mistakes more often than numbers.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Iterable, Sequence
from math import isfinite
from typing import Any

__all__ = [
    "index_of",
    "indices",
    "layer_of",
    "nearest",
    "number",
    "plain_name",
    "shape_of",
    "told",
    "whole",
    "whole_fields",
]


def index_of(value: Any) -> int | None:
    """`value` as an int; None where it is no whole number."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or getattr(value, "ndim", 0) != 0 or "bool" in str(getattr(value, "dtype", "")):
        return None
    try:
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: tensors without data
        return None


def plain_name(name: str) -> str:
    """A name without what people vary in it: case, spaces, hyphens and underscores."""
    return re.sub(r"[-_\s]", "", name).lower()


def nearest(name: str, known: Sequence[str], n: int = 3) -> list[str]:
    """At most `n` of the `known` names that look like `name`, the nearest first; [] where none does.

    >>> nearest("selfconsistancy", ["aspects", "self-consistency"])
    ['self-consistency']
    """
    by_plain = {plain_name(k): k for k in known}
    return [by_plain[k] for k in difflib.get_close_matches(plain_name(name), by_plain, n=n, cutoff=0.5)]


def whole(value: Any, name: str, least: int | None = 0, most: int | None = None, hint: str = "") -> int:
    """`value` as an int from `least` to `most` (None: no bound).

    Raises ValueError that begins with `name` and tells what came; `hint` is what else may be passed.
    """
    found = index_of(value)
    if found is None or (least is not None and found < least) or (most is not None and found > most):
        bounds = "" if least is None else f" of at least {least}" if most is None else f" from {least} to {most}"
        raise ValueError(f"{name}={told(value)}; pass a whole number{bounds}{hint}")
    return found


def whole_fields(record: Any, fields: Iterable[str], least: int = 1, optional: Iterable[str] = ()) -> None:
    """Make fields of a frozen dataclass ints of at least `least` (those of `optional` may be None), or raise."""
    for field in fields:
        value = getattr(record, field)
        if value is None and field in optional:
            continue
        hint = " or None" if field in optional else ""
        found = whole(value, f"{type(record).__name__}: {field}", least, hint=hint)
        object.__setattr__(record, field, found)


def indices(values: Iterable[Any], name: str, what: str = "a list of whole numbers") -> list[int]:
    """A list of ints from a list, an array or a tensor of one dimension; ValueError names the item that is none."""
    shape = getattr(values, "shape", None)
    if shape is not None and len(shape) != 1:
        raise ValueError(f"{name}: expected {what}, got {told(values)}")
    if isinstance(values, (str, bytes, dict)) or not isinstance(values, Iterable):
        raise ValueError(f"{name}: expected {what}, got {told(values)}")
    items = values.tolist() if shape is not None and hasattr(values, "tolist") else list(values)
    if all(type(item) is int for item in items):
        return items
    found = []
    for i, item in enumerate(items):
        index = index_of(item)
        if index is None:
            raise ValueError(f"{name}: item {i} is {told(item)}; pass {what}")
        found.append(index)
    return found


def number(value: Any, name: str, positive: bool = False, hint: str = "") -> float:
    """`value` as a finite float, above 0 where `positive`; ValueError that begins with `name` and tells what came."""
    if type(value) is not float:
        if isinstance(value, (bool, str, bytes)) or getattr(value, "ndim", 0) != 0:
            found = None
        else:
            try:
                found = float(value)
            except (TypeError, ValueError, RuntimeError, OverflowError):
                found = None
    else:
        found = value
    if found is None or not isfinite(found) or (positive and not found > 0):
        kind = "positive and finite" if positive else "a finite number"
        raise ValueError(f"{name}: must be {kind}{hint}, got {told(value)}")
    return found


def told(value: Any) -> str:
    """What came, for a message: a tensor or an array by shape and type, anything else short."""
    shape = getattr(value, "shape", None)
    if shape is not None and len(shape):
        return f"{type(value).__name__} of shape {list(shape)}, {getattr(value, 'dtype', '?')}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def shape_of(value: Any) -> str:
    """What came where a tensor was expected, for a message: its shape, or its type where it has none."""
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"shape {list(shape)}"


def layer_of(layer: Any, num_layers: int) -> int:
    """`layer` as an int; ValueError unless it is one of 0 … num_layers − 1."""
    found = index_of(layer)
    if found is None or not 0 <= found < num_layers:
        raise ValueError(f"layer: must be from 0 to {num_layers - 1}, got {told(layer)}")
    return found


def seeds_of(seed: Any, count: int) -> list[int]:
    """One seed a prompt."""
    one = index_of(seed)
    many = isinstance(seed, (list, tuple)) or getattr(seed, "ndim", 0) == 1
    seeds = [index_of(s) for s in seed] if many else [one] * count
    if len(seeds) != count or any(s is None or s < 0 for s in seeds):
        raise ValueError(f"seed={told(seed)}; pass a whole number ≥ 0, or a list of {count} (one a prompt)")
    return seeds  # type: ignore[return-value]
