"""Vectors that the model adds to K and V by segment (`SegmentVectors`), for the rows of an engine's forwards."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from anabranch.engine.chunk import PrefillChunk
from anabranch.engine.thread_kv import ThreadKV
from anabranch.hf.segments import SegmentVectors, find_vectors
from anabranch.runner.ranks import sharded

Entries = Sequence[tuple[ThreadKV, PrefillChunk, int]]


class Segments:
    """Which vectors an engine has, and their addition to the rows of strategies that fork into segments.

    given: `SegmentVectors`, what they are read from, or None: they are looked for once a strategy asks for them.
    """

    def __init__(self, model: Any, given: Any = None):
        self._vectors: SegmentVectors | None = None
        self._adder: Any = None
        self._whole = not sharded(model)
        if given is not None:
            self._require_whole()
        if given is not None:
            self._vectors = given if isinstance(given, SegmentVectors) else SegmentVectors.load(given)
            self._adder = self._vectors.adder(model)  # raises for a model that they do not fit

    def require(self, model: Any, strategy: Any, count: int) -> None:
        """ValueError, with the remedy, unless there are vectors of `count` segments for `model`."""
        self._require_whole()
        if self._vectors is None:
            self._vectors = find_vectors(model)
        if self._vectors is None:
            raise ValueError(
                f"strategy: {strategy!r} needs the model's segment vectors, and neither the model nor the checkpoint "
                "it came from holds any; pass Engine(…, segment_vectors=ab.SegmentVectors.load(path)), or use the "
                "strategy without them (biased=False)"
            )
        if self._vectors.num_segments < count:
            raise ValueError(
                f"strategy: {strategy!r} needs vectors of {count} segments, the prompt's included, and the engine's "
                f"are {self._vectors!r}; ask for fewer paths"
            )
        self._adder = self._vectors.adder(model)

    def _require_whole(self) -> None:
        if not self._whole:
            raise ValueError(
                "segment_vectors: the model is shared out among processes, and the vectors are of all its heads; load "
                "the model whole, or use the strategy without them (biased=False)"
            )

    @staticmethod
    def used(entries: Entries) -> bool:
        """Whether any row of a step is to be given a vector."""
        return any(chunk.segments for _, chunk, _ in entries)

    def adding(self, entries: Entries) -> AbstractContextManager[None]:
        """The forward of a step goes inside; rows of other strategies get nothing."""
        if not self.used(entries):
            return nullcontext()
        found: list[int] = []
        for _, chunk, n in entries:
            found += chunk.segments[chunk.done : chunk.done + n] if chunk.segments else [-1] * n
        context: AbstractContextManager[None] = self._adder(torch.tensor(found, dtype=torch.int64))
        return context
