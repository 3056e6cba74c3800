"""Contexts as ranges of tokens by their serial numbers: short lists, however long a context is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["Range", "first", "last", "merged", "size", "union"]

Range = tuple[int, int]  # the second not included


def size(ranges: Sequence[Range]) -> int:
    """Tokens in all."""
    return sum(stop - begin for begin, stop in ranges)


def first(ranges: Sequence[Range], count: int) -> list[Range]:
    """The first `count` tokens."""
    found: list[Range] = []
    for begin, stop in ranges:
        if count <= 0:
            break
        found.append((begin, min(stop, begin + count)))
        count -= stop - begin
    return found


def last(ranges: Sequence[Range], count: int) -> list[Range]:
    """The last `count` tokens."""
    found: list[Range] = []
    for begin, stop in reversed(ranges):
        if count <= 0:
            break
        found.insert(0, (max(begin, stop - count), stop))
        count -= stop - begin
    return found


def merged(ranges: Sequence[Range]) -> list[Range]:
    """The same in as few ranges as possible; order is kept."""
    found: list[Range] = []
    for begin, stop in ranges:
        if found and found[-1][1] == begin:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((begin, stop))
    return found


def union(ranges: Iterable[Range]) -> int:
    """How many tokens lie in any of them."""
    count, end = 0, 0
    for begin, stop in sorted(ranges):
        count += max(0, stop - max(begin, end))
        end = max(end, stop)
    return count
