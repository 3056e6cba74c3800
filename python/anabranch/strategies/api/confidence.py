"""How sure the model was of what it sampled."""

from __future__ import annotations

from collections.abc import Sequence

from anabranch.strategies.api.ops import TokenStats


def confidence(stats: Sequence[TokenStats]) -> float:
    """DeepConf's mean token confidence: the higher, the surer (a peak leaves little to the other likely tokens)."""
    return -sum(s.topk_logprob for s in stats) / max(1, len(stats))


def rounded(nats: float) -> float:
    """For comparing branches. Two that drew the same tokens are equally sure but for float rounding, which depends on
    what else was in their steps; to four places they tie, and the first of them is taken in any company."""
    return round(nats, 4)
