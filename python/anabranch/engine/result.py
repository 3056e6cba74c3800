"""What a generation gives back: text, tokens, the tree of threads, metrics, and a trace to keep."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..metrics import Metrics, measure
from ..strategies.protocol import Action, Segment, Thread

if TYPE_CHECKING:
    from ..trace import Trace
    from .clock import Peaks
    from .request import Request


@dataclass(frozen=True)
class Run:
    """Tokens of one origin in a row: ``kind`` "prompt", "inserted", "sampled" or "joined" (from thread ``source``).

    They stand on positions ``position`` … ``position`` + len − 1. ``spliced``: their KV is the source thread's own.
    ``logprobs``: log-probability of each token when it was sampled or scored (raw scores, nats), where that was asked
    for (``generate(logprobs=True)``); not part of comparisons, since the last digits depend on what else was in a step.
    """

    kind: str
    token_ids: tuple[int, ...]
    position: int
    source: str | None = None
    spliced: bool = False
    logprobs: tuple[float, ...] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Node:
    """One thread of the tree.

    ``role``: "trunk", "fork" or "fresh". ``token_ids`` and ``text``: what it held at its end beyond what it shared with
    its parent (a trunk's or fresh thread's prompt left out), joined siblings included. ``start``, ``stop``: its
    position
    range, ``stop`` not included. ``forked_at``: context length at its fork. ``ended``: how its last decode ended (see
    `Ended.reason`; None when it never decoded). ``fate``: "finished", "joined", "discarded" or "killed".
    ``runs``: its tokens by origin, prompt included; ``forgotten``: what was cut off on the way. ``log``: all that was
    done to it, in order: what `ab.replay` does again (not part of comparisons).
    """

    id: str
    role: str
    token_ids: tuple[int, ...]
    text: str | None
    start: int
    stop: int
    forked_at: int
    ended: str | None
    fate: str | None
    runs: tuple[Run, ...] = ()
    forgotten: tuple[Run, ...] = ()
    children: tuple[Node, ...] = ()
    log: tuple[Action, ...] = field(default=(), compare=False, repr=False)

    def walk(self) -> Iterator[Node]:
        """This node and all below it, depth first."""
        yield self
        for child in self.children:
            yield from child.walk()

    def pretty(self, width: int = 60) -> str:
        """The tree as indented lines, one a thread."""
        lines = []
        for node in self.walk():
            shown = repr(node.text if node.text is not None else list(node.token_ids))
            shown = shown if len(shown) <= width else shown[: width - 1] + "…"
            head = f"{'  ' * node.id.count('.')}{node.id} {node.role} [{node.start}:{node.stop}]"
            lines.append(f"{head} {node.ended}/{node.fate} {shown}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Result:
    """The answer to one prompt.

    ``token_ids``: what the trunk holds after all joins, prompt excluded; ``text``: the same as it reads behind the
    prompt (so the first word keeps its space), a final EOS left out (None without a tokenizer).
    ``answers``: what the strategy's run() returned, e.g. each branch's answer of a vote.
    """

    text: str | None
    token_ids: tuple[int, ...]
    tree: Node
    metrics: Metrics
    answers: Any = None
    prompt_token_ids: tuple[int, ...] = ()
    malformed: tuple[str, ...] = ()
    info: dict[str, Any] = field(default_factory=dict, repr=False)  # model, strategy, seed, config: for the trace

    def trace(self) -> Trace:
        """All of it as a `Trace`, to save and load."""
        from ..trace import Trace

        return Trace.of(self)


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
