"""Builds the `Result` of a finished request from the engine's records."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from anabranch.engine.thread_kv import EngineThread
from anabranch.engine.thread_state import Segment
from anabranch.records.actions import Action
from anabranch.records.metrics import measure

if TYPE_CHECKING:
    from anabranch.engine.costs import Peaks
    from anabranch.engine.request import Request
from anabranch.records.result import Node, Result, Run


def _run(segment: Segment[EngineThread]) -> Run:
    logprobs = None if segment.logprobs is None else tuple(segment.logprobs)
    spliced = segment.spliced is not None
    return Run(segment.kind, tuple(segment.token_ids), segment.position, segment.source, spliced, logprobs)


def _action(action: Action) -> Action:
    """As it stands now, with nothing in it that can change."""
    headers = tuple(None if header is None else tuple(header) for header in action.headers)
    token_ids, children = tuple(action.token_ids), tuple(action.children)
    return Action(action.do, token_ids, children, action.mode, action.length, headers)


def build_node(thread: EngineThread) -> Node:
    begin = thread.segments[0].position if thread.segments else thread.position
    return Node(
        id=thread.id,
        role=thread.role,
        token_ids=thread.token_ids,
        text=thread.request.text(thread.token_ids, thread.backwards(thread.begin)),
        start=begin,
        stop=thread.position,
        forked_at=len(thread.prefix),
        ended=thread.ended.reason if thread.ended else None,
        fate=thread.fate,
        runs=tuple(map(_run, thread.segments)),
        forgotten=tuple(map(_run, thread.forgotten)),
        children=tuple(build_node(child) for child in thread.children),
        log=tuple(map(_action, thread.log)),
    )


def build_result(engine: Any, request: Request, peaks: Peaks) -> Result:
    """The `Result` of a finished request; `peaks` are its call's."""
    trunk, spent = request.trunk, request.spent
    tree = build_node(trunk)
    written = {"sampled": 0, "inserted": 0}
    for run in (*tree.runs, *tree.forgotten):
        if run.kind in written:
            written[run.kind] += len(run.token_ids)
    metrics = measure(
        sampled=request.sampled,
        inserted=request.inserted,
        in_threads=request.sampled + request.inserted - sum(written.values()),
        critical=request.critical_path(),
        blocks=[len(block) for thread in request.threads for _, block in thread.blocks],
        max_concurrency=request.max_concurrency,
        longest_context=request.longest_context,
        well_formed=not request.malformed_reasons,
        prompt_tokens=trunk.prompt_length,
        wall_seconds=time.perf_counter() - (request.started or 0.0),
        seconds=dict(spent.seconds),
        steps=spent.steps,
        rows=spent.rows,
        preemptions=spent.preemptions,
        cached_tokens=spent.cached_tokens,
        **peaks.as_metrics(),
    )
    model = engine.model
    return Result(
        text=tree.text,
        token_ids=trunk.token_ids,
        tree=tree,
        metrics=metrics,
        answers=request.main.value if request.main is not None else None,
        prompt_token_ids=tuple(trunk.own[: trunk.prompt_length]),
        malformed=tuple(request.malformed_reasons),
        info={
            "model": getattr(model.config, "_name_or_path", "") or type(model).__name__,
            "strategy": repr(request.strategy),
            "seed": request.seed,
            "config": {k: v for k, v in request.samplers.settings.items()},
        },
    )
