"""Strategies at random: what any of them may ask of the loop, in any order."""

from __future__ import annotations

import random
from dataclasses import dataclass

from anabranch.strategies import Strategy


@dataclass(frozen=True)
class Anything(Strategy):
    """A random program of forks, joins of every mode, truncations, kills and spawns."""

    program: int

    def work(self, thread, rng, depth):
        for _ in range(rng.randint(1, 3)):
            yield thread.decode(rng.randint(1, 5), sampling={"do_sample": rng.random() < 0.5})
            if rng.random() < 0.2 and len(thread.token_ids) > 2 and not thread._segments[-1].spliced:
                thread.truncate(thread.length - rng.randint(1, min(2, len(thread._segments[-1].token_ids))))
                thread.insert([rng.randrange(200)])
            if depth < 2 and rng.random() < 0.7:
                if rng.random() < 0.2:
                    kid = thread.spawn([rng.randrange(200) for _ in range(3)])
                    yield self.work(kid, rng, 2)
                    yield thread.join(kid, "summary", text=[rng.randrange(200)])
                    continue
                kids = thread.fork(
                    [[rng.randrange(200) for _ in range(rng.randint(1, 3))] for _ in range(rng.randint(1, 4))]
                )
                seeds = [random.Random(rng.random()) for _ in kids]
                yield [self.work(kid, r, depth + 1) for kid, r in zip(kids, seeds, strict=True)]
                if rng.random() < 0.2:
                    kids.pop(rng.randrange(len(kids))).kill()
                mode = rng.choice(["concat", "concat", "reprefill", "discard"])
                if kids:
                    thread.join(kids, mode)
                thread.insert([rng.randrange(200)])
        yield thread  # what is still queued when run() returns may or may not happen, depending on the pages

    def run(self, trunk):
        yield from self.work(trunk, random.Random(self.program), 0)
        yield trunk.decode(3)
