"""How the engine carries out the ops that need logits; the others are any host's (`anabranch.threads.ops`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anabranch.engine.ops.become import Become
from anabranch.engine.ops.candidates import FindCandidates
from anabranch.engine.ops.choose import Choose
from anabranch.engine.ops.hidden import Hidden
from anabranch.engine.ops.score import Score
from anabranch.strategies.api.ops import BecomeOp, CandidatesOp, ChooseOp, HiddenOp, Op, ScoreOp
from anabranch.threads.ops import HOST_OPS, HostOp

ENGINE_OPS: Mapping[type[Op], HostOp[Any]] = {
    **HOST_OPS,
    BecomeOp: Become(),
    CandidatesOp: FindCandidates(),
    ChooseOp: Choose(),
    HiddenOp: Hidden(),
    ScoreOp: Score(),
}

__all__ = ["ENGINE_OPS"]
