"""Many engines with Ray: a fleet of actors that outlives any one of them, and a data set answered by `map_batches`.

    pip install 'anabranch[ray]'
    python examples/ray_engines.py

A request is one engine's: all its threads share that engine's cache and forwards. Requests of one session go to one
replica as well, where the session's prefix is in the cache. Every event comes back as it happens, so the fleet holds a
trace of what each request has written so far. If its replica dies, another is given the request with this trace for a
draft (`DraftTree`): what was written is verified many tokens a step instead of being written again, and the answer is
token for token what it would have been, since a draft changes no token.
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from zlib import crc32

import ray

import anabranch as ab
from anabranch.records import events

Written = dict[str, dict[int, int]]  # thread → position → token


class Trace:
    """What the threads of a request have written so far, by position; and a `Proposer` that proposes it."""

    def __init__(self, written: Written | None = None) -> None:
        self.written: Written = defaultdict(dict, written or {})

    def note(self, event: events.Event) -> None:
        if isinstance(event, events.Token):
            self.written[event.thread].update(enumerate(event.token_ids, event.position))

    def propose(self, asks: Sequence) -> list[list[list[int]]]:
        return [[self._from(ask.thread.id, ask.thread.position, ask.length)] for ask in asks]

    def _from(self, thread: str, position: int, length: int) -> list[int]:
        tokens, path = self.written.get(thread, {}), []
        while len(path) < length and position in tokens:
            path.append(tokens[position])
            position += 1
        return path

    def close(self) -> None:
        pass


@ray.remote(max_concurrency=32)  # as many requests share its forwards
class Replica:
    """An actor with an engine. make: called in the actor, so that no weights travel."""

    def __init__(self, make: Callable[[], ab.Engine]) -> None:
        self.engine = make()

    def events(self, prompt, written: Written, strategy=None, **options):
        """The events of a request; written: by an actor that had it before."""
        if written:
            strategy = ab.DraftTree(strategy, draft=Trace(written), length=64, width=1)
        # No `yield from`: Ray sends values into what it iterates over.
        for event in self.engine.stream(prompt, strategy=strategy, **options):  # noqa: UP028
            yield event

    def pid(self) -> int:
        return os.getpid()


class Fleet:
    """Engines behind one `generate`; call it from as many Python threads as there are requests.

    make: makes an engine. replicas: how many. resources: of each actor, such as ``num_gpus=1``.
    """

    def __init__(self, make: Callable[[], ab.Engine], replicas: int = 2, **resources) -> None:
        self._start = lambda: Replica.options(**resources).remote(make)
        self.replicas = [self._start() for _ in range(replicas)]
        self._door = threading.Lock()
        self.resumed = 0  # requests that went on elsewhere

    def generate(self, prompt, session: str | None = None, attempts: int = 3, **options) -> ab.Result:
        """As `Engine.generate`, for one prompt. session: requests of one go to one replica; default: by the prompt's
        beginning. Raises what the request raised, and Ray's error once `attempts` replicas have died."""
        place = crc32(repr(session or prompt[:64]).encode()) % len(self.replicas)
        trace = Trace()
        for left in reversed(range(attempts)):
            replica = self.replicas[place]
            stream = replica.events.options(num_returns="streaming")
            try:
                for ref in stream.remote(prompt, dict(trace.written), **options):
                    event = ray.get(ref)
                    trace.note(event)
                    if isinstance(event, events.Finish):
                        return event.result
            except ray.exceptions.RayActorError:
                self._replace(place, replica)
                if not left:
                    raise
                self.resumed += 1
            except ray.exceptions.RayTaskError as error:  # the request's own: a ValueError, say
                raise error.cause from None
        raise RuntimeError("a stream ended without its Finish")

    def _replace(self, place: int, dead) -> None:
        with self._door:
            if self.replicas[place] is dead:  # the first who notices
                self.replicas[place] = self._start()


class Answer:
    """For ``dataset.map_batches(Answer, …)``: a batch of prompts shares the engine's forwards."""

    def __init__(self, make: Callable[[], ab.Engine]) -> None:
        self.engine = make()

    def __call__(self, batch):
        results = self.engine.generate(list(map(str, batch["prompt"])), max_new_tokens=40)
        return {**batch, "answer": [result.text for result in results]}


def make() -> ab.Engine:
    return ab.Engine(*ab.models.load("multiplication"), num_pages=512)


def main() -> None:
    ray.init(include_dashboard=False, log_to_driver=False)
    prompts = [f"{a}*{b}=" for a, b in ((12, 34), (7, 8), (56, 78), (90, 12))]
    fleet = Fleet(make)
    with ThreadPoolExecutor() as pool:
        results = pool.map(lambda prompt: fleet.generate(prompt, max_new_tokens=40), prompts)
        print("\n".join(result.text for result in results))
    data = ray.data.from_items([{"prompt": prompt} for prompt in prompts])
    answered = data.map_batches(Answer, fn_constructor_args=(make,), batch_size=2, concurrency=1)
    print("\n".join(row["prompt"] + row["answer"] for row in answered.take_all()))


if __name__ == "__main__":
    main()
