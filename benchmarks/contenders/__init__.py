"""Everything that computes the attention of a case, each behind the same small interface (see base.py)."""

from __future__ import annotations

from .base import Contender, Unfit
from .flex import Flex
from .masked import MaskedDense
from .ours import Ours
from .sdpa import SdpaPacked, SdpaPerBranch
from .two_phase import TwoPhase

ALL: dict[str, type[Contender]] = {c.name: c for c in (Ours, SdpaPerBranch, SdpaPacked, MaskedDense, TwoPhase, Flex)}

__all__ = ["ALL", "Contender", "Unfit"]
