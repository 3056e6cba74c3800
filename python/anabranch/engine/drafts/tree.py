"""A thread's draft: guessed tokens as a tree, and where the scores behind each of them are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch


@dataclass(eq=False)
class DraftNode:
    """One guessed token; the root stands for the thread's last token."""

    depth: int = 0
    path: int = 0  # the path that added it
    at: int = -1  # row of the step's scores that holds the next token's
    children: dict[int, DraftNode] = field(default_factory=dict)

    @property
    def main(self) -> bool:
        """On the first path, whose KV lies in the thread's own branch."""
        return self.path == 0

    def walk(self) -> Iterator[DraftNode]:
        """All nodes below this one."""
        for child in self.children.values():
            yield child
            yield from child.walk()


class Draft:
    """A tree of guesses for one thread. What paths begin with alike is one node, so a token is verified once."""

    def __init__(self, paths: Sequence[Sequence[int]], lengths: Sequence[int]):
        """paths: token ids, the likeliest first; no more of them than `lengths`, tokens of each, are taken."""
        self.root = DraftNode()
        self.paths: list[tuple[list[int], list[DraftNode]]] = []  # tokens, and the nodes that the path was first to add
        for path in paths:
            if len(self.paths) == len(lengths):
                break
            self._add([int(token) for token in path[: lengths[len(self.paths)]]])

    def _add(self, path: list[int]) -> None:
        node, added = self.root, []
        for token in path:
            if token not in node.children:
                node.children[token] = DraftNode(node.depth + 1, len(self.paths))
                added.append(node.children[token])
            node = node.children[token]
        if added:
            self.paths.append((path, added))

    @property
    def size(self) -> int:
        """Guessed tokens."""
        return sum(len(added) for _, added in self.paths)

    @property
    def rows(self) -> int:
        """Rows of a step beyond the thread's own: a path beside the first computes anew what it shares with it."""
        return sum(len(path) + (i > 0) for i, (path, _) in enumerate(self.paths))

    def shorten(self, rows: int) -> None:
        """Leave paths out, the last first, and cut the first one, until no more than `rows` (≥ 0) are taken."""
        while len(self.paths) > 1 and self.rows > rows:
            path, added = self.paths.pop()
            self._cut(path, len(path) - len(added))
        if self.paths and self.rows > rows:
            path, added = self.paths[0]
            self._cut(path, rows)
            self.paths = [(path[:rows], added[:rows])] if rows > 0 else []

    def _cut(self, path: list[int], depth: int) -> None:
        node = self.root
        for token in path[:depth]:
            node = node.children[token]
        node.children.pop(path[depth])


@dataclass(eq=False)
class Ahead:
    """A verified draft: a thread walks down its tree, a token at a time, as long as the tokens it is given are there.

    `logits` are the step's [rows, vocabulary]; `node` is where the thread stands; `first` tokens of the first path came
    true.
    """

    logits: torch.Tensor
    draft: Draft
    node: DraftNode
    first: int = 0
