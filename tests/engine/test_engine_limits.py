"""Limits that queue and never lose anything (threads, pages, tokens), and the accounts of what it all cost."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest
from engine_kit import Nested, assert_nothing_held, make_engine

import anabranch as ab
from anabranch.engine.stepper import Stepper
from anabranch.records.metrics import PHASES, summary
from anabranch.strategies import Aspects, SelfConsistency, Sequential, Strategy

PROMPT = [5, 6, 7, 8, 9, 10, 11]
FREE = dict(eos_token_id=None, max_new_tokens=100)


@pytest.fixture
def at_once(monkeypatch):
    """How many threads, of all prompts, were given a token in each sampling."""
    seen: list[int] = []
    sample = Stepper.sample

    def watch(self, ready):
        seen.append(len(ready))
        return sample(self, ready)

    monkeypatch.setattr(Stepper, "sample", watch)
    return seen


# ------------------------------------------------------------------------------------------------ threads


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_more_threads_than_allowed_wait_and_change_no_token(limit, at_once):
    prompts = [PROMPT, [1, 2, 3], list(range(40, 60))]
    free = make_engine(num_pages=600)
    held = make_engine(num_pages=600, max_threads=limit)
    for strategy in (Nested(), SelfConsistency(5, max_new_tokens=6), Sequential(Nested())):
        expected = free.generate(prompts, strategy=strategy, seed=3, **FREE)
        at_once.clear()
        results = held.generate(prompts, strategy=strategy, seed=3, **FREE)
        assert [r.tree for r in results] == [r.tree for r in expected]
        assert max(at_once) == limit
        assert_nothing_held(held)


@pytest.mark.parametrize(("limit", "waves"), [(None, 1), (4, 1), (3, 2), (2, 2), (1, 4)])
def test_who_waits_for_a_turn_waits_for_tokens(limit, waves):
    result = make_engine(max_threads=limit).generate(PROMPT, strategy=SelfConsistency(4, max_new_tokens=6), **FREE)
    assert result.metrics.critical_path_tokens == 6 * waves and result.metrics.total_tokens == 24
    assert result.metrics.max_concurrency == min(limit or 4, 4)


def test_a_killed_thread_gives_its_turn_away_and_nobody_waits_for_ever():
    @dataclass(frozen=True)
    class Gone(Strategy):
        def run(self, trunk):
            kids = trunk.fork(3)
            first, second, third = (kid.decode(n) for kid, n in zip(kids, (6, 20, 6), strict=True))
            yield first
            kids[1].kill()
            assert second.done and second.value.reason == "killed"
            trunk.decode(2)  # the trunk goes on beside the last child
            yield third
            trunk.join([kids[0], kids[2]])
            trunk.insert([3])
            yield trunk.decode(2)

    free, held = (make_engine(max_threads=n).generate(PROMPT, strategy=Gone(), **FREE) for n in (None, 1))
    assert free.token_ids == held.token_ids and held.metrics.max_concurrency == 1
    assert (
        free.metrics.critical_path_tokens == 6 + 2 + 1 + 2 - 2 + 2
    )  # the third's 6 beside, then on behind the trunk's 2


@dataclass(frozen=True)
class Families(Strategy):
    """Every child goes its own way: it decodes, forks, and takes its children back, whatever the others do."""

    def run(self, trunk):
        def family(kid):
            yield kid.decode(4)
            kids = kid.fork([[60], [61, 62]])
            yield [k.decode(5) for k in kids]
            kid.join(kids)
            kid.insert([63])
            yield kid.decode(2)

        kids = trunk.fork([[20], [30, 31], [40]])
        yield [family(kid) for kid in kids]
        trunk.join(kids)
        trunk.insert([50])
        yield trunk.decode(3)


def test_one_after_another_means_no_thread_before_another_is_through(monkeypatch):
    turns: list[str] = []
    sample = Stepper.sample

    def watch(self, ready):
        assert len(ready) == 1
        turns.append(ready[0].id)
        return sample(self, ready)

    monkeypatch.setattr(Stepper, "sample", watch)
    strategy = Sequential(Families())
    free = make_engine().generate(PROMPT, strategy=strategy, **FREE)
    one = lambda k: [f"0.{k}"] * 4 + [f"0.{k}.0"] * 5 + [f"0.{k}.1"] * 5 + [f"0.{k}"] * 2  # noqa: E731
    expected = [*one(0), *one(1), *one(2), *["0"] * 3]
    assert turns == expected
    for options in (dict(max_threads=1), dict(max_threads=1, max_rows=2), dict(num_pages=26, max_threads=1)):
        for total in (None, 9, 30):  # who a budget stops does not depend on the pages either
            held, budget = make_engine(**options), {} if total is None else {"max_total_tokens": total}
            turns.clear()
            result = held.generate(PROMPT, strategy=strategy, **budget, **FREE)
            assert turns == expected[:total]
            assert total is not None or result.tree == free.tree
            assert_nothing_held(held)


def test_a_limit_below_one_is_no_limit():
    for wrong in (0, 2.0, "3"):
        with pytest.raises(ValueError, match=r"max_threads=.*; pass a whole number of at least 1"):
            make_engine(max_threads=wrong)


# ------------------------------------------------------------------------------------------------ pages


def test_prompts_that_do_not_fit_together_wait_for_one_another():
    prompts = [[i, *range(50, 80)] for i in range(12)]
    strategy = SelfConsistency(3, max_new_tokens=9)
    expected = make_engine(num_pages=900).generate(prompts, strategy=strategy, **FREE)
    engine = make_engine(num_pages=20)  # of 4 tokens: one prompt of 31 tokens and its branches, or two prompts bare
    results = engine.generate(prompts, strategy=strategy, **FREE)
    assert [r.tree for r in results] == [r.tree for r in expected] and results[-1].metrics.pages_peak <= 20
    assert_nothing_held(engine)
    assert {len(r.token_ids) for r in engine.generate(prompts, **FREE | {"max_new_tokens": 40})} == {40}
    assert_nothing_held(engine)


def test_pages_that_cannot_be_taken_are_waited_for():
    """The second prompt's children share what their parent has cut off: they cannot be built again, so never leave."""

    @dataclass(frozen=True)
    class Pinned(Strategy):
        def run(self, trunk):
            if trunk.context[0] == 1:
                yield trunk.decode(2)
                yield trunk.decode(60)  # more than is left beside the other
                return
            yield trunk.decode(8)
            kids = trunk.fork([[20], [30], [40]])
            trunk.truncate(trunk.length - 6)
            yield [kid.decode(12) for kid in kids]

    prompts = [[1, 2, 3], [9, 8, 7]]
    expected = make_engine(num_pages=200).generate(prompts, strategy=Pinned(), **FREE)
    waited = 0
    for pages in (16, 17, 18, 19, 22, 26):
        engine = make_engine(num_pages=pages)
        try:
            results = engine.generate(prompts, strategy=Pinned(), **FREE)
        except ValueError as error:
            assert pages < 17 and "larger num_pages" in str(error), (pages, error)
        else:
            assert [r.tree for r in results] == [r.tree for r in expected]
            waited += 1
        assert_nothing_held(engine)
    assert waited >= 5


def test_the_same_seed_alone_in_a_batch_of_16_and_after_a_pre_emption():
    prompts = [[i + 1, *range(30, 30 + i % 5)] for i in range(16)]
    seeds = list(range(100, 116))
    options = dict(strategy=Nested(), do_sample=True, temperature=1.2, **FREE)
    roomy = make_engine(num_pages=1500)
    batch = roomy.generate(prompts, seed=seeds, **options)
    tight = make_engine(num_pages=80)
    pre_empted = tight.generate(prompts, seed=seeds, **options)
    assert sum(r.metrics.preemptions > 0 for r in pre_empted) >= 4
    for i in (0, 3, 7, 15):
        assert roomy.generate(prompts[i], seed=seeds[i], **options).tree == batch[i].tree
    assert [r.tree for r in pre_empted] == [r.tree for r in batch]
    assert len({r.token_ids for r in batch}) == 16
    assert_nothing_held(tight)


# ------------------------------------------------------------------------------------------------ accounts


def test_a_step_that_prompts_share_counts_for_each_by_its_rows():
    engine = make_engine(num_pages=600, prefix_cache=False)
    prompts = [PROMPT, [1, 2, 3], list(range(40, 75))]
    alone = [engine.generate(p, strategy=Nested(), **FREE).metrics for p in prompts]
    begin = time.perf_counter()
    together = [r.metrics for r in engine.generate(prompts, strategy=Nested(), **FREE)]
    wall = time.perf_counter() - begin
    assert [m.rows for m in together] == [m.rows for m in alone]
    assert [m.steps for m in together] == [m.steps for m in alone]
    for m in together:
        assert set(m.seconds) == set(PHASES) and min(m.seconds.values()) > 0
        assert m.overhead_seconds == pytest.approx(m.seconds["plan"] + m.seconds["strategy"])
        assert 0 < m.overhead < 1 and m.overhead == pytest.approx(m.overhead_seconds / sum(m.seconds.values()))
    total = summary(together)
    assert total["rows"] == sum(m.rows for m in alone)
    phases = sum(total[f"{phase}_seconds"] for phase in PHASES)
    assert 0.5 * wall < phases < wall
    assert total["overhead"] == pytest.approx(total["overhead_seconds"] / phases)
    assert total["longest_context"] == max(m.longest_context for m in alone)


def test_sharing_is_that_of_one_moment():
    result = make_engine().generate(PROMPT, strategy=SelfConsistency(5, max_new_tokens=9), **FREE)
    m = result.metrics
    # At the last step: the trunk, and five branches of 8 cached tokens (the last ones' KV is not needed), each with a
    # copy of the 3 tokens that stood in the part-filled page when it was forked.
    assert m.tokens_logical_peak == 7 + 5 * (7 + 8) and m.tokens_physical_then == 7 + 5 * (3 + 8)
    assert m.sharing == pytest.approx((7 + 5 * 15) / (7 + 5 * 11))
    late = Aspects(([1], [2], [3]), [4], after=(), intro_tokens=20, aspect_tokens=5, aspect_stop=())
    m = make_engine().generate(PROMPT, strategy=late, **FREE).metrics
    assert m.tokens_physical_then < m.tokens_physical_peak  # the conclusion is written by the trunk alone
    assert m.sharing == pytest.approx(m.tokens_logical_peak / m.tokens_physical_then)
    assert m.sharing > m.tokens_logical_peak / m.tokens_physical_peak


def test_log_probabilities_are_recorded_where_asked_for():
    engine = make_engine()
    plain = engine.generate(PROMPT, strategy=Nested(), **FREE)
    asked = engine.generate(PROMPT, strategy=Nested(), logprobs=True, **FREE)
    assert asked.tree == plain.tree
    for node, bare in zip(asked.tree.walk(), plain.tree.walk(), strict=True):
        for run, without in zip(node.runs, bare.runs, strict=True):
            assert without.logprobs is None
            assert (run.logprobs is not None) == (run.kind == "sampled")
            assert run.logprobs is None or (len(run.logprobs) == len(run.token_ids) and max(run.logprobs) < 0)
    with pytest.raises(ValueError, match="logprobs=1; pass True"):
        engine.generate(PROMPT, logprobs=1)


def test_a_budget_over_all_threads_is_kept_to_the_token():
    @dataclass(frozen=True)
    class Wide(Strategy):
        def run(self, trunk):
            kids = trunk.fork(7)
            ends = yield [kid.decode(9) for kid in kids]
            return [end.reason for end in ends]

    for budget in (1, 6, 7, 8, 30, 62, 63, 64):
        for limit in (None, 2):
            result = make_engine(max_threads=limit).generate(PROMPT, strategy=Wide(), max_total_tokens=budget, **FREE)
            assert result.metrics.sampled_tokens == min(budget, 63)
            assert ("budget" in result.answers) == (budget < 63)


def test_the_engine_is_good_as_new_after_a_shortage():
    engine = make_engine(num_pages=10)
    with pytest.raises(ValueError, match="larger num_pages"):
        engine.generate(PROMPT, strategy=Nested(), **FREE)
    assert_nothing_held(engine)
    plain = engine.generate(PROMPT, max_new_tokens=8, eos_token_id=None)
    assert plain.token_ids == make_engine().generate(PROMPT, max_new_tokens=8, eos_token_id=None).token_ids
    assert isinstance(plain, ab.Result)


@dataclass(frozen=True)
class Fresh(Strategy):
    """Threads with prompts of their own that begin alike, at once and one after another."""

    def run(self, trunk):
        yield trunk.decode(2)
        base = list(range(100, 130))
        kids = [trunk.spawn([*base[:n], 7]) for n in (30, 30, 17, 2)]
        yield [kid.decode(5) for kid in kids]
        late = trunk.spawn(base)
        yield late.decode(5)
        return [kid.token_ids for kid in (*kids, late)]


def test_what_prompts_of_one_parent_have_in_common_is_computed_once():
    engine = make_engine()
    result = engine.generate(PROMPT, strategy=Fresh(), **FREE)
    alone = {}
    for prompt in ([*range(100, 130), 7], [*range(100, 117), 7], [100, 101, 7], list(range(100, 130))):
        alone[len(prompt)] = engine.generate(prompt, max_new_tokens=5, eos_token_id=None).token_ids
    assert result.answers == [alone[31], alone[31], alone[18], alone[3], alone[30]]
    # 30 of the second's 31 tokens, 17 of the third's 18, 29 of the last one's 30; two tokens are less than a page.
    assert result.metrics.rows == (7 + 1) + (31 + 1 + 1 + 3 + 1) + 5 * 4
    assert_nothing_held(engine)
    for options in (dict(max_rows=5), dict(max_threads=1), dict(num_pages=14), dict(num_pages=14, max_rows=3)):
        small = make_engine(**options)
        assert small.generate(PROMPT, strategy=Fresh(), **FREE).tree == result.tree
        assert_nothing_held(small)
