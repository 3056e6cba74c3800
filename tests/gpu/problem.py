"""One case of benchmarks/shapes.py as tensors on a device: a page pool a layer, block tables over it, queries."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from benchmarks.shapes import Case

MOST_PAGE = 16
MOST_LAYERS = 8
POOL_BYTES = 4e9  # that the layers' pools may take together


def page_size_of(case: Case) -> int:
    """The largest page, up to 16 tokens, that every node with children fills to its end: pages are shared whole."""
    return math.gcd(MOST_PAGE, *(case.lengths[parent] for parent in case.parents if parent >= 0))


@dataclass
class Problem:
    """Random numbers for a case.

    Every layer has K and V of its own, as in a model, so that none finds its KV in the cache that the one before left.

    Attributes:
        storage: [layers, 2, pages, num_kv_heads, page_size, head_dim]; a head's tokens lie together, as in TreeCache.
        q: [rows, num_q_heads, head_dim], the rows of all sequences in order.
    """

    case: Case
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"
    seed: int = 0
    most_layers: int = MOST_LAYERS

    def __post_init__(self) -> None:
        case = self.case
        self.page_size = page_size_of(case)
        self.group = self.num_q_heads // self.num_kv_heads
        self.scale = self.head_dim**-0.5
        self.pages_of: list[range] = []  # of each node
        total = 0
        for length in case.lengths:
            count = -(-length // self.page_size)
            self.pages_of.append(range(total, total + count))
            total += count
        self.num_pages = total
        # A sequence is a node with query rows: they are its last tokens.
        self.sequences = [(node, len(rows)) for node, rows in case.branches]
        if [row for _, rows in case.branches for row in rows] != list(range(len(case.rows))):
            raise ValueError(f"{case.name}: rows of a branch are not neighbours")
        size = (2, total, self.num_kv_heads, self.page_size, self.head_dim)
        kv_bytes = math.prod(size) * self.dtype.itemsize
        self.layers = int(min(self.most_layers, max(1, POOL_BYTES // kv_bytes)))
        gen = torch.Generator(self.device).manual_seed(self.seed)
        self.storage = torch.empty(self.layers, *size, dtype=self.dtype, device=self.device)
        for part in self.storage.view(-1).split(1 << 28):
            part.normal_(generator=gen)
        q = torch.randn(len(case.rows), self.num_q_heads, self.head_dim, generator=gen, device=self.device)
        self.q = (2 * q).to(self.dtype)

    def k_pages(self, layer: int) -> torch.Tensor:
        """[pages, page_size, num_kv_heads, head_dim], a view."""
        return self.storage[layer % self.layers, 0].transpose(1, 2)

    def v_pages(self, layer: int) -> torch.Tensor:
        return self.storage[layer % self.layers, 1].transpose(1, 2)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [self.case.bases[node] + self.case.lengths[node] for node, _ in self.sequences]

    @cached_property
    def queries(self) -> list[int]:
        """Query rows of each sequence."""
        return [count for _, count in self.sequences]

    @cached_property
    def pages_of_sequence(self) -> list[list[int]]:
        return [[page for n in self.case.path(node) for page in self.pages_of[n]] for node, _ in self.sequences]

    @cached_property
    def tables(self) -> torch.Tensor:
        """int32 [sequences, columns] on the CPU, −1 behind a sequence's end."""
        columns = max(map(len, self.pages_of_sequence))
        return torch.tensor([pages + [-1] * (columns - len(pages)) for pages in self.pages_of_sequence]).int()

    def slots_of_sequence(self, sequence: int) -> torch.Tensor:
        """int64 [length]: where each token of a sequence lies (page · page_size + offset)."""
        pages = torch.tensor(self.pages_of_sequence[sequence])
        slots = (pages[:, None] * self.page_size + torch.arange(self.page_size)).flatten()
        return slots[: self.lengths[sequence]]

    @cached_property
    def unique_slots(self) -> torch.Tensor:
        """int64 [unique tokens], depth-first order of the nodes."""
        return torch.cat(
            [
                pages.start * self.page_size + torch.arange(n)
                for pages, n in zip(self.pages_of, self.case.lengths, strict=True)
            ]
        )

    def gather(self, slots: torch.Tensor, layer: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V at slots (any shape S): [*S, num_kv_heads, head_dim]."""
        slots = slots.to(self.device)
        page, offset = slots // self.page_size, slots % self.page_size
        return self.k_pages(layer)[page, offset], self.v_pages(layer)[page, offset]

    def moved_bytes(self) -> float:
        return self.case.bytes(self.num_q_heads, self.num_kv_heads, self.head_dim, self.dtype.itemsize)

    def flops(self) -> float:
        return self.case.flops(self.num_q_heads, self.head_dim)

    def sampled(self, most: int = 6) -> list[int]:
        """A few query rows, the first and the last among them."""
        count = len(self.case.rows)
        return sorted({round(i * (count - 1) / max(1, most - 1)) for i in range(most)})

    def oracle(self, rows: list[int]) -> torch.Tensor:
        """float64 [len(rows), num_q_heads, head_dim] of layer 0, each row over its own dense context."""
        first, where = 0, {}
        for sequence, count in enumerate(self.queries):
            where.update({first + j: (sequence, count - 1 - j) for j in range(count)})
            first += count
        out = []
        for row in rows:
            sequence, unseen = where[row]
            slots = self.slots_of_sequence(sequence)
            k, v = (x.double().transpose(0, 1) for x in self.gather(slots[: len(slots) - unseen]))
            q = self.q[row].double().view(self.num_kv_heads, self.group, self.head_dim)
            weights = torch.softmax(q @ k.transpose(1, 2) * self.scale, -1)
            out.append((weights @ v).view(self.num_q_heads, self.head_dim))
        return torch.stack(out)
