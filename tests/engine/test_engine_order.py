"""Odd orders: joins behind a trunk that has gone on, cuts below a fork, kills beside a join; and the critical path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from engine_kit import Does, assert_nothing_held, make_engine, make_model
from naive_engine import Run

import anabranch as ab
from anabranch.strategies import SelfConsistency, Strategy

PROMPT = [5, 6, 7, 8, 9, 10, 11]
FREE = dict(eos_token_id=None, max_new_tokens=100)


def generate(program: Callable[..., Any], prompt: Any = PROMPT, **options: Any) -> ab.Result:
    """In an engine with room, compared with the naive one: no choice depends on KV that is not its own."""
    engine = make_engine(**options)
    result = engine.generate(prompt, strategy=Does(program), seed=4, **FREE)
    assert_nothing_held(engine)
    naive = Run(make_model(), prompt, Does(program), 4, max_new_tokens=100, follow=result)
    naive.check()
    assert result.token_ids == naive.trunk.token_ids
    assert result.metrics.critical_path_tokens == naive.critical
    ab.replay(result, engine)  # what was done is told in the order in which it was done
    return result


def positions(result: ab.Result, kind: str) -> list[int]:
    return [run.position for run in result.tree.runs if run.kind == kind]


# ------------------------------------------------------------------------------------------------ joins


def test_reprefill_behind_a_trunk_that_has_gone_on_computes_the_first_child_again():
    def program(trunk):
        kids = trunk.fork(2)
        yield [kid.decode(4) for kid in kids]
        trunk.insert([1, 2, 3])
        trunk.join(kids, "reprefill")
        yield trunk.decode(3)

    result = generate(program)
    assert positions(result, "joined") == [10, 14] and positions(result, "sampled") == [18]
    assert not any(run.spliced for run in result.tree.runs)


@pytest.mark.parametrize("mode", ["concat", "reprefill"])
@pytest.mark.parametrize("kids", [1, 2])
def test_a_parent_that_wrote_anew_what_its_children_share_is_not_what_they_saw(mode, kids):
    def program(trunk):
        yield trunk.decode(4)
        children = trunk.fork(kids)
        yield [child.decode(3) for child in children]
        trunk.truncate(trunk.length - 2)
        trunk.insert([20, 21])  # as long as before, but another text
        trunk.join(children, mode)
        trunk.insert([22])
        yield trunk.decode(6)

    result = generate(program)
    assert [run.spliced for run in result.tree.runs if run.kind == "joined"] == [mode == "concat"] * kids


def test_positions_go_on_from_the_largest_that_is_left():
    def program(trunk):
        first, second = trunk.fork([[30, 31, 32, 33, 34], [40, 41]])
        trunk.join([first, second])
        trunk.insert([50])
        yield trunk
        assert trunk.length == 15
        trunk.truncate(13)  # one token of the second child is left, on 7; the first stands on 7 to 11
        trunk.insert([51])
        yield trunk.decode(2)
        trunk.truncate(9)
        trunk.insert([52])
        yield trunk.decode(2)

    result = generate(program)
    assert positions(result, "inserted") == [9]
    assert [run.position for run in result.tree.forgotten if run.kind == "inserted"] == [12, 12]


def test_a_child_that_wrote_nothing_moves_no_position():
    def program(trunk):
        yield trunk.decode(5)
        (kid,) = trunk.fork(1)
        trunk.truncate(trunk.length - 3)
        trunk.join(kid)
        yield trunk.decode(3)

    result = generate(program)
    assert positions(result, "sampled") == [7] and result.tree.stop == 12


def test_a_header_that_is_partly_cut_is_replaced_as_far_as_it_is_there():
    def program(trunk):
        kids = trunk.fork([[30], [40, 41, 42]])
        yield kids
        kids[1].truncate(kids[1].length - 2)
        kids[1].insert([50, 51])
        yield kids
        trunk.join(kids, "reprefill", headers=[None, [60]])
        yield trunk.decode(2)

    assert generate(program).token_ids[:4] == (30, 60, 50, 51)


def test_children_are_told_in_the_order_in_which_they_came_to_be():
    """Forks wait for their parent's KV and spawned threads for nothing, in a replay as well."""

    def program(trunk):
        yield trunk.decode(2)
        early = [trunk.spawn([60]), trunk.spawn([61])]
        yield early
        kids = trunk.fork([[20], [30]])
        yield kids
        late = trunk.spawn([62])
        overtaken = trunk.fork(1)  # comes to be when the trunk's last token is computed
        first = trunk.spawn([63])
        inner = kids[1].fork([[70]])
        yield inner
        yield [thread.decode(2) for thread in (*early, *kids, late, *overtaken, first, kids[1].spawn([71]), *inner)]

    result = generate(program)
    assert [kid.id for kid in result.tree.children] == ["0.0", "0.1", "0.2", "0.3", "0.4", "0.6", "0.5"]
    assert [kid.id for kid in result.tree.children[3].children] == ["0.3.0", "0.3.1"]


# ------------------------------------------------------------------------------------------------ kills


@pytest.mark.parametrize("mode", ["concat", "reprefill", "summary"])
@pytest.mark.parametrize("mortals", [1, 2])
def test_a_join_does_without_a_child_that_is_killed_while_it_waits(mode, mortals):
    def program(trunk):
        kids = trunk.fork(2)
        ends = []
        for i, kid in enumerate(kids):
            kill = lambda op, i=i: i < mortals and len(op.token_ids) == 2 and not op.thread.kill()  # noqa: E731
            ends.append(kid.decode(4, until=kill))
            kid.insert([30 + i])
        yield trunk.join(kids, mode, **({"text": [9, 8], "keep": 7} if mode == "summary" else {}))
        trunk.insert([50])
        yield trunk.decode(2)
        return [end.value.reason for end in ends]

    result = generate(program)
    assert result.answers == ["killed", "killed" if mortals == 2 else "length"]
    assert [kid.fate for kid in result.tree.children] == ["killed", "killed" if mortals == 2 else "joined"]
    assert [len(kid.token_ids) for kid in result.tree.children] == [2, 2 if mortals == 2 else 5]


def test_an_until_may_kill_who_samples_in_the_same_step():
    def program(trunk):
        kids = trunk.fork(3)
        kill = lambda op: len(op.token_ids) == 2 and not [kid.kill() for kid in kids[1:]]  # noqa: E731
        yield [
            kids[0].decode(5, until=kill),
            kids[1].decode(5, sampling={"do_sample": True, "top_k": 0}),
            kids[2].decode(4),
        ]
        return [kid.alive for kid in kids]

    result = make_engine().generate(PROMPT, strategy=Does(program), **FREE)
    assert result.answers == [True, False, False]
    assert [(kid.ended, len(kid.token_ids)) for kid in result.tree.children] == [
        ("length", 5),
        ("killed", 1),
        ("killed", 1),
    ]


# ------------------------------------------------------------------------------------------------ the clock


def waits_for_its_turn(trunk):
    a, b = trunk.fork(2)
    yield a.decode(9)
    yield b.insert([7, 8])


def joins_the_longest(trunk):
    a, b = trunk.fork(2)
    yield [a.decode(9), b.decode(2)]
    trunk.join([a, b])
    trunk.insert([3])
    yield trunk.decode(1)


def waits_for_a_kill(trunk):
    a, b = trunk.fork(2)
    (c,) = b.fork(1)
    c.decode(30)

    def sentence():
        yield a.decode(9)
        b.kill()

    trunk.start(sentence())
    yield b.join(c)  # which never comes to be
    yield trunk.decode(2)


def asks_within_until(trunk):
    a, b = trunk.fork(2)
    yield a.decode(9, until=lambda op: len(op.token_ids) == 5 and b.insert([1, 2]) and False)
    trunk.join([a, b], "discard")
    yield trunk.decode(1)


def goes_on_after_an_insert_in_until(trunk):
    a, b = trunk.fork(2)
    yield a.decode(5, until=lambda op: len(op.token_ids) == 5 and bool(b.insert([1, 2])))
    yield b.decode(1)


@pytest.mark.parametrize(
    ("program", "tokens"),
    [
        (waits_for_its_turn, 11),
        (joins_the_longest, 11),
        (waits_for_a_kill, 11),
        (asks_within_until, 10),
        (goes_on_after_an_insert_in_until, 8),
    ],
)
def test_the_critical_path_is_the_longest_chain_of_what_waited_for_what(program, tokens):
    result = make_engine().generate(PROMPT, strategy=Does(program), **FREE)
    assert result.metrics.critical_path_tokens == tokens


@pytest.mark.parametrize(
    ("same_step", "reader", "number", "tokens"),
    [
        ("none", 0, 2, 3),  # its heading and its own two: of the other it has seen but the heading
        ("none", 0, 3, 13),  # the other's heading, its first token, what it inserted then, and one behind that
        ("all", 0, 2, 13),
        ("before", 0, 2, 3),
        ("before", 1, 2, 13),
    ],
)
def test_who_sees_another_waits_for_what_it_sees_and_not_for_what_comes_after(same_step, reader, number, tokens):
    def program(trunk):
        kids = trunk.fork([[20], [30]])
        other = kids[1 - reader]
        kids[reader].see(other, same_step=same_step)
        other.decode(1)
        other.insert(list(range(40, 50)))
        other.decode(9)
        yield kids[reader].decode(number)

    assert generate(program).metrics.critical_path_tokens == tokens


@pytest.mark.parametrize(("number", "tokens"), [(1, 51), (2, 52)])
def test_who_sees_a_spawned_thread_waits_until_that_came_to_be(number, tokens):
    """The other's heading and 50 tokens; behind those the reader's second token, whose row sees a thread spawned then.
    The first one's row was computed before, and that thread not at all: in a replay neither."""

    def program(trunk):
        reader, other = trunk.fork([[20], [30]])
        decode = reader.decode(number)
        yield other.insert(list(range(40, 90)))
        reader.see(trunk.spawn([60, 61, 62]), same_step="none")
        yield decode

    assert generate(program).metrics.critical_path_tokens == tokens


# ------------------------------------------------------------------------------------------------ seeds and pages


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_seed_belongs_to_a_place_in_the_tree_not_to_an_order_of_birth(order):
    hot = {"do_sample": True, "top_k": 0, "temperature": 1.5}

    def program(trunk):
        kids = trunk.fork(2)
        inner = {i: kids[i].fork(2) for i in order}
        yield [kid.decode(8, sampling=hot) for pair in inner.values() for kid in pair]
        return [kid.token_ids for i in (0, 1) for kid in inner[i]]

    answers = generate(program).answers
    assert len(set(answers)) == 4
    twice = generate(lambda trunk: (yield trunk.fork(1)[0].fork(1)[0].decode(8, sampling=hot)))
    assert twice.answers.token_ids == answers[0]
    assert answers == make_engine().generate(PROMPT, strategy=Does(program), seed=4, **FREE).answers
    other = make_engine().generate(PROMPT, strategy=Does(program), seed=5, **FREE).answers
    assert not set(answers) & set(other)


def test_a_child_keeps_what_it_shares_while_its_parent_is_cut_and_writes_on():
    def program(trunk):
        yield trunk.decode(6)
        kids = trunk.fork([[20], [30], [40]])
        yield [kid.decode(10) for kid in kids]
        trunk.truncate(trunk.length - 4)
        trunk.insert([9])
        yield trunk.decode(6)
        large = trunk.spawn(list(range(100, 130)))
        yield large.decode(20)
        trunk.join(large, "discard")
        ends = yield [kid.decode(6) for kid in kids]
        return [end.token_ids for end in ends]

    expected = generate(program)
    fitted = 0
    for pages in range(20, 40):
        engine = make_engine(num_pages=pages)
        try:
            result = engine.generate(PROMPT, strategy=Does(program), seed=4, **FREE)
        except ValueError as error:
            assert "num_pages" in str(error)
        else:
            assert result.tree == expected.tree and result.answers == expected.answers, pages
            fitted += 1
        assert_nothing_held(engine)
    assert fitted > 5


def test_a_fork_that_comes_back_begins_where_it_was_forked_though_its_parent_has_gone_on():
    def program(trunk):
        yield trunk.decode(2)
        kids = trunk.fork([[20], [30], [40]])
        trunk.insert([1, 2, 3])
        yield [thread.decode(9) for thread in (trunk, *kids)]

    expected, preempted = generate(program), 0
    for pages in range(11, 16):
        engine = make_engine(num_pages=pages, prefix_cache=False)
        result = engine.generate(PROMPT, strategy=Does(program), seed=4, **FREE)
        assert result.tree == expected.tree, pages
        assert_nothing_held(engine)
        preempted += result.metrics.preemptions
    assert preempted > 5


def test_pre_emption_takes_the_youngest_and_changes_no_token():
    prompts = [[i, *range(50, 60)] for i in range(6)]
    options = dict(strategy=SelfConsistency(3, max_new_tokens=12), seed=3, **FREE)
    expected = make_engine(num_pages=300).generate(prompts, **options)
    engine = make_engine(num_pages=28)
    results = engine.generate(prompts, **options)
    assert [r.tree for r in results] == [r.tree for r in expected]
    assert_nothing_held(engine)
    # The first prompt is never held up: its steps are those it takes alone. Who came last is sent away first.
    assert results[0].metrics.preemptions == 0 and results[0].metrics.steps == expected[0].metrics.steps
    assert sum(r.metrics.steps for r in results) == 85 and sum(r.metrics.preemptions for r in results) == 19


class GoneAtOnce(Strategy):
    """A thread that is killed before its prompt is there."""

    def run(self, trunk):
        trunk.spawn([5, 6]).kill()
        yield trunk.decode(4)


def test_a_thread_that_is_killed_before_its_prompt_is_there_is_replayed():
    engine = make_engine()
    result = engine.generate([3, 1, 4], strategy=GoneAtOnce(), eos_token_id=None)
    again = ab.replay(result, engine)
    assert [node.fate for node in again.tree.walk()] == [node.fate for node in result.tree.walk()]
    assert_nothing_held(engine)
