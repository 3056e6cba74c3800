"""A finished generation → the packed row that shows a model, in training, what the engine showed it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anabranch.records.trace_rows import trace_rows
from anabranch.training.layout import Layout, layout_of

if TYPE_CHECKING:
    from anabranch.records.result import Result
    from anabranch.records.trace import Trace


def from_trace(
    trace: Trace | Result, *, discarded: bool = True, forgotten: bool = True, flat_loss: bool = False
) -> Layout:
    """Every token of a generation in a row, each seeing exactly what it saw when the engine computed it.

    A thread stands where it was forked, on the positions that it had. Threads that a join spliced are there once; what
    a join computed again behind its siblings ("reprefill") is there a second time, in sight of them.

    Loss is on what the model sampled, never on prompts, headers and what else the runtime inserted.

    Args:
        trace: an engine's `Result`, or a `Trace` (``trace.load``).
        discarded: keep threads that were discarded or killed.
        forgotten: keep what a thread wrote and the runtime then cut off (the line break that ended it; APR's calls).
        flat_loss: loss also on the copies that a "reprefill" join computed, where the model wrote them first.

    Raises:
        ValueError: a thread was forked from tokens that its parent then cut off: what it saw is no longer in the trace.
    """
    return layout_of(trace_rows(trace, discarded=discarded, forgotten=forgotten, flat_loss=flat_loss))
