"""The course of one Hogwild! answer: whose block is where, when a step ends, what comes of it in the end."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from anabranch.strategies.api.awaitable import first
from anabranch.strategies.api.ops import Decode
from anabranch.strategies.api.thread import Thread
from anabranch.strategies.live.closing import finish, gather
from anabranch.strategies.live.prompts import NAMES, asked, filled_rules

if TYPE_CHECKING:
    from anabranch.strategies.live.hogwild import Hogwild

NEVER = 2**30  # tokens before which no EOS may come


@dataclass
class Worker:
    """One worker: its current step, and what it has sampled in those before."""

    name: str
    thread: Thread
    opening: str  # the step's beginning, as text
    decode: Decode | None = None
    sampled: int = 0
    number: int = 1


@dataclass
class Room:
    """One prompt's workers and their blocks."""

    how: Hogwild
    trunk: Thread
    workers: list[Worker] = field(default_factory=list)
    history: list[tuple[Thread, list[int]]] = field(default_factory=list)  # finished steps; the token that ended each
    heads: list[Thread | None] = field(default_factory=list)
    fed: int = 0  # tokens since the last check
    turn: int = 0
    stopping: bool = False
    first: dict[Thread, list[int]] = field(default_factory=dict)  # opening of each worker's first step, its prompt

    def __post_init__(self) -> None:
        self.texts, self.common = self.how.texts, self.trunk

    def run(self) -> Generator[Any, Any, str | None]:
        how, texts, trunk = self.how, self.texts, self.trunk
        names = [NAMES[i] if i < len(NAMES) else f"Worker {i + 1}" for i in range(how.workers)]
        if texts.rules:
            self.common = trunk.spawn(asked(trunk, filled_rules(texts, names)))
        if texts.behind:
            behind = texts.behind.replace("{names}", ", ".join(names)).replace("{others}", "the other assistants")
            self.common.insert(behind)
        self.heads = [trunk.spawn(text) if text else None for text in (texts.in_progress, texts.in_front)]
        yield [thread for thread in (self.common, *self.heads) if thread is not None]  # they see nobody
        for i, name in enumerate(names):
            mark = texts.step.replace("{name}", name).replace("{number}", "1")
            opening = (mark + texts.openings[min(i, len(texts.openings) - 1)].replace("{name}", name)).rstrip(" ")
            ids = trunk.encode(opening)
            self.workers.append(Worker(name, trunk.spawn(ids), opening))
            self.first[self.workers[-1].thread] = ids
        self.look()
        for worker in self.workers:
            self.write(worker)
        answer = None
        while answer is None and (writing := [w for w in self.workers if w.decode is not None]):
            yield first(*(w.decode for w in writing))
            answer = self.settle(writing)
        self.stopping = True
        left = [w for w in self.workers if w.decode is not None]
        yield [w.decode for w in left]
        for worker in left:  # one more token came before they could be stopped
            worker.thread.truncate(worker.thread.length - 1)
        yield from gather(self)
        if answer is None and how.finisher_tokens:
            answer = yield from finish(self)
        return answer

    def look(self) -> None:
        """Everybody sees all blocks as they are now, its own last."""
        in_progress, in_front = self.heads
        for worker in self.workers:
            others = [w.thread for w in self.workers if w is not worker and self.how.layout != "interleaved"]
            blocks = (self.common, *(step for step, _ in self.history), in_progress, *others, in_front)
            worker.thread.see([block for block in blocks if block is not None], lined_up=True)

    def write(self, worker: Worker) -> None:
        left, how = self.how.tokens - worker.sampled, self.how
        ids = [self.trunk.encode(text) for text in how.suppress]
        sampling: dict[str, Any] = {} if how.may_end else {"min_new_tokens": NEVER}
        if single := [i[0] for i in ids if len(i) == 1]:
            sampling["suppress_tokens"] = single
        until = lambda decode: self.stopping or self.ends(worker, decode)  # noqa: E731
        worker.decode = worker.thread.decode(left, sampling=sampling, until=until) if left > 0 else None

    def ends(self, worker: Worker, decode: Decode) -> bool:
        """Whether a step ends with the token sampled last: a separator behind the end of a sentence."""
        separator, last = self.texts.separator, decode.thread.text_of(decode.token_ids[-1:])
        if not self.texts.step or not (separator in last or last.endswith(separator[-1:])):
            return False
        text = worker.opening + (decode.text or "")
        at = text.rfind(separator)
        whole = at >= 0 and (separator in last or text.endswith(separator))
        return whole and text[:at].rstrip().endswith(tuple(self.how.step_ends))

    def settle(self, writing: list[Worker]) -> str | None:
        """Move steps that were finished in this turn to the history, and begin new ones; an answer in one of them."""
        turn = max(w.sampled + len(w.decode.token_ids) for w in writing if w.decode is not None)
        self.fed += (turn - self.turn - 1) * len(writing)
        self.turn, answer, ended = turn, None, []
        for worker in writing:
            assert worker.decode is not None
            if not worker.decode.done:
                continue
            end = worker.decode.value
            worker.sampled, worker.decode = worker.sampled + len(end.token_ids), None
            if end.reason == "until":
                ended.append(worker)
                self.history.append((worker.thread, []))
                answer = answer or self.how.found(worker.opening + (end.text or ""))
            elif end.reason == "eos":
                worker.thread.truncate(worker.thread.length - 1)
        for worker in writing if answer is None else ():
            if worker in ended:
                self.next_step(worker)
            self.fed += worker not in ended
        if ended and answer is None:
            self.look()
            for worker in ended:
                self.write(worker)
        return answer

    def next_step(self, worker: Worker) -> None:
        """The token that ended a step begins the worker's next one, as its KV is still to be computed."""
        last, texts = worker.thread.token_ids[-1], self.texts
        worker.thread.truncate(worker.thread.length - 1)
        at = [thread for thread, _ in self.history].index(worker.thread)
        self.history[at] = worker.thread, [last]
        worker.number += 1
        worker.opening = texts.step.replace("{name}", worker.name).replace("{number}", str(worker.number))
        if self.fed > self.how.check_every:
            worker.opening += texts.check
            self.fed = 0
        worker.thread = self.trunk.spawn([last])
        worker.thread.insert(worker.opening)
        self.fed += 1 + len(self.trunk.encode(worker.opening))

    @property
    def mark(self) -> str:
        """What stands behind an unfinished step."""
        return self.texts.pivot + self.texts.separator if self.texts.in_progress else ""
