"""`PrefixCache`: contexts that were computed once, found again by their tokens.

A radix tree over kept branches. A node is a run of tokens behind its parent's; each leaf has a branch that holds the
whole way from the root, so that any node can be forked from a leaf below it. What was used longest ago goes first,
from its end, a page at a time; `TreeCache` asks for it when a step runs out of pages, before anybody is told.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import count
from operator import eq

from anabranch.kv.cache import TreeCache
from anabranch.kv.step import Branch

SWEEP = 1000  # entries of a heap that is too small to be tidied


class _Node:
    """A run of tokens; ``end``: how many there are from the root to its last; ``branch``: a leaf's, of that length."""

    __slots__ = ("branch", "children", "end", "parent", "tokens", "used")

    def __init__(self, tokens: tuple[int, ...], parent: _Node | None, used: int):
        self.tokens, self.parent, self.used = tokens, parent, used
        self.end: int = (0 if parent is None else parent.end) + len(tokens)
        self.children: dict[int, _Node] = {}
        self.branch: Branch | None = None

    @property
    def held(self) -> Branch:
        assert self.branch is not None
        return self.branch


class PrefixCache:
    """Contexts of a `TreeCache`, kept for who begins alike.

    Only contexts that are one dense sequence belong here: token i on position i, computed with all before it in sight.
    Then whoever begins with the same tokens has the same keys and values, whatever else it has in mind.

    Example::

        prefixes = PrefixCache(cache)               # the cache now gives up what is kept when pages run out
        prefixes.keep(branch, token_ids)            # takes the branch over
        found = prefixes.fork(other_ids, most=len(other_ids) - 1)      # None, or a branch with the first tokens
    """

    def __init__(self, cache: TreeCache):
        self.cache = cache
        self.limit: int | None = None  # longest context to keep or to look for; None: any
        self.epoch = 0  # rises when all was forgotten
        self.lookups = self.hits = self.tokens_asked = self.tokens_found = 0
        self._root = _Node((), None, 0)
        self._clock = count(1)
        self._order = count()  # of equal ages in the heap
        self._leaves: list[tuple[int, int, _Node]] = []  # a heap by age; entries that no longer hold are passed over
        self._sweep_at = SWEEP  # so many of them make it worth while to look for those
        cache.reclaim = self.reclaim

    # -- what is there -----------------------------------------------------------------------------------------------
    def longest(self, token_ids: Sequence[int], most: int) -> int:
        """How many of the first `most` tokens `fork` would find: whole pages, so that none has to be copied for whoever
        goes on behind them; where it is less than a page, all there are."""
        if most < 1 or (self.limit is not None and most > self.limit):
            return 0
        node, shared = self._walk(token_ids, most)
        return self._whole_pages(node.end - len(node.tokens) + shared)

    def cost(self, token_ids: Sequence[int], most: int) -> tuple[int, int]:
        """How many tokens `fork` would find, and how many pages fewer would then be free: those that no live branch
        holds."""
        length = self.longest(token_ids, most)
        if not length:
            return 0, 0
        node, _ = self._walk(token_ids, length)
        return length, self.cache.kept_pages(self._leaf(node), length)

    def fork(self, token_ids: Sequence[int], most: int) -> Branch | None:
        """A branch of the caller's own with the first of `token_ids`, at most `most`, that are there (see `longest`).
        None: there are none."""
        if most < 1 or (self.limit is not None and most > self.limit):
            return None
        length = self.longest(token_ids, most)
        self.lookups += 1
        self.tokens_asked += most
        if not length:
            return None
        self.hits += 1
        self.tokens_found += length
        node, shared = self._walk(token_ids, length)
        if shared < len(node.tokens):
            node = self._split(node, shared)
        self._touch(node)
        branch = self.cache.fork(self._leaf(node), 1)[0]
        if branch.length > length:
            self.cache.truncate(branch, length)
        return branch

    # -- coming and going --------------------------------------------------------------------------------------------
    def keep(self, branch: Branch, token_ids: Sequence[int]) -> None:
        """Takes over a branch that holds `token_ids` (and maybe more behind them): a dense sequence from position 0."""
        if self.limit is not None and len(token_ids) > self.limit:
            self.cache.release(branch)
            return
        if branch.length > len(token_ids):
            self.cache.truncate(branch, len(token_ids))
        node, shared = self._walk(token_ids, len(token_ids))
        length = node.end - len(node.tokens) + shared
        if length == len(token_ids):  # nothing new
            if node is not self._root:
                self._touch(self._split(node, shared) if shared < len(node.tokens) else node)
            self.cache.release(branch)
            return
        if shared < len(node.tokens):
            node = self._split(node, shared)
        elif node.branch is not None:  # a leaf that goes on: what is kept now holds it as well
            self.cache.release(node.branch)
            node.branch = None
        leaf = _Node(tuple(token_ids[length:]), node, 0)
        leaf.branch = branch
        node.children[leaf.tokens[0]] = leaf
        self.cache.keep(branch)
        self._touch(leaf)

    def reclaim(self, pages: int) -> bool:
        """Give up what was used longest ago until so many pages are free and not kept; False when nothing is left that
        could be given up."""
        while (missing := pages - self._free()) > 0:
            leaf = self._oldest()
            if leaf is None:
                return False
            self._shorten(leaf, missing)
        return True

    def clear(self) -> None:
        """Forget everything; what was computed before is not to be kept later (see `epoch`)."""
        pending = [self._root]
        while pending:
            node = pending.pop()
            pending += node.children.values()
            if node.branch is not None:
                self.cache.release(node.branch)
        self._root = _Node((), None, 0)
        self._leaves.clear()
        self.epoch += 1

    # -- inside ------------------------------------------------------------------------------------------------------
    def _whole_pages(self, length: int) -> int:
        size = self.cache.page_size
        return length if length < size else length - length % size

    def _free(self) -> int:
        usage = self.cache.usage()
        return usage.pages_free - usage.pages_kept

    def _walk(self, token_ids: Sequence[int], most: int) -> tuple[_Node, int]:
        """The last node on the way of the first `most` tokens, and how many of its own tokens are on it."""
        node, shared, at = self._root, 0, 0
        while at < most and (child := node.children.get(token_ids[at])) is not None:
            there = tuple(token_ids[at : min(at + len(child.tokens), most)])
            shared = _alike(there, child.tokens)
            node, at = child, at + shared
            if shared < len(child.tokens):
                break
        return node, shared if node is not self._root else 0

    @staticmethod
    def _leaf(node: _Node) -> Branch:
        """A branch that holds a node's tokens."""
        while node.branch is None:
            node = next(iter(node.children.values()))
        return node.branch

    def _split(self, node: _Node, at: int) -> _Node:
        """Cut a node in two; its first `at` tokens get a node of their own, which is returned."""
        assert node.parent is not None
        head = _Node(node.tokens[:at], node.parent, node.used)
        node.parent.children[head.tokens[0]] = head
        node.tokens, node.parent = node.tokens[at:], head
        head.children[node.tokens[0]] = node
        return head

    def _touch(self, node: _Node) -> None:
        """It was used now, and with it all that it stands on."""
        now = next(self._clock)
        if node.branch is not None:
            heapq.heappush(self._leaves, (now, next(self._order), node))
        above: _Node | None = node
        while above is not None:
            above.used, above = now, above.parent
        if len(self._leaves) > self._sweep_at:
            self._leaves = [entry for entry in self._leaves if not self._stale(entry)]
            heapq.heapify(self._leaves)
            self._sweep_at = max(SWEEP, 4 * len(self._leaves))  # so that each entry is looked at a few times in all

    @staticmethod
    def _stale(entry: tuple[int, int, _Node]) -> bool:
        used, _, node = entry
        return node.branch is None or node.used != used

    def _oldest(self) -> _Node | None:
        """The leaf that was used longest ago."""
        while self._leaves and self._stale(self._leaves[0]):
            heapq.heappop(self._leaves)
        return self._leaves[0][2] if self._leaves else None

    def _shorten(self, leaf: _Node, pages: int) -> None:
        """Take the last `pages` pages off a leaf; where all of its tokens go, so does the leaf."""
        parent, branch, size = leaf.parent, leaf.held, self.cache.page_size
        assert parent is not None
        length = (-(-leaf.end // size) - pages) * size
        if length > parent.end:
            self.cache.truncate(branch, length)
            leaf.tokens = leaf.tokens[: length - parent.end]
            leaf.end = length
            return
        del parent.children[leaf.tokens[0]]
        leaf.branch = None
        if parent.children or parent is self._root:
            self.cache.release(branch)
            return
        self.cache.truncate(branch, parent.end)
        parent.branch = branch
        heapq.heappush(self._leaves, (parent.used, next(self._order), parent))


def _alike(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    """With how many equal tokens both begin."""
    if first == second[: len(first)]:
        return min(len(first), len(second))
    return list(map(eq, first, second)).index(False)
