"""``BranchMask``: which token of a packed training row sees which, as a few intervals a segment. No [T, T] tensor."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from anabranch._check import told

if TYPE_CHECKING:
    from anabranch.records.result import Result
    from anabranch.records.trace import Trace
from anabranch.plan.intervals import _starts, transpose_intervals
from anabranch.records.trace_rows import trace_rows

_NOTHING = np.empty((0, 2), dtype=np.int32)


class BranchMask:
    """Visibility of T packed tokens, cut into S segments of consecutive tokens.

    All tokens of a segment see the same earlier columns, and each sees its own segment up to and including itself. A
    prompt of two tokens, two answers of two and a conclusion that sees all of them
    (``from_context([2, 2, 2, 1], [[], [0], [0], [0, 1, 2]])``)::

        1 .  . .  . .  .
        1 1  . .  . .  .
        1 1  1 .  . .  .
        1 1  1 1  . .  .
        1 1  . .  1 .  .
        1 1  . .  1 1  .
        1 1  1 1  1 1  1

    Make one with `from_tree`, `from_context`, `from_trace` or `pack`, or with a builder of ``anabranch.training``.

    The attributes are tensors on ``device``.

    Attributes:
        starts: int64 [S + 1], where each segment begins; ``starts[S]`` = T. A segment may be empty.
        row_ptr, cols: int32 [S + 1] and int32 [N, 2]; rows ``starts[s]:starts[s + 1]`` see the columns of
            ``cols[row_ptr[s]:row_ptr[s + 1]]``: intervals [begin, end), sorted, disjoint, merged, all before
            ``starts[s]``.
        positions: int64 [T], each token's logical position: what the model's ``position_ids`` should be.

    >>> mask = ab.BranchMask.from_context([2, 2, 2, 1], [[], [0], [0], [0, 1, 2]])
    >>> mask.num_tokens, mask.positions.tolist()
    (7, [0, 1, 2, 3, 2, 3, 4])
    """

    def __init__(self, starts: Tensor, row_ptr: Tensor, cols: Tensor, positions: Tensor) -> None:
        self.starts, self.row_ptr, self.cols, self.positions = starts, row_ptr, cols, positions
        self.num_tokens = int(positions.shape[0])
        self.num_copies = 0  # of the last tokens: those that `with_copies` added
        self.attended = False  # whether a layer has attended under it since a loss last asked (hf/guard.py)
        self._transposed: tuple[Tensor, Tensor] | None = None
        self._copies: dict[torch.device, BranchMask] = {starts.device: self}

    # ------------------------------------------------------------------------------------------------ making one

    @classmethod
    def from_tree(
        cls, lengths: Sequence[int], parents: Sequence[int], positions: Sequence[int] | Tensor | None = None
    ) -> BranchMask:
        """A tree, or several: segments in DFS preorder; each sees all of its ancestors.

        Args:
            lengths: [S] tokens of each segment.
            parents: [S] index of the segment that each continues, −1 for a root (several roots are blind to one
                another: so trees are packed in one row).
            positions: [T] logical positions; default: depth in the tree, counted in tokens.

        Raises:
            ValueError: lengths that do not fit the parents or the positions, a parent that comes later (out of order,
                or a cycle) or is not an ancestor of the segment before; the message names the segment.
        """
        sizes, ups = _lengths(lengths), _ints(parents, "parents")
        if len(ups) != len(sizes):
            raise ValueError(f"parents: expected one a segment ({len(sizes)}, as lengths has), got {len(ups)}")
        starts = _starts(sizes)
        begin, size = starts.tolist(), sizes.tolist()
        seen: list[np.ndarray] = []
        below: list[np.ndarray | None] = [None] * len(size)  # what the children of a segment see
        first: list[int] = []  # position of each segment's first token
        path: list[int] = []  # the segment before, and its ancestors
        for i, up in enumerate(ups.tolist()):
            if not -1 <= up < i:
                raise ValueError(_late("parents", i, "parent", up, len(size)))
            while path and path[-1] != up:
                path.pop()
            if up >= 0 and not path:
                raise ValueError(
                    f"parents: segment {i} has parent {up}, which is neither segment {i - 1} nor an ancestor of it; "
                    "give segments in DFS preorder, a segment's whole subtree right behind it (or use from_context)"
                )
            path.append(i)
            if up < 0:
                seen.append(_NOTHING)
                first.append(0)
                continue
            shared = below[up]
            if shared is None:
                shared = below[up] = _extended(seen[up], begin[up], begin[up + 1])
            seen.append(shared)
            first.append(first[up] + size[up])
        row_ptr = np.zeros(len(size) + 1, dtype=np.int32)
        np.cumsum([len(s) for s in seen], out=row_ptr[1:])
        return cls._of(starts, row_ptr, np.concatenate([_NOTHING, *seen]), np.asarray(first), positions)

    @classmethod
    def from_context(
        cls,
        lengths: Sequence[int],
        context: Sequence[Iterable[int]],
        positions: Sequence[int] | Tensor | None = None,
    ) -> BranchMask:
        """Any fork/join graph: each segment sees all of the earlier segments named for it, and no other.

        Args:
            lengths: [S] tokens of each segment.
            context: [S] for each segment the indices of the earlier ones that it sees, in any order. Nothing is
                implied: what a visible segment itself sees is listed too where it should be seen.
            positions: [T] logical positions; default: a segment begins one past the largest position it sees (after
                a join of siblings that share positions: base + longest), at 0 where it sees none.

        Raises:
            ValueError: lengths that do not fit, or a context that names a later segment (out of order, or a cycle), the
                segment itself or none there is; the message names the segment.
        """
        sizes = _lengths(lengths)
        if isinstance(context, str) or not isinstance(context, Iterable):
            raise ValueError(f"context: expected one list a segment, got {told(context)}")
        lists = []
        for i, seen in enumerate(context):
            if isinstance(seen, str) or not isinstance(seen, Iterable):
                raise ValueError(f"context: expected a list for segment {i}, got {told(seen)}; pass [] for none")
            lists.append(seen if isinstance(seen, (list, tuple)) else list(seen))
        if len(lists) != len(sizes):
            raise ValueError(f"context: expected one list a segment ({len(sizes)}, as lengths has), got {len(lists)}")
        count = np.fromiter(map(len, lists), dtype=np.int64, count=len(lists))
        segment = _ints(list(itertools.chain.from_iterable(lists)), "context")
        owner = np.repeat(np.arange(len(sizes)), count)
        if (wrong := np.flatnonzero((segment < 0) | (segment >= owner))).size:
            i, j = int(owner[wrong[0]]), int(segment[wrong[0]])
            raise ValueError(_late("context", i, "segment", j, len(sizes)))
        if not (np.diff(owner * len(sizes) + segment) > 0).all():
            pairs = np.unique(owner * len(sizes) + segment)
            owner, segment = pairs // len(sizes), pairs % len(sizes)
        starts = _starts(sizes)
        ends = np.zeros(len(sizes), dtype=np.int64)  # one past each segment's last position
        first = np.zeros(len(sizes), dtype=np.int64)
        cut = np.searchsorted(owner, np.arange(len(sizes) + 1)).tolist()
        for i, size in enumerate(sizes.tolist()):
            if cut[i] < cut[i + 1]:
                first[i] = ends[segment[cut[i] : cut[i + 1]]].max()
            ends[i] = first[i] + size
        row_ptr, cols = _merged(owner, starts[segment], starts[segment + 1], len(sizes))
        return cls._of(starts, row_ptr, cols, first, positions)

    @classmethod
    def from_intervals(cls, starts: Any, row_ptr: Any, cols: Any, positions: Any) -> BranchMask:
        """From the four arrays of a mask (see the class), checked.

        Raises:
            ValueError: naming the segment, where they are not what the class says.
        """
        begin, ptr = _ints(starts, "starts"), _ints(row_ptr, "row_ptr")
        pairs = np.asarray(cols.cpu() if isinstance(cols, Tensor) else cols, dtype=np.int64).reshape(-1, 2)
        if len(begin) < 2 or begin[0] != 0 or len(ptr) != len(begin) or ptr[0] != 0 or ptr[-1] != len(pairs):
            raise ValueError(
                f"row_ptr: expected {len(begin)} numbers from 0 to {len(pairs)}, starts from 0; got {len(ptr)} numbers"
            )
        _lengths(np.diff(begin))
        if (wrong := np.flatnonzero(np.diff(ptr) < 0)).size:
            raise ValueError(f"row_ptr: segment {wrong[0]} has {np.diff(ptr)[wrong[0]]} intervals")
        owner = np.repeat(np.arange(len(begin) - 1), np.diff(ptr))
        bad = (pairs[:, 0] < 0) | (pairs[:, 0] >= pairs[:, 1]) | (pairs[:, 1] > begin[owner])
        bad[1:] |= (owner[1:] == owner[:-1]) & (pairs[1:, 0] <= pairs[:-1, 1])
        bad |= ~(np.isin(pairs[:, 0], begin) & np.isin(pairs[:, 1], begin))
        if (wrong := np.flatnonzero(bad)).size:
            i = wrong[0]
            raise ValueError(
                f"cols: segment {owner[i]} has interval {pairs[i].tolist()}; they must be sorted, merged, of whole "
                f"segments and end before its own first token, {begin[owner[i]]}"
            )
        return cls._of(begin, ptr.astype(np.int32), pairs.astype(np.int32), begin[:-1], positions)

    @classmethod
    def from_trace(cls, trace: Trace | Result) -> BranchMask:
        """The mask of everything an engine wrote for one prompt; ``training.from_trace`` gives the tokens with it."""
        rows = trace_rows(trace)
        return cls.from_context(
            rows.sizes(), rows.sees, torch.tensor(rows.positions(), dtype=torch.int64, device="cpu")
        )

    @classmethod
    def pack(cls, masks: Iterable[BranchMask]) -> BranchMask:
        """Several masks one behind another in one row, blind to each other; positions stay as they are."""
        if isinstance(masks, BranchMask) or not isinstance(masks, Iterable):
            raise TypeError(f"masks: expected a list of BranchMasks, got {told(masks)}")
        parts = list(masks)
        if not parts:
            raise ValueError("masks: empty; pass at least one BranchMask")
        for i, part in enumerate(parts):
            if not isinstance(part, BranchMask):
                raise TypeError(f"masks[{i}]: expected a BranchMask, got {type(part).__name__}")
            if part.device != parts[0].device:
                raise ValueError(f"masks[{i}]: is on {part.device}, masks[0] on {parts[0].device}; move it there")
        tokens = list(itertools.accumulate((p.num_tokens for p in parts), initial=0))
        pairs = list(itertools.accumulate((p.cols.shape[0] for p in parts), initial=0))
        return cls(
            torch.cat([parts[0].starts[:1], *(p.starts[1:] + t for p, t in zip(parts, tokens, strict=False))]),
            torch.cat([parts[0].row_ptr[:1], *(p.row_ptr[1:] + n for p, n in zip(parts, pairs, strict=False))]),
            torch.cat([p.cols + t for p, t in zip(parts, tokens, strict=False)]),
            torch.cat([p.positions for p in parts]),
        )

    @classmethod
    def _of(
        cls, starts: np.ndarray, row_ptr: np.ndarray, cols: np.ndarray, first: np.ndarray, positions: Any
    ) -> BranchMask:
        """From arrays that fit; `first`: position of each segment's first token, where `positions` is None."""
        total = int(starts[-1])
        if positions is None:
            sizes = np.diff(starts)
            where = torch.from_numpy(np.arange(total) + np.repeat(first - starts[:-1], sizes))
        else:
            given = np.asarray(positions.detach().cpu() if isinstance(positions, Tensor) else positions)
            if given.size and given.dtype.kind not in "iu":
                raise ValueError(f"positions: expected whole numbers, got {given.dtype}")
            where = torch.from_numpy(given.astype(np.int64))
            if where.shape != (total,):
                raise ValueError(f"positions: expected [{total}], one a token, got {list(where.shape)}")
            if total and int(where.min()) < 0:
                i = int(where.argmin())
                s = int(np.searchsorted(starts, i, "right")) - 1
                raise ValueError(f"positions: token {i} (segment {s}) is at {int(where[i])}; pass numbers ≥ 0")
        return cls(torch.from_numpy(starts), torch.from_numpy(row_ptr), torch.from_numpy(cols), where)

    # ------------------------------------------------------------------------------------------------ what it is

    @property
    def num_segments(self) -> int:
        return self.starts.shape[0] - 1

    @property
    def lengths(self) -> Tensor:
        """int64 [S], tokens of each segment."""
        return self.starts.diff()

    @property
    def device(self) -> torch.device:
        return self.starts.device

    @property
    def segment_ids(self) -> Tensor:
        """int64 [T], the segment of each token."""
        return torch.repeat_interleave(torch.arange(self.num_segments, device=self.device), self.lengths)

    @property
    def previous(self) -> Tensor:
        """int64 [T], the row whose logits predict each token: the last column that it sees but itself, −1 where none.

        Inside a segment that is the row above; a segment's first token follows what its context ends with.
        """
        end, ptr = torch.full_like(self.starts[1:], -1), self.row_ptr.long()
        some = ptr[1:] > ptr[:-1]
        end[some] = self.cols[ptr[1:][some] - 1, 1].long() - 1
        before = torch.arange(-1, self.num_tokens - 1, device=self.device)
        filled = self.lengths > 0
        before[self.starts[:-1][filled]] = end[filled]
        return before

    @property
    def col_ptr(self) -> Tensor:
        """int32 [S + 1]: segment s is seen by ``rows[col_ptr[s]:col_ptr[s + 1]]``. Made at the first call."""
        return self._transpose()[0]

    @property
    def rows(self) -> Tensor:
        """int32 [M, 2]: merged, sorted intervals [begin, end) of the rows outside a segment that see all of it."""
        return self._transpose()[1]

    def dense(self) -> Tensor:
        """bool [T, T] on ``device``, True = row may attend to column. For looking and testing: it has T² entries."""
        starts, ptr, cols = (x.cpu().numpy() for x in (self.starts, self.row_ptr, self.cols))
        sees = np.zeros((self.num_tokens, self.num_tokens), dtype=bool)
        for s in range(self.num_segments):
            begin, end = starts[s], starts[s + 1]
            for b, e in cols[ptr[s] : ptr[s + 1]]:
                sees[begin:end, b:e] = True
            sees[begin:end, begin:end] = np.tri(end - begin, dtype=bool)
        return torch.from_numpy(sees).to(self.device)

    def with_copies(self, rows: Sequence[int] | Tensor) -> BranchMask:
        """The mask with one more token a row of `rows`, at the end: each sees what that row sees (but itself), on its
        position, and nobody sees it. With the same input token it computes the same, once more.

        For losses that allow one label a row where a row predicts the first tokens of several threads.
        """
        at = _ints(rows, "rows")
        if at.size and not (at.min() >= 0 and at.max() < self.num_tokens):
            raise ValueError(f"rows: expected rows from 0 to {self.num_tokens - 1}, got {at.min()} … {at.max()}")
        starts, ptr, cols = (x.cpu().numpy() for x in (self.starts, self.row_ptr, self.cols))
        edges = np.concatenate([starts[:-1], np.setdiff1d(at, starts), at + self.num_tokens])  # where segments begin
        begin = np.concatenate([edges[: len(edges) - len(at)], at])  # what each sees ends here
        order = np.argsort(edges[: len(edges) - len(at)], kind="stable")  # an empty segment stays before the next
        order = np.concatenate([order, np.arange(len(edges) - len(at), len(edges))])
        seen = []
        for row, head in zip(begin[order].tolist(), order.tolist(), strict=True):
            s = head if head < len(starts) - 1 else int(np.searchsorted(starts, row, "right")) - 1
            seen.append(_extended(cols[ptr[s] : ptr[s + 1]], int(starts[s]), max(row, int(starts[s]))))
        edges = np.concatenate([edges[order][: len(edges) - len(at)], self.num_tokens + np.arange(len(at) + 1)])
        row_ptr = np.zeros(len(edges), dtype=np.int32)
        np.cumsum([len(s) for s in seen], out=row_ptr[1:])
        where = torch.cat([self.positions, self.positions[torch.from_numpy(at).to(self.device)]])
        pairs = np.concatenate([_NOTHING, *seen])
        begins, counts, intervals = (torch.from_numpy(x).to(self.device) for x in (edges, row_ptr, pairs))
        mask = BranchMask(begins, counts, intervals, where)
        mask.num_copies = self.num_copies + len(at)
        return mask

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> BranchMask:
        """The same mask on another device; the copy is kept, so that asking again costs nothing."""
        try:
            target = torch.empty(0, device=device).device  # "cuda" → cuda:0
        except (RuntimeError, TypeError, AssertionError) as error:  # no such device, or none of its kind here
            raise ValueError(f"device: {told(device)} cannot be had here ({str(error).splitlines()[0]})") from None
        if target not in self._copies:
            parts = (self.starts, self.row_ptr, self.cols, self.positions)
            copy = BranchMask(*(x.to(target, non_blocking=non_blocking) for x in parts))
            if self._transposed is not None:
                copy._transposed = tuple(x.to(target, non_blocking=non_blocking) for x in self._transposed)  # type: ignore[assignment]
            copy.num_copies, copy._copies = self.num_copies, self._copies
            self._copies[target] = copy
        return self._copies[target]

    def _transpose(self) -> tuple[Tensor, Tensor]:
        if self._transposed is None:
            home = next((m for m in self._copies.values() if m._transposed is not None), None)
            if home is not None:
                found = home._transposed
            else:
                found = transpose_intervals(*(x.cpu().numpy() for x in (self.starts, self.row_ptr, self.cols)))
            assert found is not None
            self._transposed = (found[0].to(self.device), found[1].to(self.device))
        return self._transposed

    def __repr__(self) -> str:
        return f"BranchMask({self.num_tokens} tokens, {self.num_segments} segments, device={str(self.device)!r})"

    def __eq__(self, other: object) -> bool:
        """The same segments, visibility and positions, wherever they lie."""
        if not isinstance(other, BranchMask):
            return NotImplemented
        names = ("starts", "row_ptr", "cols", "positions")
        return all(torch.equal(getattr(self, n).cpu(), getattr(other, n).cpu()) for n in names)

    __hash__ = None  # type: ignore[assignment]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_copies": None, "_transposed": None}  # to a worker and back: itself, on its device

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._copies = {self.device: self}

    # ------------------------------------------------------------------------------------------------ pictures

    def show(self, path: str | os.PathLike[str] | None = None, *, width: int = 64, **options: Any) -> None:
        """Draw it: in the terminal, at most `width` columns wide, or as an image into `path` (see `plot`)."""
        from anabranch.attention import mask_plot as mask_picture

        if path is not None:
            self.plot(path, **options)
        else:
            mask_picture.show(self, width=width, **options)

    def plot(self, path: str | os.PathLike[str], **options: Any) -> None:
        """Write it as an image (the ending says which kind: png, svg, pdf); see ``mask_picture.plot`` for the options.

        Needs matplotlib: ``pip install 'anabranch[plots]'``.
        """
        from anabranch.attention import mask_plot as mask_picture

        mask_picture.plot(self, path, **options)


# ------------------------------------------------------------------------------------------------ bookkeeping


def _ints(values: Any, name: str) -> np.ndarray:
    """int64 [n] from a list, an array or a tensor of whole numbers."""
    try:
        array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    except ValueError:  # lists of different lengths
        raise ValueError(f"{name}: expected whole numbers in one row, got lists of different lengths") from None
    if array.size == 0 and array.ndim == 1:
        return array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{name}: expected whole numbers in one row, got shape {list(array.shape)} of {array.dtype}")
    return array.astype(np.int64)


def _lengths(values: Any) -> np.ndarray:
    lengths = _ints(values, "lengths")
    if not lengths.size:
        raise ValueError("lengths: empty; a mask has at least one segment")
    if lengths.min() < 0:
        i = int(lengths.argmin())
        raise ValueError(f"lengths: segment {i} has {lengths[i]} tokens; pass numbers ≥ 0")
    if lengths.sum() >= 2**31:
        raise ValueError(f"lengths: {lengths.sum()} tokens together; a packed row holds fewer than 2^31")
    return lengths


def _late(name: str, segment: int, what: str, other: int, count: int) -> str:
    if other == segment:
        return f"{name}: segment {segment} names itself; it sees its own earlier tokens anyway"
    if segment < other < count:
        return (
            f"{name}: segment {segment} names {what} {other}, which comes later: segments out of order, or a "
            "cycle; give each behind everything it sees"
        )
    return f"{name}: segment {segment} names {what} {other}, but there are only 0 … {count - 1}"


def _extended(seen: np.ndarray, begin: int, end: int) -> np.ndarray:
    """Intervals `seen`, all before `begin`, and [begin, end)."""
    if begin == end:
        return seen
    if len(seen) and seen[-1, 1] == begin:
        longer = seen.copy()
        longer[-1, 1] = end
        return longer
    return np.concatenate([seen, np.array([[begin, end]], dtype=np.int32)])


def _merged(owner: np.ndarray, begin: np.ndarray, end: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Intervals sorted by (owner, begin), disjoint → (ptr int32 [count + 1], int32 [n, 2]): empty ones dropped,
    neighbours merged."""
    some = begin < end
    owner, begin, end = owner[some], begin[some], end[some]
    if not owner.size:
        return np.zeros(count + 1, dtype=np.int32), _NOTHING.copy()
    opens = np.ones(len(owner), dtype=bool)
    opens[1:] = (owner[1:] != owner[:-1]) | (begin[1:] != end[:-1])
    head = np.flatnonzero(opens)
    tail = np.append(head[1:], len(owner)) - 1
    intervals = np.stack([begin[head], end[tail]], axis=1).astype(np.int32)
    return np.searchsorted(owner[head], np.arange(count + 1)).astype(np.int32), intervals
