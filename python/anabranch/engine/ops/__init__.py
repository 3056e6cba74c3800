"""How the engine carries out what a strategy asks of its threads: one file an op, each under its class."""

from __future__ import annotations

from itertools import islice, takewhile
from typing import Any

from anabranch.engine.ops.base import EngineOp
from anabranch.engine.ops.decode import Decoding, record_token
from anabranch.engine.ops.fork import Fork
from anabranch.engine.ops.insert import Insert
from anabranch.engine.ops.join import Join
from anabranch.engine.ops.score import Score
from anabranch.engine.ops.skip import Skip
from anabranch.engine.ops.truncate import Truncate
from anabranch.engine.thread_kv import EngineThread
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


def next_ops(thread: EngineThread) -> list[Op]:
    """The queued ops of a thread that may be carried out now: the first, and any fork right behind other forks: all
    begin with the same context, and one that waits for siblings holds up no other."""
    return list(takewhile(lambda op: isinstance(op, ForkOp), thread.queue)) or list(islice(thread.queue, 1))


__all__ = ["ENGINE_OPS", "EngineOp", "engine_op", "next_ops", "record_token"]
