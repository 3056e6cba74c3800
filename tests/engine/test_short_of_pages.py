"""Where pages are short: who waits keeps what it comes from, and who cannot fit is told so, whoever comes and goes."""

from __future__ import annotations

import random

import pytest
from engine_kit import assert_nothing_held, make_engine
from naive_problems import make, tokenizer
from programs_of_threads import Everything
from steps_kit import Steps
from test_naive_engine import Problem

import anabranch as ab
from anabranch.engine import loop
from anabranch.engine.loop import NothingMoves
from anabranch.engine.scheduler import Scheduler
from anabranch.engine.stepper import Stepper
from anabranch.strategies import Strategy


def comes_from(kv) -> set[int]:
    """Ids of what a thread outside the cache has to find there: what it continues, the siblings it sees, theirs."""
    if kv.branch is not None or kv.aside is not None:
        return set()
    thread, found = kv.thread, set()
    before = [s.spliced for s in thread.seen if s.spliced is not None and (s.spliced.alive or s.spliced.lingers)]
    before += [thread.parent] if thread.role == "fork" else []
    for other in before:
        found |= {id(other.kv)} | comes_from(other.kv)
    return found


@pytest.mark.parametrize("number", [59, 81, 142, 269])
def test_what_a_waiting_thread_comes_from_is_not_idle(number, monkeypatch):
    """A sibling that it sees, too: else the one enters to make the other possible, is pushed out as idle, and so on."""
    Steps.watch(monkeypatch, 20_000)
    pushed_out, all_wanted, victim = 0, Scheduler.all_wanted, Scheduler._victim

    def noted(self):
        wanted = all_wanted(self)
        threads = [thread.kv for request in self.active for thread in request.threads]
        self.waited_for = set().union(*(comes_from(kv) for kv in threads if id(kv) in self._needed))
        return wanted

    def watched(self, oldest):
        nonlocal pushed_out
        chosen = victim(self, oldest)
        if chosen is not None and id(oldest) not in self._ahead:
            pushed_out += 1
            assert chosen.thread.age > oldest.thread.age or id(chosen) not in self.waited_for
        return chosen

    monkeypatch.setattr(Scheduler, "all_wanted", noted)
    monkeypatch.setattr(Scheduler, "_victim", watched)
    problem = Problem(number, (1, 4, 12))
    problem.strategy, problem.live, problem.draft = Everything(number, races=False, sees=0.4), False, None
    rng = random.Random(number)
    size, pages = rng.choice([2, 4]), rng.choice([20, 30, 40, 60, 80, 110])
    eng = ab.Engine(make("anabranch"), tokenizer(), num_pages=pages, page_size=size, max_rows=problem.rows)
    try:
        problem.added(eng, dict(strategy=problem.strategy, max_new_tokens=problem.most, eos_token_id=None))
    except ValueError as error:
        assert "num_pages" in str(error)
    assert pushed_out
    while eng.step():
        pass
    assert_nothing_held(eng)


class Large(Strategy):
    """Each of its threads fits in the cache; all of them at once, as its join wants them, do not."""

    def run(self, trunk):
        children = trunk.fork([[10, 11, 12], [13, 14], [15]])
        yield [child.decode(30) for child in children]
        yield trunk.join(children)
        trunk.insert([20])
        return (yield trunk.decode(2)).token_ids


@pytest.mark.parametrize("place", ["first", "in the middle"])
def test_who_cannot_fit_is_told_while_others_come_and_go(place, monkeypatch):
    Steps.watch(monkeypatch, 3_000)
    prompt, few = list(range(30, 54)), dict(max_new_tokens=12, eos_token_id=None)
    expected = make_engine(num_pages=200).generate([5, 6, 7], **few)
    with pytest.raises(ValueError, match=r"num_pages=24"):
        make_engine(num_pages=24).generate(prompt, Large(), max_new_tokens=200, eos_token_id=None)
    eng = make_engine(num_pages=24, prefix_cache=False)
    small = [eng.add([5, 6, 7], **few) for _ in range(3 if place != "first" else 0)]
    large = eng.add(prompt, Large(), max_new_tokens=200, eos_token_id=None)
    while not large.done:  # there is always another one
        while sum(not handle.done for handle in small) < 3:
            small.append(eng.add([5, 6, 7], **few))
        eng.step()
    with pytest.raises(ValueError, match=r"num_pages=24.*is too small for prompt 0"):
        large.result()
    while eng.step():
        pass
    assert len(small) > 4 and all(handle.result().token_ids == expected.token_ids for handle in small)
    assert_nothing_held(eng)


def test_threads_that_only_push_one_another_out_end_with_an_error(monkeypatch):
    """No order of ours does that; if one did, it would be said, and the others would go on."""

    def moves_only(self, wanted):
        self.moves += 1
        return []

    monkeypatch.setattr(Scheduler, "choose", moves_only)
    eng = make_engine(num_pages=24)
    with pytest.raises(NothingMoves, match="wait for one another"):
        eng.generate([5, 6, 7], max_new_tokens=4)
    assert_nothing_held(eng)


def in_circles(monkeypatch, alone: bool) -> None:
    """After each step everybody leaves the cache, whatever was computed; alone: but who has it for itself stays."""
    step = Stepper.step

    def stepped(self):
        step(self)
        active, only = self.scheduler.active, self.scheduler._only
        for request in active:
            if not (alone and (len(active) == 1 or (only is not None and only[0] is request))):
                for thread in request.threads:
                    thread.kv.make_room(self.cache)

    monkeypatch.setattr(Stepper, "step", stepped)
    monkeypatch.setattr(loop, "BARREN", 20)


def test_who_pushed_one_another_out_in_circles_have_the_cache_one_after_another(monkeypatch):
    """Each forward computes the same four tokens once more: without the last resort that would go on for ever."""
    prompts, options = [list(range(30, 54)), list(range(60, 70))], dict(max_new_tokens=3, eos_token_id=None)
    expected = make_engine(num_pages=200).generate(prompts, **options)
    in_circles(monkeypatch, alone=True)
    eng = make_engine(num_pages=24, max_rows=4, prefix_cache=False)
    first, second = (eng.add(prompt, **options) for prompt in prompts)
    Steps.watch(monkeypatch, 20_000)
    while eng.step():
        pass
    assert [first.result().token_ids, second.result().token_ids] == [result.token_ids for result in expected]
    assert_nothing_held(eng)


@pytest.mark.parametrize("made", [True, False])
def test_and_where_that_does_not_help_the_first_ends_with_an_error(made, monkeypatch):
    """made: the first had the cache for itself; else it was given it, and the others went on all the same."""
    in_circles(monkeypatch, alone=False)
    if not made:
        monkeypatch.setattr(Scheduler, "make_way", lambda self: True)
    Steps.watch(monkeypatch, 3_000)
    eng = make_engine(num_pages=24, max_rows=4, prefix_cache=False)
    handles = [eng.add(list(range(30, 54)), max_new_tokens=3, eos_token_id=None) for _ in range(2)]
    while eng.step():
        pass
    for handle in handles:
        with pytest.raises(NothingMoves, match="wait for one another"):
            handle.result()
    assert_nothing_held(eng)
