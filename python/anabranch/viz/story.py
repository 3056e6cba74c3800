"""A generation as it unfolds, from the engine's events: who wrote what, who forked, who came back. No drawing here."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from anabranch.records.events import Become, Discard, Finish, Fork, Join, Token
from anabranch.viz.card import written

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anabranch.records.result import Node, Result


@dataclass
class Branch:
    """One thread. ``parts``: its text and its forks in order; ``end``: how it left, None while it is there."""

    id: str
    parts: list[str | Block] = field(default_factory=list)
    tokens: int = 0
    inserted: str = ""  # the header it began with
    end: str | None = None

    def add(self, text: str) -> None:
        if self.parts and isinstance(self.parts[-1], str):
            self.parts[-1] += text
        else:
            self.parts.append(text)

    @property
    def text(self) -> str:
        """What it wrote itself."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def title(self) -> str:
        """Its header without markup, or its id."""
        return self.inserted.strip("*#:,.- \n") or self.id


@dataclass
class Block:
    """One fork: the children, and how they came back ("concat", …; None while they write)."""

    children: list[Branch]
    role: str = "fork"
    mode: str | None = None

    def walk(self) -> Iterator[Branch]:
        for child in self.children:
            yield child
            for part in child.parts:
                if isinstance(part, Block):
                    yield from part.walk()


@dataclass
class Pages:
    """What the cache held at one moment."""

    used: int = 0
    total: int = 0
    copied: int = 0
    logical: int = 0
    physical: int = 0

    @classmethod
    def of(cls, cache: Any, copied_before: int = 0) -> Pages:
        u = cache.usage()
        copied = u.pages_copied - copied_before
        return cls(u.pages_total - u.pages_free, u.pages_total, copied, u.tokens_logical, u.tokens_physical)

    @property
    def sharing(self) -> float:
        return self.logical / self.physical if self.physical else 1.0


class Story:
    """Feed it events of one prompt; ``trunk`` is the tree so far, ``result`` is there at the end.

    engine: whose events these are, for its cache; None for a finished story.
    """

    def __init__(self, engine: Any = None):
        self.cache = cache = getattr(engine, "cache", None)
        self.trunk = Branch("0")
        self.branches: dict[str, Branch] = {"0": self.trunk}
        self.pages = Pages()
        self.peak = Pages()
        self.sampled = 0
        self.started = time.perf_counter()
        self.first: float | None = None
        self.result: Result | None = None
        self._copied_before = cache.usage().pages_copied if cache is not None else 0

    @property
    def seconds(self) -> float:
        """Since the first sampled token."""
        return time.perf_counter() - self.first if self.first is not None else 0.0

    def take(self, event: Any) -> None:
        """One event, in order."""
        if isinstance(event, Token):
            branch = self.branches[event.thread]
            if event.inserted and not branch.parts and not branch.tokens:
                branch.inserted = event.text or ""
            branch.add(event.text or "")
            branch.tokens += len(event.token_ids)
            if not event.inserted:
                self.sampled += len(event.token_ids)
                if self.first is None:
                    self.first = time.perf_counter()
        elif isinstance(event, Fork):
            kids = [Branch(name) for name in event.children]
            self.branches.update({kid.id: kid for kid in kids})
            parts = self.branches[event.thread].parts
            if event.role == "fresh" and parts and isinstance(parts[-1], Block) and parts[-1].mode is None:
                parts[-1].children += kids  # fresh threads come one by one
            else:
                parts.append(Block(kids, event.role))
        elif isinstance(event, Join):
            gone = set(event.children)
            for part in self.branches[event.thread].parts:
                if isinstance(part, Block) and gone & {kid.id for kid in part.children}:
                    part.mode = event.mode
            for name in event.children:
                self.branches[name].end = "joined"
        elif isinstance(event, Become):
            branch, source = self.branches[event.thread], self.branches[event.source]
            branch.parts, branch.tokens = list(source.parts), source.tokens
        elif isinstance(event, Discard):
            self.branches[event.thread].end = event.reason
        elif isinstance(event, Finish):
            self.result = event.result
        if self.cache is not None and not isinstance(event, Finish):  # at the end the pages are free already
            self.pages = Pages.of(self.cache, self._copied_before)
            if self.pages.logical > self.peak.logical:
                self.peak = self.pages


def from_node(node: Node) -> Branch:
    """The same tree from a result or a trace; text that a join brought into its parent stays with the child alone."""
    branch = Branch(node.id, end=node.fate)
    branch.tokens = written(node)
    text = node.text or ""
    if not node.children:
        branch.add(text)
        return branch
    # A node's text includes what was spliced in; its own pieces are what lies before, between and behind the children.
    for kids in _blocks(node):
        spliced = "".join(kid.text or "" for kid in kids if kid.fate == "joined")
        before, found, after = text.partition(spliced) if spliced else (text, "", "")
        if spliced and not found:  # the joined text was changed on its way; then all of it is shown behind the fork
            before, after = "", text
        if before:
            branch.add(before)
        joined = any(kid.fate == "joined" for kid in kids)
        branch.parts.append(Block([from_node(kid) for kid in kids], kids[0].role, "joined" if joined else "discarded"))
        text = after
    if text:
        branch.add(text)
    return branch


def _blocks(node: Node) -> list[list[Node]]:
    """Children that were forked at the same place, in order."""
    blocks: list[list[Node]] = []
    for kid in node.children:
        if blocks and blocks[-1][0].forked_at == kid.forked_at and blocks[-1][0].role == kid.role:
            blocks[-1].append(kid)
        else:
            blocks.append([kid])
    return blocks
