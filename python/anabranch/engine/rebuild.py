"""How a thread comes back into the cache: chunks compute again what it held, or make room for what was put aside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from anabranch.engine.chunk import PrefillChunk

if TYPE_CHECKING:
    from anabranch.engine.thread_kv import EngineThread, ThreadKV
    from anabranch.kv.aside import KVAside
    from anabranch.kv.cache import TreeCache
    from anabranch.kv.step import Branch


class Rebuild:
    """The chunks of one thread, whose branch has what it shares with its parent; `chunk`: the one under way."""

    def __init__(self, kv: ThreadKV, cache: TreeCache):
        self.kv, self.thread, self.cache = kv, kv.thread, cache
        self._scratch: list[Branch] = []  # branches that exist only while it is being rebuilt
        self._chunks = self._again() if kv.aside is None else self._put_back(kv.aside)
        self.chunk: PrefillChunk | None = None

    def go_on(self) -> bool:
        """To the next chunk, where the one under way is through; whether there is any."""
        if self.chunk is None or not self.chunk.left:
            self.chunk = next((chunk for chunk in self._chunks if chunk.left), None)
        return self.chunk is not None

    def drop(self) -> None:
        """Give back what it holds beside the thread's branch."""
        for branch in self._scratch:
            if branch.alive:
                self.cache.release(branch)
        self._scratch = []

    def _put_back(self, aside: KVAside) -> Iterator[PrefillChunk]:
        """Bring back what was put aside: rows like any other, whose K and V are then replaced."""
        prefix = len(self.thread.prefix)
        if self.kv.held.length < (shared := min(aside.length, prefix)) and not self.kv.alone:
            # A join brings back what a branch wrote since its fork: what comes before must count as shared.
            before = self.kv.beside_parent(self.cache)
            self._scratch.append(before)
            yield from self._kept(aside, before, shared)
            self.cache.share(self.kv.held, before)
            self.drop()
        yield from self._kept(aside, self.kv.held, aside.length)
        self.kv.aside = None
        if aside.length <= self.thread.forked_at:  # it was being computed again
            yield from self._again()

    def _kept(self, aside: KVAside, branch: Branch, end: int) -> Iterator[PrefillChunk]:
        """The rows of a branch from its end to context length `end`, out of what was put aside."""
        if (begin := branch.length) < end:
            positions = aside.positions[begin:end].tolist()
            token_ids = list(self.thread.context[begin:end])
            yield PrefillChunk(branch, token_ids, positions[0], positions=positions, kept=True)
            self.cache.put_back(branch, aside, begin)

    def _again(self) -> Iterator[PrefillChunk]:
        """Rebuild the thread: what it saw of siblings first, then what it holds."""
        yield from self._build(self.thread, {id(self.thread): self.kv.held}, {})
        self.drop()

    def _build(
        self, thread: EngineThread, anchors: dict[int, Branch], built: dict[int, EngineThread]
    ) -> Iterator[PrefillChunk]:
        """Compute a thread on its anchor, behind what it saw of siblings, unless it is `built`."""
        if id(thread) in built:
            return
        built[id(thread)] = thread
        absent = {id(kv.thread) for kv in thread.kv.absent}
        for segment in thread.seen:
            other = segment.spliced
            assert other is not None
            if id(other) not in anchors and id(other) not in absent:
                self.cache.share(anchors[id(thread)], other.kv.held, len(segment.token_ids))
                continue
            if id(other) not in anchors:  # it is gone: what it wrote is computed for this thread
                assert thread.parent is not None
                anchors[id(other)] = fork_at(self.cache, thread.parent.kv.held, other.forked_at)
                self._scratch.append(anchors[id(other)])
            yield from self._build(other, anchors, built)
            absent = {id(kv.thread) for kv in thread.kv.absent}  # others may have gone meanwhile
            self.cache.share(anchors[id(thread)], anchors[id(other)], len(segment.token_ids))
        yield from self._program(thread, anchors[id(thread)])

    def _program(self, thread: EngineThread, branch: Branch) -> Iterator[PrefillChunk]:
        """Rebuild what a thread holds, joined siblings by the same forks and joins.

        Its tokens in a flat row would let the second sibling see the first, and give other KV than before.
        """
        joined = [s.spliced for s in thread.segments if s.spliced is not None]
        waiting = {id(k): k for k in [*joined, *_seen_by(joined)]}
        needed = list(waiting.values())
        anchors: dict[int, Branch] = {}
        built: dict[int, EngineThread] = {}

        def anchor_here() -> None:
            for key, child in list(waiting.items()):
                if child.forked_at == branch.length:
                    anchors[key] = self.cache.fork(branch, 1)[0]
                    self._scratch.append(anchors[key])
                    del waiting[key]

        anchor_here()
        # What a thread wrote that sees others, or is seen, is computed by turns (live.py).
        left = thread.length if thread.live is None else thread.turns.until(0)
        for segment in list(thread.segments):
            if left <= 0:
                break
            if segment.spliced is None:
                ids, at = list(segment.token_ids)[:left], 0
                while at < len(ids):
                    cuts = [k.forked_at - branch.length for k in waiting.values() if k.forked_at > branch.length]
                    size = min([len(ids) - at, *cuts])
                    segments = [segment.kv_segment] * size if thread.request.kv_segments else ()
                    yield PrefillChunk(branch, ids[at : at + size], segment.position + at, segments)
                    at += size
                    anchor_here()
            else:
                child = segment.spliced
                yield from self._build(child, anchors, built)
                for other in needed:  # once it is joined, those that saw it can share it no more
                    if any(s.spliced is child for s in other.seen):
                        yield from self._build(other, anchors, built)
                anchor = anchors.pop(id(child))
                self.cache.join(branch, [anchor], mode="concat")
                self._scratch.remove(anchor)
                anchor_here()
            left -= len(segment.token_ids)


def fork_at(cache: TreeCache, branch: Branch, length: int) -> Branch:
    """A fork of `branch` as it was at `length`: it may have gone on since."""
    fork = cache.fork(branch, 1)[0]
    if fork.length > length:
        cache.truncate(fork, length)
    return fork


def saw_live(threads: Sequence[EngineThread]) -> bool:
    """Whether some threads saw siblings, or those did, that cannot be computed again by themselves."""
    return any(other.live is not None for other in _seen_by(threads))


def _seen_by(threads: Sequence[EngineThread]) -> list[EngineThread]:
    """The siblings that some threads saw, those that these saw, and so on; no thread twice."""
    found: dict[int, EngineThread] = {}
    left = list(threads)
    while left:
        for segment in left.pop().seen:
            if segment.spliced is not None and id(segment.spliced) not in found:
                found[id(segment.spliced)] = segment.spliced
                left.append(segment.spliced)
    return list(found.values())
