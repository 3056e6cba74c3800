"""AsyncThink (arXiv 2510.26658): an organizer hands sub-queries to a pool of workers and goes on thinking."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from anabranch._check import whole_fields
from anabranch.strategies.api.asking import ask, check_fills, fill, question_of
from anabranch.strategies.api.cutting import decode_to_mark
from anabranch.strategies.api.strategy import Strategy
from anabranch.strategies.api.thread import Thread

WORKER = (
    "Work on the query below and think it through. Write what you have found out between <RETURN> and </RETURN>, "
    "briefly and complete: nothing else of what you write is read.\n\nQuery: {query}"
)
INFORMED = "Question: {question}\n\n" + WORKER.replace("the query below", "one part of it, the query below,")


@dataclass(frozen=True, kw_only=True)
class AsyncThink(Strategy):
    """An organizer and `workers` workers, all the same model, in plain text::

        … <FORK-1>sub-query</FORK-1> … <FORK-2>sub-query</FORK-2> … <JOIN-2><RETURN>…</RETURN> … <JOIN-1>…

    At ``</FORK-i>`` a worker begins with the sub-query in a context of its own, and the organizer writes on. At
    ``<JOIN-i>`` the organizer waits for worker i, and what that worker wrote between ``<RETURN>`` and ``</RETURN>``
    enters its context, tags included, marked as inserted. Then it may fork again, or answer. The prompt must tell a
    model of the format that was not trained in it. ``result.answers`` is the text behind the last fork or join.

    workers: the pool: sub-queries under way, a finished one that was not joined included.
    worker_tokens: most tokens sampled by a worker; None leaves the answer's own limit.
    informed: workers see the question, too, not the sub-query alone.
    worker_request: what a worker is asked; ``{query}`` and ``{question}`` are filled in. None: a text of ours, by
        `informed`. A chat is asked through the tokenizer's chat template, in place of its last user message.
    reuse_ids: an id that was joined may be forked again.
    drains: workers that were never joined finish before the answer is handed out, so that a seed's tree does not depend
        on the schedule; False: they are ended wherever they are.

    Malformed, so counted and left as plain text: an id forked twice, more forks than the pool holds, a
    ``</FORK-i>`` without its beginning, a join of an id never forked or joined before. A worker without ``<RETURN>``
    returns all that it wrote. An answer with nothing behind its last fork or join is counted as none.

    The authors' concurrency, the mean number of active workers over the critical path, is
    ``metrics.parallel_ratio * metrics.token_speedup``.

    >>> engine.generate(prompt, strategy=ab.AsyncThink(workers=2, worker_tokens=64), max_new_tokens=128).text
    """

    workers: int = 4
    worker_tokens: int | None = None
    informed: bool = False
    worker_request: str | None = None
    reuse_ids: bool = False
    drains: bool = True

    def __post_init__(self) -> None:
        whole_fields(self, ("workers", "worker_tokens"), optional=("worker_tokens",))
        if self.worker_request is not None:
            check_fills(self, "worker_request", ("query",))

    def run(self, trunk: Thread) -> Generator[Any, Any, str]:
        busy: dict[str, Thread] = {}
        seen: set[str] = set()
        answer_from = trunk.length
        while (mark := (yield from decode_to_mark(trunk, ("</FORK-", "<JOIN-")))) is not None:
            head, name = mark
            if head == "</FORK-":
                query = self._query(trunk, name)
                if name in busy or (name in seen and not self.reuse_ids):
                    trunk.malformed(f"fork of {name:.20}: that id was forked before; kept as plain text")
                elif query is None:
                    trunk.malformed(f"</FORK-{name:.20}> without <FORK-{name:.20}>; kept as plain text")
                elif len(busy) == self.workers:
                    trunk.malformed(f"fork of {name:.20}: all {self.workers} workers are taken; kept as plain text")
                else:
                    seen.add(name)
                    busy[name] = self._worker(trunk, query)
            elif name in busy:
                worker = busy.pop(name)
                yield worker
                yield trunk.join(worker, "summary", text=f"<RETURN>{self._returned(worker)}</RETURN>")
            else:
                why = "joined before" if name in seen else "never forked"
                trunk.malformed(f"join of {name:.20}, which was {why}; kept as plain text")
            answer_from = trunk.length
        answer = trunk.text_of(trunk.context[answer_from:])
        if not answer.strip():
            trunk.malformed("no answer behind the last fork or join" if seen else "no answer")
        return answer

    def _query(self, trunk: Thread, name: str) -> str | None:
        """The sub-query that was just closed; None where it was not begun."""
        _, begin, query = trunk.text_of(trunk.token_ids).rpartition(f"<FORK-{name}>")
        return query[: query.rindex(f"</FORK-{name}>")] if begin and query.count(f"</FORK-{name}>") == 1 else None

    def _worker(self, trunk: Thread, query: str) -> Thread:
        request = self.worker_request or (INFORMED if self.informed else WORKER)
        question = question_of(trunk, "AsyncThink") if "{question}" in request else ""
        worker = trunk.spawn(ask(trunk, fill(request, query=query.strip(), question=question)))
        worker.decode(self.worker_tokens, stop="</RETURN>")
        return worker

    @staticmethod
    def _returned(worker: Thread) -> str:
        """What a finished worker returns."""
        text = worker.text_of(worker.token_ids)
        if worker.ended is None or worker.ended.stop != "</RETURN>" or "<RETURN>" not in text:
            worker.malformed("a worker without <RETURN>…</RETURN>; all that it wrote is returned")
            return text.rpartition("<RETURN>")[2].removesuffix("</RETURN>").strip()
        return text[: text.rindex("</RETURN>")].rpartition("<RETURN>")[2]
