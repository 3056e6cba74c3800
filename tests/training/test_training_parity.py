"""The engine and the trainer show a model the same: what was sampled had the probability that training gives it.

For each strategy, every score that the engine saw while generating equals that of one training forward over the trace's
layout, row by row, in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest
import torch
from engine_kit import Recorder, byte_tokenizer, make_engine
from programs_of_threads import Anything, Sights
from threadweaver_kit import MANY, TAGS, TWO, Script, engine_with_tags

import anabranch as ab
from anabranch import training
from anabranch.records.result import Run
from anabranch.strategies import Strategy

TOLERANCE = 1e-4
PROMPT = "Why do rivers bend?"
ASPECTS = ab.Aspects(
    headers=("\nOne:", "\nTwo, longer:", "\n3:"), conclusion="\nSo:", intro_tokens=7, aspect_tokens=9,
    conclusion_tokens=6,
)  # fmt: skip
PLANS = ab.strategies.Tagged(
    tags=TAGS, opening="<Outlines>", trigger="</Outlines>", outline=r"(\d+)\.", header="<Thread>{id}.",
    stop="</Thread>", unclosed="</Thread>", after="</Parallel>", closing="",
    shape="(<Outlines></Outlines>(<Thread></Thread>)+</Parallel>)?", join="concat",
)  # fmt: skip
HEAD = "<Outlines>1. a 2. b</Outlines>"
PLANNED = [
    ("p", HEAD),
    ("p" + HEAD + "<Thread>1.", "xyz</Thread>"),
    ("p" + HEAD + "<Thread>2.", "w</Thread>"),
    ("p" + HEAD + "<Thread>1.xyz</Thread><Thread>2.w</Thread></Parallel>", "done<eos>"),
]


def assert_parity(result, recorder: Recorder, model) -> training.Layout:
    """Every sampled token is in the layout once, and its row's scores are those that the engine sampled it from."""
    layout = training.from_trace(result)
    learnt = layout.learnt
    assert len(learnt) == result.metrics.sampled_tokens == len(recorder.seen)
    with torch.no_grad():
        batch = layout.batch()
        assert torch.equal(batch["shift_labels"][0], layout.input_ids[learnt])
        logits = model(**batch, use_cache=False).logits[0]
        logprobs = layout.logprobs(model)
    seen = {context: scores.log_softmax(-1) for context, scores in recorder.seen}
    visible = layout.mask.dense()
    for i, row, logprob in zip(learnt.tolist(), logits.log_softmax(-1), logprobs, strict=True):
        *context, token = layout.input_ids[visible[i]].tolist()
        scores = seen[tuple(context)]  # a KeyError: a context that the engine never showed
        torch.testing.assert_close(row, scores, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(logprob, scores[token], atol=TOLERANCE, rtol=0)
    return layout


STRATEGIES = {
    "plain": (None, None),
    "aspects": (ASPECTS, None),
    "sequential aspects": (ab.Sequential(ASPECTS), None),
    "self-consistency": (ab.SelfConsistency(4), None),
    "self-consistency, likeliest": (ab.SelfConsistency(3, vote=None, temperature=1.5), None),
    "threadweaver": (ab.ThreadWeaver(), ("q: ", TWO)),
    "threadweaver, two blocks": (ab.ThreadWeaver(), ("r", MANY)),
    "sequential threadweaver": (ab.Sequential(ab.ThreadWeaver()), ("q: ", TWO)),
    "tagged, concat": (PLANS, ("p", PLANNED)),
}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_what_the_engine_saw_is_what_training_computes(name, family):
    strategy, scripted = STRATEGIES[name]
    recorder = Recorder()
    if scripted is None:
        engine = make_engine(family, byte_tokenizer())
        prompt, processors, options = PROMPT, [recorder], {"max_new_tokens": 24}
    else:
        engine = engine_with_tags(family=family)
        prompt, processors, options = scripted[0], [recorder, Script(*scripted[1])], {"max_new_tokens": 200}
    recording = {"logprobs": True} if "logprobs" in {f.name for f in fields(Run)} else {}
    result = engine.generate(prompt, strategy=strategy, logits_processor=processors, **options, **recording)
    layout = assert_parity(result, recorder, engine.model)
    if recording:
        with torch.no_grad():
            torch.testing.assert_close(
                layout.recorded[layout.learnt], layout.logprobs(engine.model), atol=TOLERANCE, rtol=0
            )
        assert not layout.recorded[layout.learnt].isnan().any()
    assert ab.BranchMask.from_trace(result.trace()) == layout.mask
    if "threadweaver" in name:  # thread 1 once, the others twice: alone, and behind their siblings
        kids = result.tree.children
        extra = layout.num_tokens - len(result.prompt_token_ids) - result.metrics.total_tokens
        blocks = {kid.forked_at: kid.id for kid in reversed(kids)}
        assert extra > 0 and all(kid.token_ids for kid in kids)
        again = [k for k in kids if k.id not in blocks.values()]
        headers = {"threadweaver, two blocks": 2}.get(name, 1)
        assert extra == sum(len(k.token_ids) - 1 for k in again) and len(again) == headers


@pytest.mark.parametrize("program", range(6))
def test_any_program(program):
    """Forks within forks, joins of every mode, cuts, kills and fresh threads, at random."""
    recorder, engine = Recorder(), make_engine(num_pages=600)
    result = engine.generate(
        [5, 6, 7, 8], strategy=Anything(program), eos_token_id=None, max_new_tokens=60, logits_processor=[recorder],
        seed=program,
    )  # fmt: skip
    assert_parity(result, recorder, engine.model)


@pytest.mark.parametrize("program", range(6))
def test_cuts_anywhere_among_forks_that_see_siblings_and_joins_of_every_kind(program, tmp_path):
    """Cuts of what children share or wrote, gaps in positions, siblings in sight: all where the engine had it."""
    engine = make_engine(num_pages=900)
    result = engine.generate(
        [5, 6, 7, program], strategy=Sights(program), eos_token_id=None, max_new_tokens=60, logprobs=True
    )
    ab.records.trace.save(result, tmp_path / "trace.json")
    for trace in (result, ab.records.trace.load(tmp_path / "trace.json")):
        layout = training.from_trace(trace)
        assert len(layout.learnt) == result.metrics.sampled_tokens
        _assert_recorded(layout, engine.model)
    cut = sum(len(r.token_ids) for n in result.tree.walk() for r in n.forgotten if r.kind == "sampled")
    kept = training.from_trace(result, forgotten=False)
    assert len(kept.learnt) == result.metrics.sampled_tokens - cut
    _assert_recorded(kept, engine.model)
    _assert_recorded(training.from_trace(result, discarded=False), engine.model)


def _assert_recorded(layout, model):
    with torch.no_grad():
        torch.testing.assert_close(layout.recorded[layout.learnt], layout.logprobs(model), atol=TOLERANCE, rtol=0)


@dataclass(frozen=True)
class CutAndJoined(Strategy):
    """A token is cut, and threads take its place: what comes behind them shares no position with it."""

    mode: str

    def run(self, trunk):
        kids = trunk.fork([[20], [30, 31]])
        trunk.insert([40])
        yield trunk.decode(3)
        trunk.truncate(trunk.length - 1)
        yield [kids[0].decode(6), kids[1].decode(2)]
        yield trunk.join(kids, self.mode)
        trunk.insert([50])
        yield trunk.decode(2)
        yield trunk.truncate(trunk.length - 5)  # down into what was joined
        trunk.insert([60])
        yield trunk.decode(2)


@pytest.mark.parametrize("mode", ["concat", "reprefill"])
def test_a_token_that_was_cut_before_a_join(mode):
    engine = make_engine(num_pages=900)
    result = engine.generate([5, 6, 7], CutAndJoined(mode), eos_token_id=None, max_new_tokens=60, logprobs=True)
    layout = training.from_trace(result)
    assert len(layout.learnt) == result.metrics.sampled_tokens == 15
    _assert_recorded(layout, engine.model)
    cut = next(run for run in result.tree.forgotten if run.kind == "sampled")
    assert cut.cut == (3 + 3, 4, False) and layout.position_ids[layout.input_ids == cut.token_ids[0]].min() <= 6


def test_a_layout_that_shows_something_else_is_caught():
    """The proof can fail: siblings in sight of each other, or on other positions, change the scores."""
    recorder, engine = Recorder(), make_engine(tokenizer=byte_tokenizer())
    result = engine.generate(PROMPT, strategy=ASPECTS, max_new_tokens=24, logits_processor=[recorder])
    layout = assert_parity(result, recorder, engine.model)
    sizes, ids = layout.mask.lengths.tolist(), layout.input_ids
    causal = ab.BranchMask.from_tree(sizes, range(-1, len(sizes) - 1), layout.position_ids)
    dense = ab.BranchMask.from_context(sizes, _context(layout.mask), torch.arange(layout.num_tokens))
    with torch.no_grad():
        right = layout.logprobs(engine.model)
        for mask in (causal, dense):
            wrong = training.Layout(ids, mask, layout.written, layout.labels).logprobs(engine.model)
            assert (wrong - right).abs().max() > 100 * TOLERANCE


def _context(mask: ab.BranchMask) -> list[list[int]]:
    visible = mask.dense()
    return [[j for j in range(i) if visible[mask.starts[i], mask.starts[j]]] for i in range(mask.num_segments)]
