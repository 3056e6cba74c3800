"""Who gives way when pages run out: what nobody waits for, then the youngest; never a parent of what is cached."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from engine_kit import assert_nothing_held, make_engine

from anabranch.engine.thread_kv import ThreadKV
from anabranch.strategies import Strategy

PROMPTS = [[5 + i, 6, 7, 8 + i] for i in range(4)]
OPTIONS = dict(max_new_tokens=20, eos_token_id=None)


def test_the_youngest_prompt_gives_way():
    """Room for two of four and a bit: the two oldest are never pushed out, so they end when they would end alone."""
    expected = make_engine(num_pages=64).generate(PROMPTS, **OPTIONS)
    engine = make_engine(num_pages=13)  # a prompt and its answer take 6
    results = engine.generate(PROMPTS, **OPTIONS)
    preempted = [r.metrics.preemptions for r in results]
    assert [r.token_ids for r in results] == [r.token_ids for r in expected]
    assert preempted[0] == preempted[1] == 0 and sum(preempted[2:]) > 0
    assert_nothing_held(engine)


def test_one_after_another_is_the_least_number_of_steps():
    """Those that fit decode together to their end; pushing out the older first would compute them again and again."""
    few, many = make_engine(num_pages=13), make_engine(num_pages=64)
    steps = {}
    for name, engine in (("few", few), ("many", many)):
        results = engine.generate(PROMPTS, **OPTIONS)
        steps[name] = max(r.metrics.steps for r in results)
    assert steps["many"] == 20
    assert steps["few"] <= 2 * steps["many"] + 2  # two and two


@dataclass(frozen=True)
class Leaves(Strategy):
    """Spawns a thread that is then left alone while the trunk and a second one go on."""

    def run(self, trunk):
        left = trunk.spawn([40, 41, 42, 43, 44, 45, 46])
        yield left.decode(4)
        second = trunk.spawn([50, 51, 52])
        yield [second.decode(14), trunk.decode(14)]
        return (yield left.decode(3)).token_ids, second.token_ids, trunk.token_ids


@pytest.mark.parametrize("pages", [9, 10, 11])
def test_a_thread_that_nobody_waits_for_leaves_first(pages, monkeypatch):
    expected = make_engine(num_pages=64).generate(PROMPTS[0], Leaves(), max_new_tokens=40, eos_token_id=None)
    engine = make_engine(num_pages=pages)
    left: list[tuple[str, int]] = []
    release = ThreadKV.release

    def noted(self, cache):
        if self.branch is not None and self.thread.alive and not self.thread.request.finished:
            left.append((self.thread.id, len(self.thread.queue)))
        release(self, cache)

    monkeypatch.setattr(ThreadKV, "release", noted)
    result = engine.generate(PROMPTS[0], Leaves(), max_new_tokens=40, eos_token_id=None)
    assert result.answers == expected.answers
    assert result.metrics.preemptions > 0 and left[0] == ("0.0", 0)


@dataclass(frozen=True)
class Comes(Strategy):
    """The first prompt joins a child that wrote nothing, and so comes back into the cache without a row."""

    def run(self, trunk):
        if trunk.context[0] == PROMPTS[0][0]:
            kids = trunk.fork([None, [30]])
            yield kids[1].decode(10)
            trunk.join(kids[1], "concat")
            trunk.join(kids[0], "concat")
            trunk.insert([40])
            yield trunk.decode(2)
        else:
            yield trunk.decode(8)


@pytest.mark.parametrize("pages", [18, 19, 20, 22])
def test_who_comes_back_without_a_row_goes_on_before_another_is_told_that_pages_are_too_few(pages):
    """Each of the two prompts has room enough by itself, so neither may fail beside the other."""
    expected = make_engine(num_pages=64, page_size=1).generate(PROMPTS[:2], Comes(), **OPTIONS)
    engine = make_engine(num_pages=pages, page_size=1, prefix_cache=False)
    assert [r.tree for r in engine.generate(PROMPTS[:2], Comes(), **OPTIONS)] == [r.tree for r in expected]
    assert_nothing_held(engine)
