"""Guessers for tests of drafts: some lie, some know what plain decoding would choose."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import anabranch as ab
from anabranch.engine import stepper


class Known(dict):
    """What a run of the engine chose: (thread id, context) → token. Filled while `watching`."""

    def watching(self, monkeypatch, run: Callable[[], Any]) -> Any:
        record = stepper.record_token

        def noted(request, thread, token, logprob=None):
            self[request.index, thread.id, tuple(thread.context)] = token
            record(request, thread, token, logprob)

        with monkeypatch.context() as patch:
            patch.setattr(stepper, "record_token", noted)
            return run()

    def path(self, ask, length: int) -> list[int]:
        """What the thread would be given next, as far as that is known."""
        context, found = list(ask.context), []
        while len(found) < length:
            token = self.get((ask.request.index, ask.thread.id, tuple(context)))
            if token is None:
                break
            found.append(token)
            context.append(token)
        return found


class Guesses:
    """A proposer of one `kind`; closed ones are asked nothing more."""

    def __init__(self, kind: str, known: Known, vocabulary: int, seed: int = 0):
        self.kind, self.known, self.vocabulary = kind, known, vocabulary
        self.random = random.Random(seed)
        self.asked = self.closed = 0

    def propose(self, asks):
        self.asked += len(asks)
        return [getattr(self, f"_{self.kind}")(ask) for ask in asks]

    def close(self):
        self.closed += 1

    def _noise(self, ask):
        return [self.random.randrange(self.vocabulary) for _ in range(self.random.randint(0, ask.length + 3))]

    def _random(self, ask):
        return [self._noise(ask) for _ in range(self.random.randint(0, 4))]

    def _right(self, ask):
        return [self.known.path(ask, ask.length)]

    def _wrong(self, ask):
        right = self.known.path(ask, 1)
        return [[(right[0] + 1) % self.vocabulary] * ask.length if right else []]

    def _second(self, ask):
        """Right on a path beside the first, which goes wrong somewhere."""
        right = self.known.path(ask, ask.length)
        return [self._cut(right, ask), right]

    def _mixed(self, ask):
        """Right for a while, on any of several paths, some of them the same, some with ids that are no tokens."""
        right = self.known.path(ask, ask.length + 2)
        paths = [self._cut(right, ask) for _ in range(self.random.randint(0, 4))]
        paths += self.random.sample(paths, self.random.randint(0, len(paths)))
        self.random.shuffle(paths)
        return [[*path, self.vocabulary + 5, -1, 3] if self.random.random() < 0.2 else path for path in paths]

    def _cut(self, right, ask):
        return [*right[: self.random.randint(0, len(right))], *self._noise(ask)]


def drafted(strategy, guesses, **options) -> ab.DraftTree:
    """`strategy` with guesses, of up to 6 tokens on up to 3 paths where nothing else is said."""
    return ab.DraftTree(strategy, draft=guesses, **{"length": 6, "width": 3, **options})
