"""Training with branches: packed rows that show a model what the engine will show it, position for position.

A `Layout` is one packed row: tokens, a `BranchMask`, labels. Builders make it for each format of the field
(`threadweaver`, `multiverse`, `grpo`, …) and `from_trace` out of what an engine wrote; the collators hand it to
Transformers' ``Trainer`` or TRL's ``SFTTrainer``.
"""

from anabranch.training.collators import BranchCollator, GRPOCollator
from anabranch.training.formats import (
    Block,
    Inserted,
    grpo,
    multiverse,
    npr,
    parallel_r1,
    parathinker,
    separate,
    threadweaver,
    trie,
)
from anabranch.training.layout import IGNORE, Layout
from anabranch.training.traces import from_trace

__all__ = [
    "IGNORE",
    "Block",
    "BranchCollator",
    "GRPOCollator",
    "Inserted",
    "Layout",
    "from_trace",
    "grpo",
    "multiverse",
    "npr",
    "parallel_r1",
    "parathinker",
    "separate",
    "threadweaver",
    "trie",
]
