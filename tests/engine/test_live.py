"""Threads that see one another, at random: every row against what the tree tells of turns and sights, dense."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from engine_kit import assert_nothing_held
from live_kit import Recorder, dense, engine
from programs_of_threads import Watching

import anabranch as ab
from anabranch.records.result import Node
from anabranch.strategies import Strategy


@dataclass(frozen=True)
class AnyLive(Strategy):
    """Forks and spawned threads that see one another, the trunk and each other's headings, and change it on the way."""

    seed: int

    def run(self, trunk):
        draw = random.Random(self.seed)
        yield trunk.decode(draw.randint(1, 3))
        kids = trunk.fork([[70 + i, *range(80, 80 + draw.randint(0, 3))] for i in range(draw.randint(1, 3))],
                          apart=draw.choice([0, 20]))  # fmt: skip
        fresh = [trunk.spawn([90 + i] * draw.randint(1, 9)) for i in range(draw.randint(1, 3))]
        if draw.random() < 0.5:
            yield fresh  # their prompts are computed plainly
        threads = [*kids, *fresh, *([trunk] if draw.random() < 0.7 else [])]

        def look(often):
            for thread in threads:
                others = [t for t in threads if t is not thread]
                if others and draw.random() < often:
                    seen = draw.sample(others, draw.randint(1, len(others)))
                    lined_up = thread in fresh and draw.random() < 0.6
                    thread.see(seen, lined_up=lined_up, same_step=draw.choice(["all", "before", "none"]))

        look(1.0)  # all advance together from here on, so which of them ends first is settled
        first = [thread.decode(draw.randint(1, 7)) for thread in threads]
        yield ab.strategies.first(*first)
        look(0.5)
        yield first
        if draw.random() < 0.5:
            draw.choice(threads).insert([100, 101])
        yield [thread.decode(draw.randint(1, 4)) for thread in draw.sample(threads, draw.randint(1, len(threads)))]
        yield trunk.join([*kids, *fresh], "reprefill")
        trunk.insert([110])
        yield trunk.decode(2)


class Recorded:
    """All tokens of a tree, with what each row saw by its turns and sights."""

    def __init__(self, result: ab.Result) -> None:
        self.tokens: list[tuple[int, int]] = []
        self.own: dict[str, list[int]] = {}
        self.turns: dict[str, list[int]] = {}
        self.before: dict[str, list[int]] = {}
        self.nodes = {node.id: node for node in result.tree.walk()}
        self._collect(result.tree, [])
        self.sees: list[dict[int, int]] = [{} for _ in self.tokens]
        self.rows: dict[tuple[int, ...], int] = {}
        for name in self.nodes:
            self._see(name)

    def _collect(self, node: Node, before: list[int]) -> None:
        self.before[node.id] = before
        own = self.own[node.id] = []
        for run in node.runs:
            assert not run.spliced
            for i, token in enumerate(run.token_ids):
                own.append(len(self.tokens))
                self.tokens.append((token, run.position + i))
        self.turns[node.id] = [turn for turn, count in node.turns for _ in range(count)]
        for kid in node.children:
            self._collect(kid, [*before, *own][: kid.forked_at] if kid.role == "fork" else [])

    def _see(self, name: str) -> None:
        node, mine, turns = self.nodes[name], self.own[name], self.turns[name]
        for i, index in enumerate(mine):
            context = [*self.before[name], *mine[: i + 1]]
            self.sees[index] = dict.fromkeys(context, 0)
            self.rows[tuple(self.tokens[j][0] for j in context)] = index
            sight = next((s for s in reversed(node.sights) if s.begin <= i), None)
            if sight is None or i >= len(turns) or not turns[i]:
                continue
            blocks = []
            for other in sight.others:
                same = sight.same_step == "all" or (sight.same_step == "before" and _path(other) < _path(name))
                blocks.append([j for j, t in zip(self.own[other], self.turns[other], strict=False)
                               if t < turns[i] or (same and t == turns[i])])  # fmt: skip
            view = [j for block in blocks for j in block]
            for at, j in enumerate(view):
                if j not in self.sees[index]:
                    apart = len(view) + i - at
                    offset = apart - self.tokens[index][1] + self.tokens[j][1] if sight.lined_up else 0
                    self.sees[index][j] = offset


def _path(name: str) -> tuple[int, ...]:
    return tuple(map(int, name.split(".")))


@pytest.mark.parametrize("seed", range(24))
def test_every_row_saw_what_the_tree_tells(seed):
    strategy, options = AnyLive(seed), dict(do_sample=True, seed=seed)
    recorder = Recorder()
    eng = engine(max_rows=(512, 12, 30)[seed % 3], page_size=(4, 1, 16)[seed % 3])
    result = eng.generate([1, 2, 3, 4, 5, 6, 7], strategy=strategy, logits_processor=[recorder], **options)
    assert_nothing_held(eng)
    recorded = Recorded(result)
    logits = dense("llama", recorded.tokens, recorded.sees)
    assert recorder.seen
    for context, scores in recorder.seen:
        expected = logits[recorded.rows[context]]
        assert float((scores - expected).norm() / expected.norm()) < 5e-4
    if seed % 2:  # in company, and pushed out by it
        short = engine(num_pages=28, max_rows=eng.max_rows)
        many = short.generate([[1, 2, 3, 4, 5, 6, 7]] * 4, strategy=strategy, do_sample=True, seed=[seed] * 4)
        assert all(other.tree == result.tree for other in many)
        assert_nothing_held(short)


@pytest.mark.parametrize("program", [1, 5, 16, 17])
def test_turns_are_the_same_however_long_a_fork_takes_to_come(program):
    """Threads that are to see forks wait for them: these come when their parent is in the cache, which takes a step or,
    where pages are short, many."""
    draw = random.Random(program)
    prompts = [[draw.randrange(97) for _ in range(draw.randint(4, 14))] for _ in range(5)]
    options = dict(strategy=Watching(program), seed=[1, 2, 3, 4, 5], eos_token_id=None, max_new_tokens=20)
    expected = engine(num_pages=3000, page_size=1).generate(prompts, do_sample=False, **options)
    for pages in (80, 60):
        short = engine(num_pages=pages, page_size=1, max_rows=64)
        results = short.generate(prompts, do_sample=False, **options)
        assert [r.tree for r in results] == [r.tree for r in expected]
        assert_nothing_held(short)
