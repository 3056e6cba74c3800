"""Builds the `Result` of a finished request from the engine's records."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from anabranch.records.actions import Action
from anabranch.records.metrics import measure
from anabranch.strategies.api.thread import Segment, Thread

if TYPE_CHECKING:
    from anabranch.engine.costs import Peaks
    from anabranch.engine.request import Request
from anabranch.records.result import Node, Result, Run


def _run(segment: Segment) -> Run:
    logprobs = None if segment.logprobs is None else tuple(segment.logprobs)
    spliced = segment.spliced is not None
    return Run(segment.kind, tuple(segment.token_ids), segment.position, segment.source, spliced, logprobs)


def _action(action: Action) -> Action:
    """As it stands now, with nothing in it that can change."""
    headers = tuple(None if header is None else tuple(header) for header in action.headers)
    token_ids, children = tuple(action.token_ids), tuple(action.children)
    return Action(action.do, token_ids, children, action.mode, action.length, headers)


def build_node(thread: Thread) -> Node:
    begin = thread._segments[0].position if thread._segments else thread._position
    return Node(
        id=thread.id,
        role=thread.role,
        token_ids=thread.token_ids,
        text=thread.text,
        start=begin,
        stop=thread._position,
        forked_at=len(thread._prefix),
        ended=thread.ended.reason if thread.ended else None,
        fate=thread.fate,
        runs=tuple(map(_run, thread._segments)),
        forgotten=tuple(map(_run, thread._forgotten)),
        children=tuple(build_node(kid) for _, kids in thread._forks for kid in kids),
        log=tuple(map(_action, thread._log)),
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
        blocks=[len(kids) for thread in request.threads for _, kids in thread._forks],
        max_concurrency=request.max_concurrency,
        longest_context=request.longest_context,
        well_formed=not request.malformed_reasons,
        prompt_tokens=trunk._prompt_length,
        wall_seconds=time.perf_counter() - (request.started or 0.0),
        seconds=dict(spent.seconds),
        steps=spent.steps,
        rows=spent.rows,
        preemptions=spent.preemptions,
        **peaks.as_metrics(),
    )
    model = engine.model
    return Result(
        text=tree.text,
        token_ids=trunk.token_ids,
        tree=tree,
        metrics=metrics,
        answers=request.main.value if request.main is not None else None,
        prompt_token_ids=tuple(trunk._own[: trunk._prompt_length]),
        malformed=tuple(request.malformed_reasons),
        info={
            "model": getattr(model.config, "_name_or_path", "") or type(model).__name__,
            "strategy": repr(request.strategy),
            "seed": request.seed,
            "config": {k: v for k, v in request.samplers.settings.items()},
        },
    )
