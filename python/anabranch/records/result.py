"""What a generation returns: the tree of threads and the answer. Pure data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from anabranch.records.actions import Action
from anabranch.records.metrics import Metrics

if TYPE_CHECKING:
    from anabranch.records.trace import Trace


class Cut(NamedTuple):
    """Where a run stood that was cut off: behind ``begin`` of its thread's own tokens, prompt included. ``logged``: the
    entries of the thread's log up to the cut, itself included if it is one; ``spliced``: as in `Run`."""

    begin: int
    logged: int
    spliced: bool = False


@dataclass(frozen=True)
class Run:
    """Tokens of one origin in a row: ``kind`` "prompt", "inserted", "sampled" or "joined" (from thread ``source``).

    They stand on positions ``position`` … ``position`` + len − 1. ``spliced``: their KV is the source thread's own.
    ``logprobs``: log-probability of each token when it was sampled or scored (raw scores, nats), where that was asked
    for (``generate(logprobs=True)``); not part of comparisons, since the last digits depend on what else was in a step.
    ``kv_segment``: which segment vectors the model added to their K and V (`ParaThinker`; 0 elsewhere).
    ``cut``: of tokens that were cut off, where they stood (None in traces from before it was kept); no part of
    comparisons either.
    """

    kind: str
    token_ids: tuple[int, ...]
    position: int
    source: str | None = None
    spliced: bool = False
    logprobs: tuple[float, ...] | None = field(default=None, compare=False)
    kv_segment: int = 0
    cut: Cut | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Sight:
    """What a thread saw beside its own context, live, from its own token number ``begin`` on (`Thread.see`): the ids of
    the threads, whether they stood one behind another in front of it, and what it saw of the same step."""

    begin: int
    others: tuple[str, ...]
    lined_up: bool
    same_step: str


@dataclass(frozen=True)
class Node:
    """One thread of the tree.

    ``role``: "trunk", "fork" or "fresh". ``token_ids`` and ``text``: what it held at its end beyond what it shared with
    its parent (a trunk's or fresh thread's prompt left out), joined siblings included. ``start``, ``stop``: its
    position range, ``stop`` not included. ``forked_at``: its parent's context length at its fork. ``sees``: (id,
    tokens) of each sibling whose first tokens it saw from its beginning on, behind its parent's. ``ended``: how its
    last decode ended (see `Ended.reason`; None when it never decoded). ``fate``: "finished", "joined", "discarded" or
    "killed".
    ``runs``: its tokens by origin, prompt included; ``forgotten``: what was cut off on the way. ``log``: all that was
    done to it, in order: what `ab.replay` does again (not part of comparisons).
    ``turns``, ``sights``: of a thread that saw others while it wrote, or was seen. Its own tokens, prompt included,
    were computed in these turns, (turn, how many) each; a row sees what its sight names of the turns up to its own.
    ``live_since``: how many entries its log had when that began (not part of comparisons).
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
    sees: tuple[tuple[str, int], ...] = ()
    log: tuple[Action, ...] = field(default=(), compare=False, repr=False)
    turns: tuple[tuple[int, int], ...] = ()
    sights: tuple[Sight, ...] = ()
    live_since: int | None = field(default=None, compare=False)

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

    >>> result = engine.generate(prompt, strategy=ab.SelfConsistency(n=4), max_new_tokens=16)
    >>> result.metrics.num_threads, len(result.answers)
    (4, 4)
    """

    text: str | None
    token_ids: tuple[int, ...]
    tree: Node
    metrics: Metrics
    answers: Any = None
    prompt_token_ids: tuple[int, ...] = ()
    malformed: tuple[str, ...] = ()
    info: dict[str, Any] = field(
        default_factory=dict, repr=False
    )  # model, strategy, seed, config, pieces: for the trace

    def trace(self) -> Trace:
        """All of it as a `Trace`, to save and load."""
        from anabranch.records.trace import Trace

        return Trace.of(self)
