"""Builds the `Result` of a finished prompt from its books."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from anabranch.records.actions import Action
from anabranch.records.metrics import measure
from anabranch.records.result import Node, Result, Run
from anabranch.threads.books import Books
from anabranch.threads.state import AnyThread, Segment


def _run(segment: Segment[Any]) -> Run:
    logprobs = None if segment.logprobs is None else tuple(segment.logprobs)
    spliced = segment.spliced is not None
    tokens = tuple(segment.token_ids)
    more = (spliced, logprobs, segment.kv_segment, segment.cut)
    return Run(segment.kind, tokens, segment.position, segment.source, *more)


def _action(action: Action) -> Action:
    """As it stands now, with nothing in it that can change."""
    headers = tuple(None if header is None else tuple(header) for header in action.headers)
    token_ids, children = tuple(action.token_ids), tuple(action.children)
    segments, logged = tuple(action.segments), tuple(action.logged)
    return replace(action, token_ids=token_ids, children=children, headers=headers, segments=segments, logged=logged)


def build_node(host: Books[Any], thread: AnyThread) -> Node:
    begin = thread.segments[0].position if thread.segments else thread.position
    return Node(
        id=thread.id,
        role=thread.role,
        token_ids=thread.token_ids,
        text=host.text(thread.token_ids, thread.backwards(thread.begin)),
        start=begin,
        stop=thread.position,
        forked_at=thread.forked_at,
        ended=thread.ended.reason if thread.ended else None,
        fate=thread.fate,
        runs=tuple(map(_run, thread.segments)),
        forgotten=tuple(map(_run, thread.forgotten)),
        children=tuple(build_node(host, child) for child in thread.children),
        sees=tuple((segment.source or "", len(segment.token_ids)) for segment in thread.seen),
        log=tuple(map(_action, thread.log)),
        live_since=None if thread.live is None else thread.live.since,
        **thread.live_record(),
    )


def build_result(host: Books[Any], info: Mapping[str, Any], more: Mapping[str, Any] | None = None) -> Result:
    """The `Result` of a finished prompt.

    info: what it was made with. more: metrics that only its host knows, by their names in `Metrics`.
    """
    trunk, spent = host.trunk, host.spent
    tree = build_node(host, trunk)
    written = {"sampled": 0, "inserted": 0}
    for run in (*tree.runs, *tree.forgotten):
        if run.kind in written:
            written[run.kind] += len(run.token_ids)
    metrics = measure(
        sampled=host.sampled,
        inserted=host.inserted,
        in_threads=host.sampled + host.inserted - sum(written.values()),
        critical=host.critical_path(),
        blocks=[len(block) for thread in host.threads for _, block in thread.blocks],
        max_concurrency=host.max_concurrency,
        longest_context=host.longest_context,
        well_formed=not host.malformed_reasons,
        prompt_tokens=trunk.prompt_length,
        wall_seconds=time.perf_counter() - (host.started or 0.0),
        seconds=dict(spent.seconds),
        steps=spent.steps,
        rows=spent.rows,
        preemptions=spent.preemptions,
        draft_tokens=spent.drafted,
        accepted_tokens=spent.accepted,
        **(more or {}),
    )
    every = (token for node in tree.walk() for run in (*node.runs, *node.forgotten) for token in run.token_ids)
    return Result(
        text=tree.text,
        token_ids=trunk.token_ids,
        tree=tree,
        metrics=metrics,
        answers=host.main.value if host.main is not None else None,
        prompt_token_ids=tuple(trunk.own[: trunk.prompt_length]),
        malformed=tuple(host.malformed_reasons),
        info={"strategy": repr(host.strategy), "seed": host.seed, "pieces": host.pieces(every), **info},
    )
