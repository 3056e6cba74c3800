"""Traces of random programs, replayed token for token and as likely as before; cut by hand, refused, never for ever."""

from __future__ import annotations

import copy
import json
import random

import pytest
from engine_kit import assert_nothing_held, byte_tokenizer, make_engine
from formats_kit import FORMATS
from malformed_kit import Malformed, tiny_engine
from malformed_kit import generate as written_by
from programs_live import Sharing
from programs_of_threads import Anything, Everything, Sights, Watching
from steps_kit import Steps

import anabranch as ab
from anabranch.engine import logprob_pairs
from anabranch.records import trace
from anabranch.strategies import Sequential, Strategy

PROMPT = [1, 2, 3, 4, 5]
FREE = dict(eos_token_id=None, max_new_tokens=40)


@pytest.fixture(autouse=True)
def watch(monkeypatch):
    Steps.watch(monkeypatch, 6000)


def generate(strategy, seed=2, prompt=PROMPT, **options):
    engine = make_engine(tokenizer=byte_tokenizer(), num_pages=2000)
    return engine.generate(prompt, strategy=strategy, seed=seed, **{**FREE, **options})


def written(result) -> trace.Trace:
    """Its trace as it comes back from a file."""
    return trace.Trace.from_dict(json.loads(json.dumps(result.trace().as_dict())))


def assert_replays(result, **options):
    engine = make_engine(tokenizer=byte_tokenizer(), **{"num_pages": 2000, **options})
    again = ab.replay(written(result), engine)  # it compares the trees itself
    assert max((abs(a - b) for a, b in logprob_pairs(result, again)), default=0.0) < 2e-4
    assert_nothing_held(engine)
    return again


# Of each kind of random program some, and those that once could not be replayed: their logs told who was killed, or
# spawned, before what was cut was gone (33, 35); a thread waited for what others were to write in turns to come (2).
PROGRAMS = [
    *(Everything(n, 256) for n in (33, 35, 4)),
    *(Everything(n, 256, sees=0.4) for n in (2, 7)),
    Everything(3, 256, races=True),
    Sequential(Everything(5, 256, races=True)),
    *map(Watching, (2, 11, 5)),
    *map(Sharing, (20, 22, 39, 2)),
    *map(Sights, (1, 6)),
    *map(Anything, (3, 8)),
    ab.DraftTree(Everything(6, 256), draft="siblings", length=4),
]


@pytest.mark.parametrize("strategy", PROGRAMS, ids=str)
def test_random_programs_are_replayed(strategy):
    result = generate(strategy, logprobs=True)
    again = assert_replays(result, prefix_cache=False)
    pages, rows = again.metrics.pages_peak * 3 // 4 + 2, 64
    try:
        assert_replays(result, num_pages=pages, max_rows=rows)
    except ValueError as error:
        assert "num_pages" in str(error), error


@pytest.mark.parametrize("name", FORMATS)
def test_generations_of_every_format_good_and_broken_are_replayed(name):
    """What half-known formats make of a tree comes back from its trace alone, without the strategy and its format."""
    form, rng = FORMATS[name], random.Random(name)
    engine = tiny_engine(form.habits.tokens)
    forked = malformed = 0
    for batch in range(3):
        models = Malformed(form.habits, scripted=rng.choice((0.5, 0.9)), usual=rng.choice((0.6, 0.95)))
        limits = dict(max_new_tokens=rng.choice(form.limits), max_total_tokens=rng.choice((60, 150)))
        prompts = [form.prompt.format(700 + 8 * batch + i) for i in range(8)]
        for result in written_by(engine, models, prompts, strategy=form.strategy, seed=batch, **limits):
            again = ab.replay(written(result), engine)  # it compares the trees itself
            assert again.metrics.sampled_tokens == result.metrics.sampled_tokens
            forked, malformed = forked + bool(result.tree.children), malformed + bool(result.malformed)
        assert_nothing_held(engine)
    assert forked > 2 < malformed


class Programs(Strategy):
    """A strategy out of a function."""

    def __init__(self, run):
        self.run = run


def replayed(run, **options):
    result = generate(Programs(run), logprobs=True)
    assert_replays(result, **options)
    return result


def test_a_cut_stands_behind_what_was_done_before_it():
    """Spawned, killed before it came to be, cut by a summary that lost its children: each has its place in the log."""

    def run(trunk):
        yield trunk.decode(4)
        kids = trunk.fork(2)
        kids[1].kill()  # before it came to be
        trunk.truncate(trunk.length - 2)
        trunk.spawn([7, 8]).kill()
        trunk.insert([9])
        yield trunk.decode(3)
        mortal = trunk.fork(1)[0]
        mortal.decode(5, until=lambda op: len(op.token_ids) == 2 and op.thread.kill())
        yield trunk.join(mortal, "summary", text=[10, 11], keep=trunk.length - 1)
        yield trunk.decode(1)

    tree = replayed(run).tree
    assert [piece.cut.logged for piece in tree.forgotten] == [6, 11]


def test_grandchildren_write_on_until_their_parent_is_joined():
    def run(trunk):
        yield trunk.decode(2)
        kid = trunk.fork([[20]])[0]
        yield kid.decode(2)
        (grandchild,) = kid.fork([[30]])
        yield grandchild.decode(9)
        trunk.join(kid, "reprefill")
        trunk.insert([40])
        yield trunk.decode(2)

    replayed(run)


def test_what_a_fork_saw_is_what_its_sibling_held_then():
    """The sibling is cut back and writes anew once the fork that saw its first words has gone."""

    def run(trunk):
        yield trunk.decode(2)
        (sibling,) = trunk.fork([[20]])
        yield sibling.decode(5)
        (early,) = trunk.fork([[30]], sees=[sibling])
        yield early.decode(3)
        yield trunk.join(early, "discard")
        yield sibling.truncate(sibling.length - 3)
        sibling.insert([50])
        yield sibling.decode(4)
        (late,) = trunk.fork([[40]], sees=[(sibling, 5)])
        yield late.decode(3)
        trunk.join([sibling, late])
        trunk.insert([60])
        yield trunk.decode(2)

    replayed(run)


def test_a_live_thread_that_is_cut_is_told_as_it_was():
    def run(trunk):
        yield trunk.decode(2)
        a, b = trunk.fork([[20], [30]])
        a.see(b, same_step="none")
        yield [a.decode(6), b.decode(4)]
        a.truncate(a.length - 4)
        a.insert([40])
        a.see(b, same_step="all")
        yield [a.decode(3), b.decode(2)]
        b.kill()
        yield a.decode(3)
        trunk.join(a, "reprefill")
        trunk.insert([50])
        yield trunk.decode(2)

    tree = replayed(run, num_pages=24).tree
    (cut,) = [action for action in tree.children[0].log if action.do == "truncate"]
    assert sum(count for _, count in cut.turns) > sum(len(run.token_ids) for run in tree.children[0].runs[:2]) - 4
    assert [sight.begin for sight in tree.children[0].sights] == sorted({s.begin for s in tree.children[0].sights})


def test_a_thread_that_became_another_which_skipped_stands_where_that_stands():
    def run(trunk):
        yield trunk.decode(2)
        a, b = trunk.fork(2)
        yield [a.decode(2), b.decode(2)]
        b.skip(5)
        yield b.decode(2)
        a.become(b)
        yield a.decode(2)
        return [thread.position for thread in (a, b)]

    result = replayed(run)
    assert result.answers[0] == result.answers[1] + 2


def cut_by_hand(data, draw):
    """Something of a trace is left out, moved, doubled or changed."""
    nodes = [data["tree"]]
    for node in nodes:
        nodes += node["children"]
    for _ in range(draw.randint(1, 3)):
        node = draw.choice(nodes)
        lists = [node[name] for name in ("log", "turns", "sights", "children", "sees", "forgotten") if node[name]]
        lists += [a[name] for a in node["log"] for name in ("children", "logged", "turns", "token_ids") if a[name]]
        if not lists:
            continue
        some = draw.choice(lists)
        at = draw.randrange(len(some))
        what = draw.choice(["drop", "swap", "double", "number", "move"])
        if what == "drop":
            del some[at]
        elif what == "double":
            some.insert(at, copy.deepcopy(some[at]))
        elif what == "swap":
            other = draw.randrange(len(some))
            some[at], some[other] = some[other], some[at]
        elif what == "number" and isinstance(some[at], int):
            some[at] = max(0, some[at] + draw.choice([-1, 1, 5]))
        elif what == "number" and isinstance(some[at], list):
            some[at] = [v + draw.choice([0, 1, 3]) if isinstance(v, int) else v for v in some[at]]
        elif node["log"]:
            draw.choice(nodes)["log"].append(node["log"].pop(draw.randrange(len(node["log"]))))


@pytest.mark.parametrize("strategy", [Everything(7, 97, sees=0.4), Watching(2), Sharing(22), Sights(1)], ids=str)
def test_a_trace_that_was_cut_by_hand_is_replayed_or_refused(strategy):
    draw, engine = random.Random(repr(strategy)), make_engine(tokenizer=byte_tokenizer(), num_pages=400)
    data, refused = generate(strategy, max_new_tokens=12).trace().as_dict(), 0
    for _ in range(25):
        changed = copy.deepcopy(json.loads(json.dumps(data)))
        cut_by_hand(changed, draw)
        try:
            ab.replay(trace.Trace.from_dict(changed), engine)
        except ValueError as error:
            assert str(error), "says nothing"
            refused += 1
        assert_nothing_held(engine)
    assert refused > 5


def test_what_waits_for_ever_is_told():
    result = generate(Watching(2))
    data = json.loads(json.dumps(result.trace().as_dict()))
    spoilt = next(node for node in data["tree"]["children"] if node["turns"] and node["sights"])
    spoilt["turns"] = [[turn + 10**6, count] for turn, count in spoilt["turns"]]
    engine = make_engine(tokenizer=byte_tokenizer())
    with pytest.raises(ValueError, match=r"cannot be followed to its end; .* thread 0.* with log\[\d+\]"):
        ab.replay(trace.Trace.from_dict(data), engine)
    assert_nothing_held(engine)
