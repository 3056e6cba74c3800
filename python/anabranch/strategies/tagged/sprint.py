"""SPRINT (arXiv 2506.05745): a planner writes prompts, and an executor works each of them out while it writes on."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, NamedTuple

from anabranch._check import whole_fields
from anabranch.strategies.api.cutting import decode_to_mark
from anabranch.strategies.api.strategy import Strategy
from anabranch.strategies.api.thread import Thread


class SprintAnswer(NamedTuple):
    """``result.answers`` of `SPRINT`.

    text: what the planner wrote behind the last stage. sequential_tokens: SPRINT's own critical path: for each stage
    the largest, over its prompts, of what the planner wrote up to that prompt plus what its executor wrote; what is in
    no stage counts in full.
    """

    text: str
    sequential_tokens: int


class _Execution(NamedTuple):
    """`thread` works a prompt out; `after`: what the planner had written in the stage by then, in tokens."""

    thread: Thread
    after: int
    work: Any


@dataclass(frozen=True, kw_only=True)
class SPRINT(Strategy):
    """SPRINT's format, in plain text::

        <Plan_1>… <prompt_1.1>…</prompt_1.1> … <prompt_1.2>…</prompt_1.2> …</Plan_1>
        <execution_1.1>…</execution_1.1><execution_1.2>…</execution_1.2> <Plan_2>… the answer

    At each ``</prompt_i.j>`` an executor begins with ``<execution_i.j>``: it sees the context up to there, and no
    sibling, while the planner writes on. At ``</Plan_i>`` the planner waits for its executors, and what they wrote is
    appended in the order of the prompts and computed again, so that each is seen by what follows, on dense positions.

    execution_tokens: most tokens sampled by an executor; None leaves the answer's own limit.
    separator: text in front of each execution where it is appended, and where its executor begins.
    drains: executors of a stage that the planner never closed finish before the answer is handed out, so that a seed's
        tree does not depend on the schedule; False: they are ended wherever they are.

    ``metrics.critical_path_tokens`` is the longest chain of waiting, as for every strategy: a stage takes at least the
    whole plan. SPRINT's own figure leaves out what the planner wrote behind a prompt (see `SprintAnswer`).

    Counted as malformed: a ``</prompt_i.j>`` without its beginning and an id given twice in a stage (both plain text),
    a ``</Plan_i>`` without its beginning, a stage that is never closed, an execution that ends without its tag (it is
    closed).

    >>> engine.generate(prompt, strategy=ab.SPRINT(execution_tokens=64), max_new_tokens=256).text
    """

    execution_tokens: int | None = None
    separator: str = ""
    drains: bool = True

    def __post_init__(self) -> None:
        whole_fields(self, ("execution_tokens",), optional=("execution_tokens",))
        if not isinstance(self.separator, str):
            raise ValueError(f"SPRINT: separator={self.separator!r}; pass a text")

    def run(self, trunk: Thread) -> Generator[Any, Any, SprintAnswer]:
        begin = trunk.length  # of what is written in this stage
        total = 0
        executors: dict[str, _Execution] = {}
        while (mark := (yield from decode_to_mark(trunk, ("</prompt_", "</Plan_")))) is not None:
            head, name = mark
            written = trunk.text_of(trunk.context[begin:])
            if head == "</prompt_":
                if f"<prompt_{name}>" not in written:
                    trunk.malformed(f"</prompt_{name:.20}> without <prompt_{name:.20}>; kept as plain text")
                elif name in executors:
                    trunk.malformed(f"a second prompt {name:.20} in a stage; kept as plain text")
                else:
                    executors[name] = self._execute(trunk, name, trunk.length - begin)
                continue
            if f"<Plan_{name}>" not in written:
                trunk.malformed(f"</Plan_{name:.20}> without <Plan_{name:.20}>")
            if executors:
                yield [execution.work for execution in executors.values()]
                total += max(execution.after + len(execution.thread.token_ids) for execution in executors.values())
                yield trunk.join([execution.thread for execution in executors.values()], "reprefill")
            else:
                total += trunk.length - begin
            begin, executors = trunk.length, {}
        if executors:
            trunk.malformed("ended within a stage, whose executions nobody waits for")
        return SprintAnswer(trunk.text_of(trunk.context[begin:]), total + trunk.length - begin)

    def _execute(self, trunk: Thread, name: str, after: int) -> _Execution:
        """Begin the execution of a prompt that was just closed."""
        (kid,) = trunk.fork([f"{self.separator}<execution_{name}>"])
        closing = f"</execution_{name}>"

        def work() -> Generator[Any, Any, None]:
            end = yield kid.decode(self.execution_tokens, stop=closing)
            if end.stop != closing:
                kid.malformed(f"ended by {end.reason} without {closing}; closed")
                if end.reason == "eos":
                    kid.truncate(kid.length - 1)
                yield kid.insert(closing)

        return _Execution(kid, after, kid.start(work()))
