"""What a branch's new rows read beside their own branch, as callers say it and as the core takes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from anabranch._check import index_of, told
from anabranch.kv.step import Branch


class Read(NamedTuple):
    """Part of a view: some tokens of another branch.

    Attributes:
        branch: whose tokens are seen.
        start, stop: which, as indices into its context; rows of the same step count. stop=None: up to the last one that
            it has with this step. Of a fork that shares its beginning with the reader, begin at ``branch.fork_length``:
            what both share may lie in two places since one of them copied a page.
        offset: the row reads them as if it stood so many positions further on (rotary embeddings only; may be
            negative). 0: tokens are where they were written.

    >>> cache.step({me: 1}, views={me: [ab.Read(you, 0, you.length)]})  # all of `you` but what it gets in this step
    """

    branch: Branch
    start: int = 0
    stop: int | None = None
    offset: int = 0


#: one list of reads for all rows of a branch, or one for each row
Views = Mapping[Branch, Sequence[Read] | Sequence[Sequence[Read]]]


def core_views(views: Any, rows: Mapping[Branch, int]) -> tuple[dict[Branch, tuple[Any, ...]], bool]:
    """``step``'s views as the core takes them, and whether any of them turns its rows.

    Raises:
        TypeError, ValueError: not as `Views` says; the message names what.
    """
    if not isinstance(views, Mapping):
        raise TypeError(f"views: expected a dict {{branch: what its rows read}}, got {told(views)}")
    found: dict[Branch, tuple[Any, ...]] = {}
    turned = False
    for branch, given in views.items():
        if not isinstance(branch, Branch):
            raise TypeError(f"views: keys: expected branches, got {told(branch)}")
        count = rows.get(branch)
        if count is None:
            raise ValueError(f"views: {branch!r} has no rows in this step")
        if isinstance(given, (str, Read)) or not isinstance(given, Sequence):
            raise TypeError(f"views: expected a list of Read for {branch!r}, got {told(given)}")
        every = given and not isinstance(given[0], Read)
        if every and len(given) != count:
            raise ValueError(
                f"views: {len(given)} lists for the {count} rows of {branch!r}; give one a row, or one list"
            )
        reads: list[Read] = []
        ptr = [0]
        for row in given if every else [given]:
            reads += [_read(read, branch) for read in row]  # type: ignore[union-attr, arg-type]
            ptr.append(len(reads))
        if not every:
            # The same for all rows.
            ptr, reads = [len(reads) * i for i in range(count + 1)], reads * count
        turned = turned or any(read.offset for read in reads)
        found[branch] = (
            ptr,
            [read.branch for read in reads],
            [read.start for read in reads],
            [-1 if read.stop is None else read.stop for read in reads],
            [read.offset for read in reads],
        )
    return found, turned


def _read(read: Any, reader: Branch) -> Read:
    if not isinstance(read, Read):
        raise TypeError(
            f"views: expected a Read (ab.Read(branch, start, stop, offset)) for {reader!r}, got {told(read)}"
        )
    if not isinstance(read.branch, Branch):
        raise TypeError(f"views: Read.branch: expected a Branch, got {told(read.branch)}")
    start, offset = index_of(read.start), index_of(read.offset)
    stop = None if read.stop is None else index_of(read.stop)
    if start is None or start < 0 or (read.stop is not None and (stop is None or stop < 0)) or offset is None:
        raise ValueError(
            f"views: Read.start, stop and offset: expected whole numbers, start and stop ≥ 0, got {told(read)}"
        )
    if max(abs(offset), start, stop or 0) >= 2**31:
        raise ValueError(f"views: Read.start, stop and offset: must be below 2^31, got {told(read)}")
    return Read(read.branch, start, stop, offset)
