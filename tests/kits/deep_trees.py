"""Deep trees with short nodes and one row a leaf: what items that hold a subtree are for."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

from plan_kit import Batch
from programs import Twins


def tree_batch(fans: Sequence[int], pages: int = 1, page_size: int = 4, missing: int = 0) -> Batch:
    """A balanced tree: ``fans[d]`` children of each node at depth d, ``pages`` pages a node, a row at each leaf.

    missing: tokens that the last page of every leaf lacks.
    """
    fresh = itertools.count()

    def grow(depth: int, above: list[int]) -> list[list[int]]:
        table = above + [next(fresh) for _ in range(pages)]
        if depth == len(fans):
            return [table]
        return [leaf for _ in range(fans[depth]) for leaf in grow(depth + 1, table)]

    tables = grow(0, [])
    length = len(tables[0]) * page_size - missing
    return Batch(page_size, tables, [length] * len(tables), [1] * len(tables))


def random_deep_batch(r: random.Random, most_rows: int = 40) -> Batch:
    """Trees of any form side by side, their rows in any order; some end half-way, some have no row, some have several,
    some nodes are long."""
    page_size = r.choice((1, 2, 3, 4, 8, 16))
    fresh = itertools.count()
    tables: list[list[int]] = []
    lengths: list[int] = []
    queries: list[int] = []

    def pages() -> int:
        tokens = r.choice((1, 4, 16, 30, 150)) if r.random() < 0.2 else r.randint(1, 12)
        return -(-tokens // page_size)

    def grow(depth: int, above: list[int]) -> None:
        table = above + [next(fresh) for _ in range(pages())]
        if depth == 0 or r.random() < 0.1:
            if len(tables) < most_rows:
                length = len(table) * page_size - r.randint(0, page_size - 1)
                tables.append(table)
                lengths.append(length)
                queries.append(r.choice((0, 1, 1, 1, 1, 1, 1, 1, 1, 1, min(3, length))) if r.random() < 0.3 else 1)
            return
        for _ in range(r.choice((1, 2, 2, 3, 5))):
            grow(depth - 1, table)

    for _ in range(r.choice((1, 1, 2))):
        grow(r.randint(1, 5), [])
    if r.random() < 0.5:
        order = r.sample(range(len(tables)), len(tables))
        tables, lengths, queries = ([x[i] for i in order] for x in (tables, lengths, queries))
    width = max(map(len, tables))
    place = r.sample(range(next(fresh)), next(fresh) - 1)
    tables = [[place[page] for page in t] + [place[t[0]]] * (width - len(t)) for t in tables]
    return Batch(page_size, tables, lengths, queries)


def grown_twins(
    fans: Sequence[int], tokens: int, seed: int = 0, trees: int = 1, **shape: Any
) -> tuple[Twins, list[int]]:
    """A cache with balanced trees of branches, ``tokens`` a node; the indices of their leaves in ``pairs``."""
    twins = Twins(seed=seed, **shape)
    level = [twins.branch() for _ in range(trees)]
    for fan in (*fans, 0):
        twins.step({twins.pairs.index(pair): tokens for pair in level})
        if fan:
            below = [kid for pair in level for kid in twins.fork(pair, fan)]
            for pair in level:
                twins.release(pair)
            level = below
    return twins, [twins.pairs.index(pair) for pair in level]
