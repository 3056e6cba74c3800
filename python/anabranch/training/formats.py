"""One builder for each training layout of the field: token ids in, a `Layout` out. What each system shows its model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from anabranch.records.rows import Rows
from anabranch.training.layout import Layout, layout_of

__all__ = [
    "Block",
    "Inserted",
    "grpo",
    "multiverse",
    "npr",
    "parallel_r1",
    "parathinker",
    "separate",
    "threadweaver",
    "trie",
]

Ids = Sequence[int]


@dataclass(frozen=True)
class Block:
    """Threads side by side, within a text that the model writes.

    threads: what the model writes in each: token ids, or pieces (ids and further Blocks) where threads fork again.
    headers: one a thread: ids that the runtime begins it with.
    after: ids that the runtime inserts behind the last thread.
    next_headers: what takes a header's place where the threads stand one behind another (ThreadWeaver only).
    """

    threads: Sequence[Any]  # Ids | Pieces
    headers: Sequence[Ids] | None = None
    after: Ids = ()
    next_headers: Sequence[Ids] | None = None

    def __post_init__(self) -> None:
        if not self.threads:
            raise ValueError("threads: empty; a Block has at least one thread")
        for name in ("headers", "next_headers"):
            given = getattr(self, name)
            if given is not None and len(given) != len(self.threads):
                raise ValueError(f"{name}: expected one for each of the {len(self.threads)} threads, got {len(given)}")

    def header(self, i: int, flat: bool = False) -> list[int]:
        lists = self.next_headers if flat and i and self.next_headers is not None else self.headers
        return list(lists[i]) if lists is not None else []


@dataclass(frozen=True)
class Inserted:
    """Token ids that the runtime puts into a text: seen by all that follows, never learnt."""

    ids: Ids


Pieces = Sequence[Ids | Block | Inserted]


# ------------------------------------------------------------------------------------------------ merged in a trie


def trie(sequences: Sequence[Sequence[tuple[Ids, bool, bool]]]) -> Layout:
    """Whole sequences merged in a token trie: what several share from their beginning on is there once.

    sequences: each a list of runs ``(ids, written, learnt)``: does the model write them, and is there loss on them
        *in this sequence*. A shared token is written, or learnt, if it is in any of them.

    Position = depth in the trie, and a token sees its ancestors. Segments come in DFS preorder, so that the first
    sequence stands in one piece.
    """
    if not sequences:
        raise ValueError("sequences: empty; pass at least one")
    ids: list[int] = []
    flags: list[list[bool]] = []  # written, learnt
    children: list[dict[int, int]] = [{}]  # of node n − 1; children[0]: the roots
    for runs in sequences:
        node = 0
        for tokens, written, learnt in runs:
            for token in tokens:
                kid = children[node].get(token)
                if kid is None:
                    ids.append(token)
                    flags.append([False, False])
                    children.append({})
                    kid = children[node][token] = len(ids)
                node = kid
                flags[node - 1][0] |= written
                flags[node - 1][1] |= learnt
    rows = Rows()
    stack: list[tuple[int, list[int], int]] = [(kid, [], 0) for kid in reversed(children[0].values())]
    while stack:
        node, sees, depth = stack.pop()
        run = [node]
        while len(children[run[-1]]) == 1:
            run.append(next(iter(children[run[-1]].values())))
        segment = rows.add(
            [ids[n - 1] for n in run], sees, depth, [flags[n - 1][0] for n in run], [flags[n - 1][1] for n in run]
        )
        below = [*sees, segment]
        stack += [(kid, below, depth + len(run)) for kid in reversed(children[run[-1]].values())]
    return layout_of(rows)


def threadweaver(prompt: Ids, pieces: Pieces, *, flat_loss: bool = False, sequential: bool = False) -> Layout:
    """ThreadWeaver: the flattened trajectory, and one ``prefix + header + thread`` a thread, merged in a token trie.

    The first thread of a block is there once; each later one twice: alone, as it is written, and behind its siblings,
    as those after the join see it. What follows a block sees the flattened threads.

    prompt: no loss. pieces: ids that the model writes, and `Block`\\ s (not nested: the format has no nesting).
    flat_loss: loss also on the copies of threads 2, 3, … that stand behind their siblings.
    sequential: loss on all of the flattened trajectory, headers included, as if the model wrote it in one go; so the
        same model learns to decode without forking.
    """
    flat: list[tuple[Ids, bool, bool]] = [(prompt, False, False)]
    branches = []
    for i, piece in enumerate(pieces):
        if not isinstance(piece, Block):
            ids, own = (piece.ids, sequential) if isinstance(piece, Inserted) else (piece, True)
            flat.append((ids, own, own))
            continue
        prefix = [(ids, written, False) for ids, written, _ in flat]
        for j, thread in enumerate(piece.threads):
            if any(not isinstance(token, int) for token in thread):
                raise ValueError(f"pieces[{i}]: thread {j} holds a Block or a list; ThreadWeaver's threads do not fork")
            branches.append([*prefix, (piece.header(j), False, False), (thread, True, True)])
            flat.append((piece.header(j, flat=True), sequential, sequential))
            flat.append((thread, True, sequential or flat_loss or j == 0))
        flat.append((piece.after, sequential, sequential))
    return trie([flat, *branches])


# ------------------------------------------------------------------------------------------------ side by side


def _side_by_side(prompt: Ids, pieces: Pieces) -> Layout:
    rows = Rows()
    count = 0  # of threads so far

    def write(pieces: Pieces, sees: list[int], at: int, thread: int) -> tuple[list[int], int]:
        """The segments of some pieces, and one past their largest position."""
        nonlocal count
        own: list[int] = []
        for piece in pieces:
            if not isinstance(piece, Block):
                ids, mine = (piece.ids, False) if isinstance(piece, Inserted) else (piece, True)
                if ids:
                    own.append(rows.add(ids, [*sees, *own], at, mine, thread=thread))
                    at += len(ids)
                continue
            before, longest = [*sees, *own], at
            for j, content in enumerate(piece.threads):
                count += 1
                name, kid, end = count, [], at
                if header := piece.header(j):
                    kid.append(rows.add(header, before, at, False, thread=name))
                    end = at + len(header)
                inner = [content] if all(isinstance(x, int) for x in content) else content
                more, end = write(inner, [*before, *kid], end, name)
                own += [*kid, *more]
                longest = max(longest, end)
            at = longest
            if piece.after:
                own.append(rows.add(piece.after, [*sees, *own], at, False, thread=thread))
                at += len(piece.after)
        return own, at

    if not prompt:
        raise ValueError("prompt: empty; a row begins with at least one token that the model does not write")
    root = rows.add(prompt, [], 0, False)
    write(pieces, [root], len(prompt), 0)
    return layout_of(rows)


def multiverse(prompt: Ids, pieces: Pieces) -> Layout:
    """Multiverse: siblings masked from each other both ways, all beginning on one position; what follows them sees all
    of them, from base + longest on.

    prompt: no loss. pieces: ids that the model writes (the goal and its outlines, the conclusion, …) and `Block`\\ s
    of ``<Path>…</Path>``, which may hold Blocks themselves; loss on what the model writes, none on headers and
    ``after``.
    """
    return _side_by_side(prompt, pieces)


def npr(prompt: Ids, pieces: Pieces) -> Layout:
    """NPR: Multiverse's mask and positions, with ``</guideline>`` as base and ``<takeaway>`` as the join: pieces hold
    the guideline, a `Block` of ``<step>…</step>`` with the takeaway's opening as its ``after``, and so on, repeated."""
    return _side_by_side(prompt, pieces)


def parallel_r1(prompt: Ids, pieces: Pieces) -> Layout:
    """Parallel-R1, as it is trained: paths side by side, without outlines, then a summary on base + longest.

    pieces: ids that the model writes, up to ``<Parallel>``; a `Block` with ``<Path>`` as each header and
    ``</Parallel>``, a newline and ``<Summary>`` as ``after``; the summary; …
    """
    return _side_by_side(prompt, pieces)


def parathinker(
    prompt: Ids, paths: Sequence[Ids], summary: Ids, *, headers: Sequence[Ids] | None = None, after: Ids = ()
) -> Layout:
    """ParaThinker: paths that see the prompt alone, all beginning behind it, then a forced summary that sees all.

    headers: ``<think1>``, ``<think2>`` …; after: ``<summary>``, behind the longest path's last position.
    ``kv_segments`` of the layout (i for path i, 0 elsewhere) says which vectors ParaThinker adds to K and V
    (`anabranch.hf.SegmentVectors`).
    """
    layout = _side_by_side(prompt, [Block(paths, headers, after), summary])
    return replace(layout, kv_segments=layout.threads)


def grpo(prompt: Ids, answers: Sequence[Ids]) -> Layout:
    """One prompt, G answers to it: the prompt is there once, each answer sees it and itself. ``threads`` is 1 … G."""
    for i, answer in enumerate(answers):
        if not answer:
            raise ValueError(f"answers[{i}]: empty; every answer holds at least one token (its EOS)")
    return _side_by_side(prompt, [Block(list(answers))])


def separate(sequences: Sequence[tuple[Ids, Pieces]]) -> Layout:
    """APR (and AsyncThink): the parent and each child are sequences of their own, packed in one row, blind to each
    other, each from position 0.

    sequences: ``(prompt, pieces)`` each; in pieces, ids are what the model writes and `Inserted` what the runtime puts
    there (``<Sub Searches>…``). A parent that a join rewrote is two sequences: up to the call, and with the call
    rewritten.
    """
    if not sequences:
        raise ValueError("sequences: empty; pass at least one")
    return Layout.pack([_side_by_side(prompt, pieces) for prompt, pieces in sequences])
