"""One tree in several processes: what happens to the tree of one cache is noted, and done again to another.

A cache's pages, slots and plans follow from the order of its calls alone. So a process that makes the same calls on a
cache of the same size has, without being told any of them, the same slots and the same plan.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

from anabranch.kv.aside import KVAside
from anabranch.kv.cache import TreeCache
from anabranch.kv.step import Branch, Step
from anabranch.kv.views import Read, Views

__all__ = ["Call", "RecordedCache", "Replay", "check_of"]

#: a method's name and its arguments, each branch by its number (`Branch.serial`)
Call = tuple[Any, ...]


class RecordedCache(TreeCache):
    """A `TreeCache` that notes every call that changed its tree, for a `Replay` in another process.

    >>> cache = RecordedCache.for_model(model)
    >>> ...                                    # branch, fork, step, join, …
    >>> replay.do(cache.take())                # in the other process: a cache of the same shape and size
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._calls: list[Call] = []
        self._asides, self._numbers = count(), WeakKeyDictionary[KVAside, int]()
        self._dropped: list[Call] = []  # what was put aside and is needed no more

    def take(self) -> list[Call]:
        """What was noted since the last time, in order."""
        taken, self._calls = self._calls, []
        while self._dropped:
            taken.append(self._dropped.pop())
        return taken

    def branch(self) -> Branch:
        made = super().branch()
        self._calls.append(("branch", made.serial))
        return made

    def fork(self, branch: Branch, n: int = 1) -> list[Branch]:
        made = super().fork(branch, n)
        self._calls.append(("fork", branch.serial, [child.serial for child in made]))
        return made

    def step(
        self,
        rows: Mapping[Branch, int],
        positions: Mapping[Branch, Any] | None = None,
        views: Views | None = None,
    ) -> Step:
        step = super().step(rows, positions, views)
        places = None if positions is None else {b.serial: list(map(int, p)) for b, p in positions.items()}
        reads = None if views is None else {b.serial: _told(given) for b, given in views.items()}
        self._calls.append(("step", {b.serial: count for b, count in rows.items()}, places, reads))
        return step

    def join(self, trunk: Branch, kids: Sequence[Branch], mode: str = "concat") -> None:
        super().join(trunk, kids, mode)
        self._calls.append(("join", trunk.serial, [kid.serial for kid in kids], mode))

    def share(self, branch: Branch, sibling: Branch, count: int | None = None) -> None:
        super().share(branch, sibling, count)
        self._calls.append(("share", branch.serial, sibling.serial, count))

    def truncate(self, branch: Branch, length: int) -> None:
        super().truncate(branch, length)
        self._calls.append(("truncate", branch.serial, length))

    def release(self, branch: Branch) -> None:
        super().release(branch)
        self._calls.append(("release", branch.serial))

    def keep(self, branch: Branch) -> None:
        super().keep(branch)
        self._calls.append(("keep", branch.serial))

    def put_aside(self, branch: Branch, length: int) -> KVAside:
        aside = super().put_aside(branch, length)
        number = self._numbers[aside] = next(self._asides)
        self._calls.append(("put_aside", branch.serial, length, number))
        weakref.finalize(aside, self._dropped.append, ("drop", number))
        return aside

    def put_back(self, branch: Branch, aside: KVAside, begin: int) -> None:
        super().put_back(branch, aside, begin)
        self._calls.append(("put_back", branch.serial, self._numbers[aside], begin))


def _told(given: Any) -> list[Any]:
    """Reads with numbers for branches."""
    return [(r.branch.serial, *r[1:]) if isinstance(r, Read) else _told(r) for r in given]


def check_of(step: Step) -> int:
    """A number that two steps share if their rows have the same positions and slots (and hardly ever otherwise)."""
    positions, slots = step.plan.host_rows()
    return zlib.crc32(slots.tobytes(), zlib.crc32(positions.tobytes()))


class Replay:
    """Does to a cache what was done to a `RecordedCache` of the same shape and size."""

    def __init__(self, cache: TreeCache) -> None:
        self.cache = cache
        self._branches: dict[int, Branch] = {}
        self._asides: dict[int, KVAside] = {}

    def do(self, calls: Iterable[Call]) -> Step | None:
        """Follow these calls; the last step among them, if there is one."""
        step: Step | None = None
        for name, *args in calls:
            made = getattr(self, f"_{name}")(*args)
            step = made if name == "step" else step
        return step

    def _branch(self, number: int) -> None:
        self._branches[number] = self.cache.branch()

    def _fork(self, number: int, children: list[int]) -> None:
        made = self.cache.fork(self._branches[number], len(children))
        self._branches.update(zip(children, made, strict=True))

    def _step(self, rows: dict[int, int], positions: dict[int, Any] | None, reads: Any) -> Step:
        at = self._branches
        places = None if positions is None else {at[b]: p for b, p in positions.items()}
        views = None if reads is None else {at[b]: self._reads(given) for b, given in reads.items()}
        return self.cache.step({at[b]: count for b, count in rows.items()}, places, views)

    def _reads(self, given: list[Any]) -> Any:
        return [Read(self._branches[r[0]], *r[1:]) if isinstance(r, tuple) else self._reads(r) for r in given]

    def _join(self, trunk: int, kids: list[int], mode: str) -> None:
        self.cache.join(self._branches[trunk], [self._branches.pop(kid) for kid in kids], mode)

    def _share(self, branch: int, sibling: int, count: int | None) -> None:
        self.cache.share(self._branches[branch], self._branches[sibling], count)

    def _truncate(self, branch: int, length: int) -> None:
        self.cache.truncate(self._branches[branch], length)

    def _release(self, branch: int) -> None:
        self.cache.release(self._branches.pop(branch))

    def _keep(self, branch: int) -> None:
        self.cache.keep(self._branches[branch])

    def _put_aside(self, branch: int, length: int, number: int) -> None:
        self._asides[number] = self.cache.put_aside(self._branches[branch], length)

    def _put_back(self, branch: int, number: int, begin: int) -> None:
        self.cache.put_back(self._branches[branch], self._asides[number], begin)

    def _drop(self, number: int) -> None:
        del self._asides[number]
