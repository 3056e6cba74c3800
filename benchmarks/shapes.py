"""The shapes that are measured: forests of KV nodes, and the query rows that read them.

A *case* is a list of nodes in depth-first preorder, each a run of tokens with a parent, and a list of query rows,
each standing at one token of one node: it sees that token, everything before it in the node, and all ancestors.
The notation `1,16,64 / 1024,256,32` is the one used in papers on tree attention: node counts per level / tokens per
node, one query row at the end of every leaf. Most shapes come from there, so that numbers can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

HEADS = ("32/32", "32/8", "64/8", "16/8", "16/1")  # query heads / KV heads
DEFAULT_HEADS = "32/8"


@dataclass(frozen=True)
class Case:
    """One shape.

    Attributes:
        name: unique, what `--only` matches.
        lengths: tokens of each node, depth-first preorder.
        parents: index of each node's parent, -1 for a root.
        rows: `(node, offset)` of every query row, in node order.
        group: the family the case belongs to in the table.
        note: shown with the result.
        quick: part of `--quick`.
        sweep: measured with every head shape and with head_dim 64 too (the others with 32/8 and 128 alone).
    """

    name: str
    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    rows: tuple[tuple[int, int], ...]
    group: str = "tree"
    note: str = ""
    quick: bool = False
    sweep: bool = False
    via_tables: bool = field(default=False)

    @cached_property
    def starts(self) -> list[int]:
        """Index of each node's first token among all unique tokens (depth-first order)."""
        out, total = [], 0
        for n in self.lengths:
            out.append(total)
            total += n
        return out

    @cached_property
    def ends(self) -> list[int]:
        """One past the last token of each node's subtree, so that row i sees key j exactly when j <= i < ends[j]."""
        out = [s + n for s, n in zip(self.starts, self.lengths, strict=True)]
        for node in range(len(self.lengths) - 1, -1, -1):
            parent = self.parents[node]
            if parent >= 0:
                out[parent] = max(out[parent], out[node])
        return out

    @cached_property
    def depths(self) -> list[int]:
        out: list[int] = []
        for p in self.parents:
            out.append(0 if p < 0 else out[p] + 1)
        return out

    @cached_property
    def bases(self) -> list[int]:
        """Tokens above each node: the logical position of its first token."""
        out: list[int] = []
        for p in self.parents:
            out.append(0 if p < 0 else out[p] + self.lengths[p])
        return out

    def path(self, node: int) -> list[int]:
        """Node indices from the root down to `node`, both included."""
        out = []
        while node >= 0:
            out.append(node)
            node = self.parents[node]
        return out[::-1]

    @property
    def unique_tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def row_lengths(self) -> list[int]:
        """How many tokens each query row sees."""
        return [self.bases[n] + offset + 1 for n, offset in self.rows]

    @property
    def logical_tokens(self) -> int:
        """Tokens of every row's context, shared ones counted once for each row: the work that sharing saves reading."""
        return sum(self.row_lengths)

    @cached_property
    def branches(self) -> list[tuple[int, list[int]]]:
        """`(node, row indices)` of every node with query rows: what a branch-by-branch implementation loops over."""
        out: dict[int, list[int]] = {}
        for i, (node, _) in enumerate(self.rows):
            out.setdefault(node, []).append(i)
        return list(out.items())

    def flops(self, num_q_heads: int, head_dim: int) -> float:
        """Multiply-adds of q·k and p·v counted as two operations each; softmax is not counted."""
        return 4.0 * self.logical_tokens * num_q_heads * head_dim

    def bytes(self, num_q_heads: int, num_kv_heads: int, head_dim: int, itemsize: int) -> float:
        """Unique K and V read once, Q read once, the output written once."""
        kv = 2.0 * self.unique_tokens * num_kv_heads * head_dim
        return (kv + 2.0 * len(self.rows) * num_q_heads * head_dim) * itemsize


def levels(name: str, counts: list[int], tokens: list[int], **options) -> Case:
    """A balanced forest: `counts[d]` nodes of `tokens[d]` tokens at depth d, one query row at the end of each leaf."""
    lengths: list[int] = []
    parents: list[int] = []
    rows: list[tuple[int, int]] = []

    def grow(depth: int, parent: int) -> None:
        node = len(lengths)
        lengths.append(tokens[depth])
        parents.append(parent)
        if depth + 1 == len(counts):
            rows.append((node, tokens[depth] - 1))
            return
        for _ in range(counts[depth + 1] // counts[depth]):
            grow(depth + 1, node)

    for _ in range(counts[0]):
        grow(0, -1)
    return Case(name, tuple(lengths), tuple(parents), tuple(rows), **options)


def draft(name: str, prompt: int, size: int, fan: int = 4, **options) -> Case:
    """Verification of a draft tree: `size` one-token nodes under a prompt, a query row at every one of them.

    The tree is filled breadth-first with `fan` children a node, the wide shallow form that draft models propose.
    """
    kids: dict[int, list[int]] = {}
    parent_of = [-1] + [(i - 1) // fan for i in range(1, size)]
    for i, p in enumerate(parent_of):
        kids.setdefault(p, []).append(i)
    lengths, parents, rows = [prompt], [-1], []

    def walk(i: int, parent: int) -> None:
        node = len(lengths)
        lengths.append(1)
        parents.append(parent)
        rows.append((node, 0))
        for kid in kids.get(i, []):
            walk(kid, node)

    for root in kids[-1]:
        walk(root, 0)
    return Case(name, tuple(lengths), tuple(parents), tuple(rows), group="draft", via_tables=True, **options)


def chunk(name: str, context: int, rows: int, **options) -> Case:
    """Chunked prefill: the last `rows` tokens of one chain of `context` tokens are the query rows."""
    return Case(
        name, (context,), (-1,), tuple((0, i) for i in range(context - rows, context)), group="prefill", **options
    )


def all_cases() -> list[Case]:
    """Every shape, cheapest families first."""
    out = [
        levels(
            "headline 1,16 / 4096,128",
            [1, 16],
            [4096, 128],
            group="headline",
            quick=True,
            sweep=True,
            note="16 branches of 128 tokens on a 4,096-token prefix",
        ),
        levels("one query 1 / 512", [1], [512], group="chain", sweep=True),
        levels("one chain 1 / 32768", [1], [32768], group="chain", quick=True, sweep=True),
        levels("few-shot 1,10 / 4000,400", [1, 10], [4000, 400], sweep=True),
        levels("1,2,64 / 8,256,32", [1, 2, 64], [8, 256, 32]),
        levels("1,256 / 256,32", [1, 256], [256, 32]),
        levels("1,16,64 / 1024,256,32", [1, 16, 64], [1024, 256, 32], quick=True, sweep=True),
        levels("1,4,16,512 / 1024,256,128,32", [1, 4, 16, 512], [1024, 256, 128, 32]),
        levels("1,1024 / 2048,32", [1, 1024], [2048, 32]),
        levels("binary 1,2,4,..,128,1024 / 16 each", [1, 2, 4, 8, 16, 32, 64, 128, 1024], [16] * 9),
        levels("1,4,16,64,256,1024 / 256,8,256,64,32,256", [1, 4, 16, 64, 256, 1024], [256, 8, 256, 64, 32, 256]),
        levels("1,8,512 / 32,2048,256", [1, 8, 512], [32, 2048, 256]),
        levels("forest 8,16,32,256 / 512,512,256,32", [8, 16, 32, 256], [512, 512, 256, 32]),
        levels("no sharing 16 / 4096", [16], [4096], group="no sharing", sweep=True),
        levels("no sharing 256 / 4096", [256], [4096], group="no sharing"),
    ]
    out += [
        levels(f"beams 1,128 / {prefix},3", [1, 128], [prefix, 3], group="beams", quick=prefix == 1024)
        for prefix in (128, 512, 1024, 2048, 4096)
    ]
    out += [draft(f"draft {size} on 1000", 1000, size, quick=size == 64) for size in (5, 16, 64, 128, 256)]
    out += [
        levels(f"GRPO 1,{n} / {prefix},256", [1, n], [prefix, 256], group="GRPO", quick=(n, prefix) == (8, 1024))
        for prefix in (1024, 8192, 32768)
        for n in (8, 16, 64)
    ]
    out += [chunk("prefill 256 rows of 4096", 4096, 256)]
    return out


def parse_heads(text: str) -> tuple[int, int]:
    """`"32/8"` → (32, 8): query heads / KV heads."""
    try:
        q, kv = (int(x) for x in text.split("/"))
    except ValueError:
        raise ValueError(f"heads must look like 32/8 (query heads / KV heads), got {text!r}") from None
    if q < 1 or kv < 1 or q % kv:
        raise ValueError(f"heads {text!r}: query heads must be a positive multiple of KV heads")
    return q, kv
