"""How the engine carries out what a strategy asks of its threads: one file an op, each under its class."""

from __future__ import annotations

from typing import Any

from anabranch.engine.ops.base import EngineOp
from anabranch.engine.ops.decode import Decoding, record_token
from anabranch.engine.ops.fork import Fork
from anabranch.engine.ops.insert import Insert
from anabranch.engine.ops.join import Join
from anabranch.engine.ops.score import Score
from anabranch.engine.ops.skip import Skip
from anabranch.engine.ops.truncate import Truncate
from anabranch.strategies.api.ops import Decode, ForkOp, InsertOp, JoinOp, Op, ScoreOp, SkipOp, TruncateOp

ENGINE_OPS: dict[type[Op], EngineOp[Any]] = {
    Decode: Decoding(),
    ForkOp: Fork(),
    InsertOp: Insert(),
    JoinOp: Join(),
    ScoreOp: Score(),
    SkipOp: Skip(),
    TruncateOp: Truncate(),
}


def engine_op(op: Op) -> EngineOp[Any]:
    """What carries out `op`."""
    return ENGINE_OPS[type(op)]


__all__ = ["ENGINE_OPS", "EngineOp", "engine_op", "record_token"]
