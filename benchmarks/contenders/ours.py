"""anabranch itself, through the interface that users call."""

from __future__ import annotations

from collections import defaultdict

import torch

import anabranch as ab
from anabranch import backends

from ..timing import now
from ..workload import Workload
from .base import Call, Contender

PAGE_SIZE = 16


def build_tree(work: Workload, page_size: int = PAGE_SIZE):
    """Grow the case in a one-layer TreeCache with branch, fork, step and write, up to the query rows.

    Returns:
        (cache, branches in row order, rows of each): the last tokens, those with query rows, are still to be stepped.
    """
    case = work.case
    pages = sum(-(-n // page_size) + 2 for n in case.lengths)
    cache = ab.TreeCache(1, work.num_kv_heads, work.head_dim, pages, page_size, work.dtype)
    queries = {node: len(rows) for node, rows in case.branches}
    kids: dict[int, list[int]] = defaultdict(list)
    for node, parent in enumerate(case.parents):
        kids[parent].append(node)
    level = {node: cache.branch() for node in kids[-1]}
    leaves: dict[int, ab.Branch] = {}
    while level:
        grow = {node: case.lengths[node] - queries.get(node, 0) for node in level}
        stepped = {level[node]: n for node, n in grow.items() if n}
        if stepped:
            step = cache.step(stepped)
            tokens = [slice(case.starts[node], case.starts[node] + n) for node, n in grow.items() if n]
            k, v = (torch.cat([t[s] for s in tokens]).contiguous() for t in (work.keys, work.values))
            cache.write(0, k, v, step)
        below: dict[int, ab.Branch] = {}
        for node, branch in level.items():
            if node in queries:
                leaves[node] = branch
                continue
            below.update(zip(kids[node], cache.fork(branch, len(kids[node])), strict=True))
            cache.release(branch)
        level = below
    order = [node for node, _ in case.branches]
    return cache, [leaves[n] for n in order], [queries[n] for n in order]


class Ours(Contender):
    """`tree_attention` on a TreeCache; draft trees through `Plan.from_block_tables`, since every node is a row.

    `extra` tells what is paid once a step and shared by all layers: `plan_new_us` after the topology changed (step,
    contexts, work items), `plan_kept_us` while it stays.
    """

    name = "anabranch"
    title = "anabranch"

    def bytes_needed(self) -> float:
        return 1.05 * self.work.kv_bytes

    def variants(self) -> dict[str, Call]:
        work = self.work
        self.backend = backends.choose("auto", torch.device("cpu"), work.dtype, work.head_dim)
        self.tile_config = self.backend.tile_config(
            work.num_q_heads, work.num_kv_heads, work.head_dim, work.dtype, torch.device("cpu")
        )
        return self._from_tables() if work.case.via_tables else self._from_tree()

    def _from_tree(self) -> dict[str, Call]:
        work = self.work
        self.cache, branches, counts = build_tree(work)
        self.rows = dict(zip(branches, counts, strict=True))
        cache = self.cache
        start = now()
        step = cache.step(self.rows)
        step.plan.arrays(work.group, self.tile_config)
        self.extra["plan_new_us"] = (now() - start) * 1e6
        # The case's rows are in depth-first order of their nodes, and so are the step's.
        index = work.row_index
        cache.write(0, work.keys[index].contiguous(), work.values[index].contiguous(), step)
        usage = cache.usage()
        self.extra["tokens_physical"] = usage.tokens_physical
        name = getattr(self.backend, "name", "auto")
        return {name: lambda: ab.tree_attention(work.q, cache, 0, step, scale=work.scale)}

    def _from_tables(self) -> dict[str, Call]:
        work, case = self.work, self.work.case
        tables = torch.full((len(case.rows), max(case.row_lengths)), -1, dtype=torch.int32)
        for i, (node, offset) in enumerate(case.rows):
            slots = [torch.arange(case.starts[n], case.starts[n] + case.lengths[n]) for n in case.path(node)[:-1]]
            slots.append(torch.arange(case.starts[node], case.starts[node] + offset + 1))
            tables[i, : case.row_lengths[i]] = torch.cat(slots).int()
        lengths = torch.tensor(case.row_lengths)
        start = now()
        plan = ab.Plan.from_block_tables(tables, lengths, page_size=1)
        plan.arrays(work.group, self.tile_config)
        self.extra["plan_new_us"] = (now() - start) * 1e6
        k, v = (t.clone()[:, None] for t in (work.keys, work.values))
        name = getattr(self.backend, "name", "auto")
        call = lambda: ab.paged_tree_attention(work.q, k, v, plan, scale=work.scale)  # noqa: E731
        return {f"{name}, block tables": call}

    def finish(self) -> None:
        """Measure a step and its plan while the topology stays; grows the tree, so only after all timing."""
        if self.work.case.via_tables or any(n != 1 for n in self.rows.values()):
            return
        best = float("inf")
        for _ in range(6):
            try:
                start = now()
                step = self.cache.step(self.rows)
                step.plan.arrays(self.work.group, self.tile_config)
                best = min(best, now() - start)
            except ab.OutOfPages:
                break
        if best < float("inf"):
            self.extra["plan_kept_us"] = best * 1e6
