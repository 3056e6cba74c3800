"""How a host carries out what a strategy asks of its threads: one file an op, each under its class.

A host adds what it alone can do (`anabranch.engine.ops`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anabranch.strategies.api.ops import Decode, ForkOp, InsertOp, JoinOp, Op, SkipOp, TruncateOp
from anabranch.threads.ops.base import HostOp, next_ops
from anabranch.threads.ops.decode import Decoding, record_token
from anabranch.threads.ops.fork import Fork
from anabranch.threads.ops.insert import Insert
from anabranch.threads.ops.join import Join
from anabranch.threads.ops.skip import Skip
from anabranch.threads.ops.truncate import Truncate

HOST_OPS: Mapping[type[Op], HostOp[Any]] = {
    Decode: Decoding(),
    ForkOp: Fork(),
    InsertOp: Insert(),
    JoinOp: Join(),
    SkipOp: Skip(),
    TruncateOp: Truncate(),
}

__all__ = ["HOST_OPS", "HostOp", "next_ops", "record_token"]
