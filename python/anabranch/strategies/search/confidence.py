"""DeepConf's confidence of a trace, token by token."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from anabranch.strategies.api.ops import Decode, TokenStats


class Confidence:
    """Of the tokens so far: a token's confidence is minus the mean log-probability of the likeliest few, a group's the
    mean over the last `window` tokens. Rounded to three places, as the released code does.

    ``lowest``: of all whole groups; of a trace shorter than a window, its mean. ``group``: the last whole group's,
    None until there is one.
    """

    def __init__(self, window: int):
        self.window = window
        self.tokens: list[float] = []
        self.groups: list[float] = []
        self._last: deque[float] = deque()
        self._sum = 0.0

    def push(self, stats: TokenStats) -> None:
        token = round(-stats.topk_logprob, 3)
        self.tokens.append(token)
        self._last.append(token)
        self._sum += token
        if len(self._last) > self.window:
            self._sum -= self._last.popleft()
        if len(self._last) == self.window:
            self.groups.append(round(self._sum / self.window, 3))

    @property
    def group(self) -> float | None:
        return self.groups[-1] if self.groups else None

    @property
    def mean(self) -> float:
        return round(sum(self.tokens) / len(self.tokens), 3) if self.tokens else 0.0

    @property
    def lowest(self) -> float:
        return min(self.groups) if self.groups else self.mean

    @property
    def tail(self) -> float:
        """Of the last `window` tokens."""
        return self.group if self.group is not None else self.mean

    @property
    def bottom(self) -> float:
        """Mean of the lowest tenth of the groups."""
        low = sorted(self.groups)[: max(1, len(self.groups) // 10)]
        return round(sum(low) / len(low), 3) if low else self.mean


MEASURES: dict[str, Callable[[Confidence], float]] = {
    "lowest": lambda c: c.lowest,
    "mean": lambda c: c.mean,
    "tail": lambda c: c.tail,
    "bottom": lambda c: c.bottom,
}


def falls_below(bar: float, trace: Confidence) -> Callable[[Decode], bool]:
    """Feeds `trace` and tells when its last whole group is under `bar`."""

    def falls(decode: Decode) -> bool:
        trace.push(decode.stats[-1])
        return trace.group is not None and trace.group < bar

    return falls


def percentile(values: Sequence[float], percent: float) -> float:
    """As NumPy's: linear between the two nearest ranks; `values` is not empty."""
    ordered = sorted(values)
    at = (len(ordered) - 1) * percent / 100
    low = min(int(at), len(ordered) - 1)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)
