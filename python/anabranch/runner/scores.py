"""What sampling asks of scores over a whole vocabulary: the best, a draw, log Σ e^score. On a CPU by kernels of ours.

torch takes several passes for each, some of them slow on a CPU (``topk`` a tenth of a millisecond a row, ``argmax``
half of that, ``sort`` milliseconds); ``csrc/cpu/scores.cpp`` reads a row once, in the type it has, and a few blocks of
it again. Results are those of torch's operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anabranch.backends import registry, threads
from anabranch.backends.native import TYPES

__all__ = ["best", "draw", "highest", "logsumexp", "takes"]


def takes(scores: Tensor) -> bool:
    """Whether the kernels can read these scores [rows, vocabulary]."""
    return (
        scores.device.type == "cpu"
        and scores.dtype in TYPES
        and scores.dim() == 2
        and scores.shape[1] > 0
        and scores.stride(1) == 1
        and registry.unavailable("cpu") is None
    )


def _read(scores: Tensor) -> tuple[int, tuple[int, int, int, int]]:
    return TYPES[scores.dtype], (scores.data_ptr(), *scores.shape, scores.stride(0))


def _kernels() -> Any:
    from anabranch import _cpu

    return _cpu


def _empty(rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(rows, dtype=dtype, device="cpu")  # whatever the program's defaults are


def best(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's highest score, float32 (NaN where a score is NaN), and the first token that has it, int64."""
    if not takes(scores):
        wide = scores.float()
        return wide.amax(-1), wide.argmax(-1)
    rows = scores.shape[0]
    peaks, tokens = _empty(rows), _empty(rows, torch.int64)
    _kernels().score_best(*_read(scores), peaks.data_ptr(), tokens.data_ptr(), threads.count())
    return peaks, tokens


def highest(scores: Tensor) -> Tensor:
    """Each row's highest score; NaN where a score is NaN."""
    return best(scores)[0] if takes(scores) else scores.amax(-1)


def logsumexp(scores: Tensor) -> Tensor:
    """log Σ e^score of each row, float32."""
    if not takes(scores):
        return scores.float().logsumexp(-1)
    sums = _empty(scores.shape[0])
    _kernels().score_logsumexp(*_read(scores), sums.data_ptr(), threads.count())
    return sums


def draw(scores: Tensor, temperature: float, top_k: int, top_p: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """`best`'s first, and the token that ``uniform`` (float64 [rows], 0 … 1) draws from softmax(scores / temperature),
    cut to the `top_k` highest (0: all) and then to the likeliest tokens that hold `top_p` (1.0: all), by inverse
    transform over the token ids.

    −1 stands for a row that is left to torch: where the last bits of sums or the order of equal scores would decide,
    or where the best score is not finite. Only for scores that the kernel `takes`.
    """
    rows = scores.shape[0]
    peaks, tokens = _empty(rows), _empty(rows, torch.int64)
    _kernels().score_draw(
        *_read(scores), temperature, top_k, top_p, uniform.data_ptr(), peaks.data_ptr(), tokens.data_ptr(),
        threads.count(),
    )  # fmt: skip
    return peaks, tokens
