"""What a strategy may ask of the threads that it runs: the protocol that all strategies use."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
from engine_kit import (
    EOS,
    Dense,
    Does,
    Recorder,
    assert_dense,
    assert_nothing_held,
    byte_tokenizer,
    make_engine,
    make_model,
)
from programs_of_threads import Anything

from anabranch.records.metrics import summary
from anabranch.strategies import Ended, SelfConsistency, gather

PROMPT = [5, 6, 7, 8, 9, 10, 11]


def run(body, prompt=PROMPT, engine=None, **options):
    """Generate with a strategy that does what `body` says."""
    engine = engine or make_engine(tokenizer=byte_tokenizer())
    try:
        return engine.generate(prompt, strategy=Does(body), **({"eos_token_id": None} | options))
    finally:
        assert_nothing_held(engine)


def test_how_a_decode_ends():
    seen = {}

    def body(trunk):
        seen["length"] = yield trunk.decode(3)
        token = seen["length"].token_ids[-1]
        seen["id"] = yield trunk.decode(50, stop=list(range(0, 200)))
        seen["until"] = yield trunk.decode(50, until=lambda d: len(d.token_ids) == 4)
        seen["limit"] = yield trunk.decode()
        seen["none left"] = yield trunk.decode(5)
        return token

    run(body, max_new_tokens=20)
    assert seen["length"].reason == "length" and len(seen["length"].token_ids) == 3
    assert seen["id"].reason == "stop" and seen["id"].stop == seen["id"].token_ids[-1] < 200
    assert seen["until"].reason == "until" and len(seen["until"].token_ids) == 4
    assert seen["limit"].reason == "length" and sum(len(e.token_ids) for e in seen.values()) == 20
    assert seen["none left"] == Ended("length", (), "")


@pytest.mark.parametrize("first", range(5))
def test_which_of_several_things_that_end_a_decode_at_once_is_named(first):
    """A token that is a stop id and EOS as well is told as a stop; a limit is named where nothing else ends it."""
    written = run(lambda trunk: (yield trunk.decode(4))).token_ids
    assert written[3] not in written[:3]
    order = ["stop", "eos", "until", "length", "budget"]
    true, seen = order[first:], []

    def body(trunk):
        stop = written[3:] if "stop" in true else ()
        until = (lambda d: len(d.token_ids) == 4) if "until" in true else None
        seen.append((yield trunk.decode(4 if "length" in true else 9, stop=stop, until=until)))

    run(body, eos_token_id=written[3] if "eos" in true else None, max_total_tokens=4)
    (ended,) = seen
    assert (ended.reason, ended.token_ids) == (order[first], written)
    assert ended.stop == (written[3] if first == 0 else None)


def test_stop_strings_match_what_this_decode_samples_across_tokens():
    plain = run(lambda trunk: (yield trunk.decode(30)))
    text = plain.text
    # Two characters whose first appearance together is not at the beginning.
    at = next(
        i for i in range(4, len(text) - 2) if text.index(text[i : i + 2]) == i and "\ufffd" not in text[i : i + 2]
    )
    stop = text[at : at + 2]
    seen = []

    def body(trunk):
        seen.append((yield trunk.decode(30, stop=["never there", stop])))

    result = run(body)
    assert seen[0].reason == "stop" and seen[0].stop == stop and result.text == text[: at + 2]
    config = run(lambda trunk: (yield trunk.decode(30)), stop_strings=[stop])
    assert config.token_ids == result.token_ids and config.tree.ended == "stop"


def test_stats_are_those_of_the_raw_scores():
    seen = []

    def body(trunk):
        seen.append((yield trunk.decode(4, stats=3, sampling={"do_sample": True, "temperature": 0.1})))
        seen.append((yield trunk.decode(2)))

    result = run(body)
    with torch.no_grad():
        logp = (
            make_model()(torch.tensor([PROMPT + list(result.token_ids)]))
            .logits[0, len(PROMPT) - 1 : -1]
            .log_softmax(-1)
        )
    assert len(seen[0].stats) == 4 and seen[1].stats == ()
    for i, stat in enumerate(seen[0].stats):
        assert stat.logprob == pytest.approx(float(logp[i, result.token_ids[i]]), abs=1e-3)
        assert stat.entropy == pytest.approx(float(-(logp[i].exp() * logp[i]).sum()), abs=1e-3)
        assert stat.topk_logprob == pytest.approx(float(logp[i].topk(3).values.mean()), abs=1e-3)
        assert math.isfinite(stat.entropy)


def test_budget_counts_every_thread():
    def body(trunk):
        kids = trunk.fork(4)
        ends = yield [kid.decode(50) for kid in kids]
        return [(e.reason, len(e.token_ids)) for e in ends]

    result = run(body, max_total_tokens=30)
    assert result.answers == [("budget", 8), ("budget", 8), ("budget", 7), ("budget", 7)]


def test_reprefill_join_lets_siblings_see_each_other_and_is_dense():
    recorder = Recorder()

    def body(trunk):
        yield trunk.decode(5)
        kids = trunk.fork([[20], [30, 31], [40]])
        yield [kid.decode(n) for kid, n in zip(kids, (4, 2, 6), strict=True)]
        trunk.join(kids, mode="reprefill")
        yield trunk.decode(6)

    result = run(body, logits_processor=[recorder])
    assert [r.spliced for r in result.tree.runs] == [False, False, True, False, False, False]
    flat = [*PROMPT, *result.token_ids]
    with torch.no_grad():
        logits = make_model()(torch.tensor([flat])).logits[0]
    assert result.token_ids[-6:] == tuple(logits[-7:-1].argmax(-1).tolist())
    assert result.tree.stop == len(flat)
    assert_dense(result, recorder, "llama")
    # Nothing was computed twice but the two later children: rows = tokens + those, less the last one, never needed.
    assert result.metrics.total_tokens == 5 + 5 + 4 + 7 + 6
    assert result.metrics.rows == len(PROMPT) + 5 + 5 + (2 + 2 - 1) + (1 + 6 - 1) + (4 + 7) + 6 - 1


def test_reprefill_join_may_replace_headers():
    def body(trunk):
        kids = trunk.fork([[20, 21], [20, 31], [20, 41]])
        ends = yield [kid.decode(2) for kid in kids]
        trunk.join(kids, "reprefill", headers=[None, [31], None])
        yield trunk.decode(1)
        return [end.token_ids for end in ends]

    result = run(body)
    a, b, c = result.answers
    assert result.token_ids[:-1] == (20, 21, *a, 31, *b, 20, 41, *c)
    assert (result.metrics.inserted_tokens, result.metrics.sampled_tokens) == (6, 7)
    first = run(lambda trunk: (yield from replaced_first(trunk)))
    assert first.token_ids[:1] == (9,) and not any(r.spliced for r in first.tree.runs)


def replaced_first(trunk):
    kid = trunk.fork([[20, 21]])[0]
    yield kid.decode(3)
    yield trunk.join(kid, "reprefill", headers=[[9]])


def test_threads_spawned_in_one_go_are_one_block():
    def body(trunk):
        kids = [trunk.spawn([1, i]) for i in (2, 3, 4)]
        yield [kid.decode(2) for kid in kids]
        trunk.join(kids, "summary", text=[5])
        yield trunk.spawn([6]).decode(1)

    result = run(body)
    assert result.metrics.threads_per_block == (3, 1) and result.metrics.num_threads == 4


def test_summary_join_forgets_and_inserts():
    recorder = Recorder()

    def body(trunk):
        keep = trunk.length
        yield trunk.decode(4)
        kids = [trunk.spawn([1, 2, 3]), trunk.spawn([4, 5])]
        yield gather(*(kid.decode(5) for kid in kids))
        yield trunk.join(kids, mode="summary", text=[9, 9], keep=keep)
        yield trunk.decode(3)

    result = run(body, logits_processor=[recorder])
    flat = [*PROMPT, *result.token_ids]
    with torch.no_grad():
        logits = make_model()(torch.tensor([flat])).logits[0]
    assert result.token_ids[:2] == (9, 9) and result.token_ids[2:] == tuple(logits[-4:-1].argmax(-1).tolist())
    assert [len(r.token_ids) for r in result.tree.forgotten] == [4]
    assert [(k.role, k.start, k.stop) for k in result.tree.children] == [("fresh", 0, 8), ("fresh", 0, 7)]
    with torch.no_grad():
        fresh = make_model()(torch.tensor([[4, 5, *result.tree.children[1].token_ids]])).logits[0]
    assert result.tree.children[1].token_ids == tuple(fresh[1:-1].argmax(-1).tolist())
    assert result.metrics.critical_path_tokens == 4 + 5 + 2 + 3 and result.metrics.total_tokens == 4 + 10 + 2 + 3


def test_a_parent_may_go_on_beside_its_children():
    recorder = Recorder()

    def body(trunk):
        yield trunk.decode(3)
        kids = trunk.fork([[20], [30]])
        later = [kid.decode(7) for kid in kids]
        yield trunk.decode(4)
        assert not any(op.done for op in later)
        trunk.join(kids)
        trunk.insert([50])
        yield trunk.decode(3)

    result = run(body, logits_processor=[recorder])
    assert_dense(result, recorder, "llama")
    assert [r.kind for r in result.tree.runs] == ["prompt", "sampled", "joined", "joined", "inserted", "sampled"]
    assert result.metrics.max_concurrency == 3 and result.metrics.critical_path_tokens == 3 + 8 + 1 + 3


def test_truncate_then_decode_again():
    def body(trunk):
        first = yield trunk.decode(6)
        trunk.truncate(trunk.length - 3)
        second = yield trunk.decode(3)
        kids = trunk.fork(2)
        trunk.truncate(trunk.length - 1)
        thirds = yield [kid.decode(2) for kid in kids]
        again = yield trunk.decode(1)
        return first.token_ids[3:] == second.token_ids == (*second.token_ids[:2], *again.token_ids), thirds

    result = run(body)
    assert result.answers[0]
    assert result.answers[1][0] == result.answers[1][1]


def test_queued_work_runs_without_being_waited_for():
    def body(trunk):
        trunk.decode(3)
        kids = trunk.fork([[20], [30]])
        for kid in kids:
            kid.decode(2)
        trunk.join(kids)
        trunk.insert([40])
        trunk.decode(2)
        return "done"
        yield

    result = run(body)
    assert result.answers == "done" and len(result.token_ids) == 3 + 3 + 3 + 1 + 2


MISUSE = [
    (lambda trunk: trunk.decode(0), "max_new_tokens=0"),
    (lambda trunk: trunk.decode(stop=["", "x"]), "empty string"),
    (lambda trunk: trunk.decode(stop=[999]), "stop: token id 999"),
    (lambda trunk: trunk.decode(stop=[1.5]), "stop="),
    (lambda trunk: trunk.decode(sampling={"temprature": 1.0}), "'temprature' is not a sampling field"),
    (lambda trunk: trunk.decode(sampling={"num_beams": 3}), "num_beams=3 is not honoured"),
    (lambda trunk: trunk.insert([1, 300]), "insert: token id 300"),
    (lambda trunk: trunk.fork(0), "fork: headers=0"),
    (lambda trunk: trunk.fork("ab"), "fork: headers='ab'"),
    (lambda trunk: trunk.fork([[1], [260]]), r"fork: headers\[1\]: token id 260"),
    (lambda trunk: trunk.spawn(""), "spawn: prompt is empty"),
    (lambda trunk: trunk.join([], "concat"), "kids is empty"),
    (
        lambda trunk: trunk.join(trunk.fork(2), "merge"),
        "mode='merge'; pass one of 'concat', 'reprefill', 'summary', 'discard'",
    ),
    (lambda trunk: trunk.join(trunk.fork(2), "concat", text="x"), "summary takes text"),
    (lambda trunk: trunk.join(trunk.fork(2), "summary"), "summary takes text"),
    (lambda trunk: trunk.join(trunk.fork(1) * 2), "given twice"),
    (lambda trunk: trunk.join(trunk.fork(2), headers=[None, None]), "headers=.*mode 'reprefill' takes one for each"),
    (lambda trunk: trunk.join(trunk.fork(2), "reprefill", headers=["x"]), "one for each of the 2 children"),
    (lambda trunk: trunk.decode(stats="entropy"), "stats='entropy'"),
    (lambda trunk: trunk.join(trunk.spawn("x")), "context of its own"),
    (lambda trunk: trunk.fork(2)[0].join(trunk.fork(1)), "is not a child of"),
    (lambda trunk: trunk.truncate(-1), "truncate: length=-1"),
    (lambda trunk: trunk.truncate(3), "truncate: length=3: thread 0 can be cut to a length of 7"),
    (lambda trunk: trunk.kill(), "this is the trunk"),
    (lambda trunk: trunk.start(7), "start.. takes a generator"),
]


@pytest.mark.parametrize(("misuse", "message"), MISUSE, ids=[m for _, m in MISUSE])
def test_misuse_is_an_error_at_its_own_line(misuse, message):
    def body(trunk):
        yield trunk.decode(2) if "cut to" not in message else trunk.decode(1)
        yield misuse(trunk)

    with pytest.raises((ValueError, TypeError), match=message):
        run(body)


def test_a_dead_thread_takes_nothing_and_a_stuck_strategy_is_told():
    def dead(trunk):
        kids = trunk.fork(2)
        trunk.join(kids, "discard")
        yield kids[0].decode(1)

    with pytest.raises(ValueError, match=r"thread 0\.0 was discarded and takes nothing more"):
        run(dead)

    def after_join(trunk):
        kids = trunk.fork([[1], [2]])
        yield [kid.decode(2) for kid in kids]
        trunk.join(kids)
        yield trunk.decode(1)

    with pytest.raises(ValueError, match=r"insert\(\) at least one token first"):
        run(after_join)

    def nonsense(trunk):
        yield 7

    with pytest.raises(TypeError, match="yielded 7; yield what decode"):
        run(nonsense)

    def stuck(trunk):
        kids = trunk.fork(1)
        yield kids[0].join(kids[0].fork(1)) and trunk.join(kids) and waits_for_ever()

    from anabranch.strategies.api.awaitable import Awaitable

    def waits_for_ever():
        return Awaitable()

    with pytest.raises(RuntimeError, match="still waits for"):
        run(stuck)


def test_text_needs_a_tokenizer():
    with pytest.raises(ValueError, match="needs a tokenizer"):
        run(lambda trunk: (yield trunk.insert("x")), engine=make_engine())
    with pytest.raises(ValueError, match="needs a tokenizer"):
        run(lambda trunk: (yield trunk.decode(stop="x")), engine=make_engine())
    with pytest.raises(ValueError, match="vote reads text"):
        make_engine().generate(PROMPT, strategy=SelfConsistency(2, vote="number", max_new_tokens=2))


def test_malformed_output_is_counted():
    def body(trunk):
        yield trunk.decode(2)
        trunk.malformed("no closing tag")

    result = run(body)
    assert result.malformed == ("thread 0: no closing tag",) and result.metrics.format_correctness == 0.0
    total = summary([result, run(lambda trunk: (yield trunk.decode(4)))])
    assert total["format_correctness"] == 0.5 and total["total_tokens"] == 6 and total["answers"] == 2


def test_a_trunk_that_becomes_its_child_keeps_whose_kv_is_whose():
    def body(trunk):
        kids = trunk.fork([[20], [30]])
        yield [kid.decode(3) for kid in kids]
        inner = kids[1].fork([[40], [50]])
        yield [kid.decode(4) for kid in inner]
        kids[1].join(inner)
        kids[1].insert([60])
        yield kids[1].decode(2)
        trunk.join(kids[0], "discard")
        trunk.join(kids[1])
        yield trunk.decode(3)

    recorder = Recorder()
    result = run(body, logits_processor=[recorder])
    sources = [(r.source, r.spliced) for r in result.tree.runs if r.kind == "joined"]
    assert list(dict.fromkeys(sources)) == [("0.1", False), ("0.1.0", True), ("0.1.1", True)]
    assert assert_dense(result, recorder, "llama") == result.metrics.sampled_tokens


# ------------------------------------------------------------------------------------------------ at random


@pytest.mark.parametrize("program", range(8))
def test_any_program_is_exact_and_leaks_nothing_with_plenty_or_few_pages(program):
    recorder = Recorder()
    engine = make_engine(num_pages=600)
    options = dict(strategy=Anything(program), eos_token_id=None, max_new_tokens=200, seed=program)
    prompts = [PROMPT, [1, 2, 3]]
    expected = engine.generate(prompts, logits_processor=[recorder], **options)
    alone = engine.generate(PROMPT, **options)
    assert alone.tree == expected[0].tree
    assert_nothing_held(engine)
    peak = expected[0].metrics.pages_peak
    for pages in (peak * 3 // 4, peak // 2):
        tight = make_engine(num_pages=pages, max_rows=16)
        try:
            results = tight.generate(prompts, **options)
        except ValueError as error:
            assert "larger num_pages" in str(error)
        else:
            assert [r.tree for r in results] == [r.tree for r in expected]
        assert_nothing_held(tight)


def test_random_programs_agree_with_the_dense_model():
    compared = 0
    for program in range(4):
        recorder = Recorder()
        result = make_engine(num_pages=600).generate(
            PROMPT, strategy=Anything(program), eos_token_id=None, max_new_tokens=200, logits_processor=[recorder]
        )
        compared += dense_where_kept(result, recorder)
    assert compared > 80


def test_eos_ends_a_thread_wherever_it_is():
    def body(trunk):
        kids = trunk.fork([[i] for i in range(12)])
        ends = yield [kid.decode(25) for kid in kids]
        return [(e.reason, len(e.token_ids)) for e in ends]

    free = run(body).tree.children
    eos = free[0].token_ids[5]
    result = run(body, eos_token_id=[eos, EOS])
    for (reason, n), kid in zip(result.answers, free, strict=True):
        sampled = kid.token_ids[1:]
        cut = next((i for i, t in enumerate(sampled) if t in (eos, EOS)), None)
        assert (reason, n) == (("length", 25) if cut is None else ("eos", cut + 1))
    assert any(reason == "eos" for reason, _ in result.answers)


def test_the_example_of_a_strategy_of_ones_own():
    path = Path(__file__).parents[2] / "examples" / "custom_strategy.py"
    spec = importlib.util.spec_from_file_location("custom_strategy", path)
    example = importlib.util.module_from_spec(spec)
    sys.modules["custom_strategy"] = example  # a dataclass looks its module up there
    try:
        spec.loader.exec_module(example)
    finally:
        del sys.modules["custom_strategy"]
    strategy = example.ForkWhereUnsure(n=3, threshold=0.5, look_ahead=4)
    source = path.read_text(encoding="utf-8")
    begin, end = source.index("@dataclass"), source.index("def main")
    assert len(source[begin:end].splitlines()) < 33  # 30, and the two blank lines behind it
    engine, recorder = make_engine(), Recorder()
    result = engine.generate(
        PROMPT, strategy=strategy, max_new_tokens=30, seed=1, eos_token_id=None, logits_processor=[recorder]
    )
    # The doubtful tokens that were cut off count towards the limit: they had to be waited for.
    assert len(result.token_ids) + result.metrics.num_forks == 30 == result.metrics.critical_path_tokens
    assert result.metrics.threads_per_block == (3,) * result.metrics.num_forks and result.metrics.num_forks > 0
    assert dense_where_kept(result, recorder) >= 20
    assert_nothing_held(engine)


def dense_where_kept(result, recorder):
    """`assert_dense` for strategies that cut tokens off: those contexts are not in the final tree; how many others."""
    dense, compared = Dense(result, "llama"), 0
    for context, scores in recorder.seen:
        if context in dense.by_context:
            torch.testing.assert_close(scores, dense.by_context[context], atol=2e-4, rtol=2e-4)
            compared += 1
    return compared
