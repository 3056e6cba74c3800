"""A trace as lanes, ticks and contexts: what is drawn is what happened."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from engine_kit import Nested, byte_tokenizer, make_engine
from programs_of_threads import Anything
from viz_kit import wide

from anabranch.records.trace import Trace
from anabranch.strategies import Aspects, EntropyFork, SelfConsistency, Sequential, SkeletonOfThought
from anabranch.viz import timeline
from anabranch.viz.ranges import first, last, merged, size, union

STRATEGIES = [
    None,
    Nested(),
    Sequential(Nested()),
    Aspects(("é:", "B:"), "so", after=(), intro_tokens=7, aspect_tokens=5, aspect_stop=()),
    SelfConsistency(4, max_new_tokens=9),
    EntropyFork(look_ahead=4, threshold=0.1),
    EntropyFork(min_confidence=2.0, window=3, threshold=0.1),
    SkeletonOfThought(),
]


def assert_true_to(result) -> None:
    """Every context and every token, and the length of the critical path."""
    drawn = timeline(result)
    nodes = {node.id: node for node in result.tree.walk()}
    assert [lane.id for lane in drawn.lanes] and {lane.id for lane in drawn.lanes} == set(nodes)
    for lane in drawn.lanes:
        node = nodes[lane.id]
        own = [token for run in node.runs for token in run.token_ids]
        context = drawn.context_ids(lane.number)
        assert context[node.forked_at :] == own and len(context) == node.forked_at + len(own)
        written = [run for run in node.runs if run.kind in ("sampled", "inserted")]
        kept = [token for token in lane.tokens if not token.cut]
        assert [token.id for token in kept] == [t for run in written for t in run.token_ids]
        assert [token.position for token in kept] == [
            run.position + i for run in written for i in range(len(run.token_ids))
        ]
        assert [token.logprob for token in kept if token.kind == "sampled"] == [
            logprob for run in written if run.kind == "sampled" for logprob in run.logprobs or ()
        ]
        assert all(a.clock < b.clock for a, b in zip(lane.tokens, lane.tokens[1:], strict=False))
        assert lane.begin <= lane.end <= lane.gone or lane.fate == "finished"
    assert sum(len(lane.tokens) for lane in drawn.lanes) == result.metrics.total_tokens
    assert drawn.length == result.metrics.critical_path_tokens
    for usage in drawn.usage():
        assert usage.held <= usage.seen


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: type(getattr(s, "strategy", s)).__name__)
def test_lanes_hold_what_each_thread_wrote_and_saw(strategy):
    engine = make_engine(tokenizer=byte_tokenizer(), num_pages=600)
    result = engine.generate("hello", strategy=strategy, max_new_tokens=60, eos_token_id=None, logprobs=True)
    assert_true_to(result)


@pytest.mark.parametrize("program", range(25))
def test_any_program_is_drawn_as_it_ran(program):
    options = dict(strategy=Anything(program), eos_token_id=None, max_new_tokens=200, seed=program, do_sample=True)
    assert_true_to(make_engine(num_pages=600).generate([5, 6, 7, 8], logprobs=True, **options))


def test_what_a_token_saw_is_what_the_model_was_given():
    from engine_kit import Recorder

    recorder = Recorder()
    engine = make_engine(tokenizer=byte_tokenizer(), num_pages=600)
    result = engine.generate("hello", strategy=Nested(), eos_token_id=None, logits_processor=[recorder])
    drawn = timeline(result)
    given = {context for context, _ in recorder.seen}
    shown = [
        tuple(drawn.context_ids(lane.number, i))
        for lane in drawn.lanes
        for i, token in enumerate(lane.tokens)
        if token.kind == "sampled"
    ]
    assert set(shown) == given and len(shown) == result.metrics.sampled_tokens


def test_arrows_lead_from_the_fork_to_the_thread_and_back():
    drawn = timeline(wide())
    by_id = {lane.id: lane for lane in drawn.lanes}
    trunk, kid = by_id["0"], by_id["0.0"]
    forks = [a for a in drawn.arrows if a.kind == "fork" and a.source == trunk.number]
    assert [a.target for a in forks] == [by_id[f"0.{i}"].number for i in range(4)]
    assert all((a.leaves, a.arrives) == (5, 5) for a in forks)
    joins = [a for a in drawn.arrows if a.kind == "join" and a.target == trunk.number]
    assert [a.source for a in joins] == [kid.number, by_id["0.1"].number]  # the others were discarded
    assert all(a.arrives == max(by_id[f"0.{i}"].end for i in range(4)) for a in joins)
    assert {a.mode for a in drawn.arrows if a.kind == "join"} == {"concat", "reprefill"}
    assert by_id["0.3"].fate == "discarded" and by_id["0.3"].gone >= by_id["0.3"].end


def test_the_text_of_tokens_that_hold_parts_of_characters():
    result = wide()
    drawn = timeline(result)
    assert drawn.pieces is not None and drawn.pieces[byte_tokenizer()("é")["input_ids"][0]] == (0xC3,)
    whole = drawn.text(drawn.context_ids(0))
    assert whole is not None and whole.startswith("</script><b>né</b>") and "é<b>&" in whole
    back = Trace.from_dict(json.loads(json.dumps(result.trace().as_dict())))
    assert back == result.trace() and timeline(back).pieces == drawn.pieces
    without = timeline(make_engine().generate([1, 2], max_new_tokens=2))
    assert without.pieces is None and without.text([1]) is None


def test_threads_that_ran_one_after_another_stand_one_after_another():
    engine = make_engine(tokenizer=byte_tokenizer())
    aspects = Aspects(("A", "B"), "so", after=(), intro_tokens=3, aspect_tokens=5, aspect_stop=())
    lanes = {
        name: timeline(engine.generate("x", strategy=s, max_new_tokens=30, eos_token_id=None)).lanes
        for name, s in (("at once", aspects), ("sequential", Sequential(aspects)))
    }
    assert lanes["at once"][1].begin == lanes["at once"][2].begin == 3
    assert (lanes["sequential"][1].begin, lanes["sequential"][2].begin) == (3, 9)


def test_traces_without_a_log_are_drawn_from_what_they_hold():
    result = make_engine(tokenizer=byte_tokenizer(), num_pages=600).generate("hi", strategy=Nested(), eos_token_id=None)

    def bare(node):
        return replace(node, log=(), children=tuple(map(bare, node.children)))

    old = timeline(replace(result.trace(), tree=bare(result.tree)))
    for lane, node in zip(old.lanes, result.tree.walk(), strict=True):
        assert lane.id == node.id
        context = old.context_ids(lane.number)
        assert context[node.forked_at :] == [t for run in node.runs for t in run.token_ids]


def test_a_log_that_cannot_be_followed_is_named():
    data = wide().trace().as_dict()

    def changed(i, **change):
        copy = json.loads(json.dumps(data))
        copy["tree"]["log"][i] |= change
        return Trace.from_dict(copy)

    fork = next(i for i, action in enumerate(data["tree"]["log"]) if action["do"] == "fork")
    with pytest.raises(ValueError, match=r"fork of '0\.9' in the log of thread 0"):
        timeline(changed(fork, children=["0.9"]))
    with pytest.raises(ValueError, match="which it has not forked by then"):
        timeline(changed(fork, do="truncate", children=[], length=10_000))
    with pytest.raises(TypeError, match="expected a Result or a Trace"):
        timeline({"tree": 1})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="clock: expected a number ≥ 0"):
        changed(fork, clock=-1)
    data["pieces"]["99"] = [300]
    with pytest.raises(ValueError, match="300 is no byte"):
        Trace.from_dict(json.loads(json.dumps(data)))


def test_a_lane_or_token_that_is_not_there():
    drawn = timeline(wide())
    with pytest.raises(ValueError, match="lane=99; the timeline has 9 lanes"):
        drawn.context(99)
    with pytest.raises(ValueError, match="token=1000; lane 0 has"):
        drawn.context(0, 1000)


def test_ranges():
    parts = [(0, 3), (7, 9), (9, 12)]
    assert size(parts) == 8 and first(parts, 4) == [(0, 3), (7, 8)] and last(parts, 4) == [(8, 9), (9, 12)]
    assert merged(parts) == [(0, 3), (7, 12)] and first(parts, 0) == last(parts, 0) == []
    assert union([(5, 9), (0, 3), (2, 6)]) == 9 and union([]) == 0
