"""How the engine carries out what a strategy asks of its threads: one file an op, each under its class."""

from __future__ import annotations

from typing import Any

from anabranch.engine.ops.base import EngineOp
from anabranch.engine.ops.become import Become
from anabranch.engine.ops.candidates import FindCandidates
from anabranch.engine.ops.choose import Choose
from anabranch.engine.ops.decode import Decoding, record_token
from anabranch.engine.ops.fork import Fork
from anabranch.engine.ops.hidden import Hidden
from anabranch.engine.ops.insert import Insert
from anabranch.engine.ops.join import Join
from anabranch.engine.ops.score import Score
from anabranch.engine.ops.truncate import Truncate
from anabranch.strategies.api.ops import (
    BecomeOp,
    CandidatesOp,
    ChooseOp,
    Decode,
    ForkOp,
    HiddenOp,
    InsertOp,
    JoinOp,
    Op,
    ScoreOp,
    TruncateOp,
)

ENGINE_OPS: dict[type[Op], EngineOp[Any]] = {
    BecomeOp: Become(),
    CandidatesOp: FindCandidates(),
    ChooseOp: Choose(),
    Decode: Decoding(),
    ForkOp: Fork(),
    HiddenOp: Hidden(),
    InsertOp: Insert(),
    JoinOp: Join(),
    ScoreOp: Score(),
    TruncateOp: Truncate(),
}


def engine_op(op: Op) -> EngineOp[Any]:
    """What carries out `op`."""
    return ENGINE_OPS[type(op)]


__all__ = ["ENGINE_OPS", "EngineOp", "engine_op", "record_token"]
