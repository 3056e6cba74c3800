"""Traces: written, read back, replayed, and refused field by field when they are wrong."""

from __future__ import annotations

import contextlib
import copy
import json
from dataclasses import dataclass

import pytest
import torch
from engine_kit import Dense, assert_nothing_held, byte_tokenizer, make_engine, make_model
from programs_of_threads import Anything

import anabranch as ab
from anabranch.engine import logprob_pairs
from anabranch.records import trace
from anabranch.strategies import Aspects, SelfConsistency, Strategy


@pytest.fixture(scope="module")
def result():
    engine = make_engine(tokenizer=byte_tokenizer())
    strategy = Aspects(("é:", "B:"), "so", after=(), intro_tokens=7, aspect_tokens=5, aspect_stop=())
    return engine.generate(
        "hello", strategy=strategy, seed=3, max_new_tokens=20, do_sample=True, temperature=0.9, eos_token_id=None
    )


def test_a_trace_comes_back_as_it_was(result, tmp_path):
    path = tmp_path / "a.json"
    trace.save(result, path)
    back = trace.load(path)
    assert back == result.trace() and back.tree == result.tree and back.metrics == result.metrics
    assert back.version == 2 and back.seed == 3 and back.strategy.startswith("Aspects(headers=('é:'")
    assert back.config["temperature"] == 0.9 and back.config["max_new_tokens"] == 20
    data = json.loads(path.read_text(encoding="utf-8"))
    kinds = [run["kind"] for run in data["tree"]["runs"]]
    assert kinds == ["prompt", "sampled", "joined", "joined", "inserted", "sampled"]
    assert data["prompt_token_ids"] == list(result.prompt_token_ids)
    assert list(tmp_path.iterdir()) == [path]


def test_answers_of_a_vote_are_kept(tmp_path):
    result = make_engine().generate([1, 2, 3], strategy=SelfConsistency(3, max_new_tokens=4))
    trace.save(result.trace(), tmp_path / "b.json")
    assert trace.load(tmp_path / "b.json").answers == [list(a) for a in result.answers]


def broken(data, path, value):
    data = copy.deepcopy(data)
    *way, last = path
    place = data
    for key in way:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["schema"], "other", "trace.schema: expected 'anabranch.records.trace'"),
        (["version"], 3, "trace.version: 3 is not readable here"),
        (["version"], True, "trace.version: expected int, got True"),
        (["seed"], "3", "trace.seed: expected int, got '3'"),
        (["model"], ..., "trace.model: missing"),
        (["token_ids", 2], -5, r"trace.token_ids\[2\]: expected a number ≥ 0, got -5"),
        (
            ["tree", "children", 1, "role"],
            "leaf",
            r"trace.tree.children\[1\].role: expected 'trunk', 'fork' or 'fresh'",
        ),
        (
            ["tree", "children", 0, "token_ids", 0],
            1.5,
            r"trace.tree.children\[0\].token_ids\[0\]: expected int, got 1.5",
        ),
        (["tree", "runs", 1, "kind"], "dreamt", r"trace.tree.runs\[1\].kind: expected 'prompt'"),
        (["tree", "runs", 1, "spliced"], 0, r"trace.tree.runs\[1\].spliced: expected bool"),
        (["tree", "token_ids"], [1], "trace.tree.runs: hold .* tokens that are not those of trace.tree.token_ids"),
        (["tree", "children", 0, "token_ids", 0], 1, r"hold \d+ tokens that are not those of"),
        (["tree", "runs", 1, "logprobs"], [-1.0], r"trace.tree.runs\[1\].logprobs: 1 of them for \d+ tokens"),
        (["tree", "runs", 1, "logprobs"], [-1.0] * 99, r"trace.tree.runs\[1\].logprobs: 99 of them for \d+ tokens"),
        (["tree", "children"], {}, r"trace.tree.children: expected list or tuple"),
        (["metrics", "token_speedup"], ..., "trace.metrics.token_speedup: missing"),
        (["metrics", "token_speedup"], "fast", "trace.metrics.token_speedup: expected int or float"),
        (["metrics", "speed"], 1, "trace.metrics.speed: unknown"),
    ],
)
def test_a_wrong_field_is_named(result, path, value, message):
    with pytest.raises(ValueError, match=message):
        trace.Trace.from_dict(broken(result.trace().as_dict(), path, value))


def test_a_file_that_is_no_trace_is_named(tmp_path):
    path = tmp_path / "c.json"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"c\.json: not JSON"):
        trace.load(path)
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"c\.json: trace: expected dict"):
        trace.load(path)


# ------------------------------------------------------------------------------------------------ version 1


def test_version_1_is_read_and_cannot_be_replayed(result):
    data = json.loads(json.dumps(result.trace().as_dict()))

    def shrink(node):
        del node["log"]
        for run in node["runs"] + node["forgotten"]:
            del run["logprobs"]
        for child in node["children"]:
            shrink(child)

    shrink(data["tree"])
    data["version"] = 1
    for name in ("overhead_seconds", "overhead", "tokens_physical_then"):
        del data["metrics"][name]
    old = trace.Trace.from_dict(data)
    assert old.version == 2 and old.tree == result.tree and old.tree.log == ()
    assert old.metrics.overhead == pytest.approx(result.metrics.overhead) and old.metrics.tokens_physical_then == 0
    with pytest.raises(ValueError, match="holds no log"):
        ab.replay(old, make_engine())
    del data["tree"]["children"][0]["runs"]
    with pytest.raises(ValueError, match=r"trace.tree.children\[0\].runs: missing"):
        trace.Trace.from_dict(data)


# ------------------------------------------------------------------------------------------------ replay


def assert_replays(result, engine, tolerance=2e-4):
    """Through a file and the engine: the same tree, and every sampled token as likely as it was."""
    back = trace.Trace.from_dict(json.loads(json.dumps(result.trace().as_dict())))
    again = ab.replay(back, engine)
    assert again.tree == result.tree and again.token_ids == result.token_ids
    pairs = list(logprob_pairs(back, again))
    runs = [run for node in result.tree.walk() for run in (*node.runs, *node.forgotten) if run.kind == "sampled"]
    assert len(pairs) == sum(len(run.token_ids) for run in runs) == result.metrics.sampled_tokens
    assert max(abs(a - b) for a, b in pairs) < tolerance
    assert again.metrics.sampled_tokens == result.metrics.sampled_tokens
    assert again.metrics.inserted_tokens == result.metrics.inserted_tokens
    assert_nothing_held(engine)
    return again


@pytest.mark.parametrize("program", range(10))
def test_any_program_replays_with_plenty_or_few_pages(program):
    options = dict(strategy=Anything(program), eos_token_id=None, max_new_tokens=200, seed=program, do_sample=True)
    result = make_engine(num_pages=600).generate([5, 6, 7, 8], logprobs=True, **options)
    again = assert_replays(result, make_engine(num_pages=600, max_rows=7))
    with contextlib.suppress(ValueError):
        assert_replays(result, make_engine(num_pages=max(8, again.metrics.pages_peak * 3 // 4)))


def test_log_probabilities_are_those_of_a_dense_recomputation(result):
    assert all(run.logprobs is None for node in result.tree.walk() for run in node.runs)  # nobody asked
    again = ab.replay(result, make_engine())
    dense = Dense(result, "llama")
    for node in again.tree.walk():
        context = [] if node.id == "0" else list(result.prompt_token_ids) + list(result.tree.runs[1].token_ids)
        for run in node.runs:
            for i, token in enumerate(run.token_ids):
                if run.logprobs is not None:
                    scores = dense.by_context[tuple(context)].log_softmax(-1)
                    assert run.logprobs[i] == pytest.approx(float(scores[token]), abs=2e-4)
                context.append(token)
        kinds = [run.kind for run in node.runs if run.logprobs is not None]
        assert kinds == ["sampled"] * (2 if node.id == "0" else 1)


def test_pre_empted_children_that_never_came_to_be_replay():
    @dataclass(frozen=True)
    class Early(Strategy):
        def run(self, trunk):
            trunk.decode(3)
            kids = trunk.fork([[20], [30], None])
            kids[1].decode(4)
            kids[1].kill()  # before the trunk has got to the fork
            late = trunk.spawn([1, 2, 3])
            later = trunk.spawn([4])
            yield kids[0].decode(3)
            kids[2].fork(2)[1].decode(2)
            yield late.decode(5)
            trunk.join([late, later], "reprefill", headers=[[9], None])
            trunk.insert([8])
            yield trunk.decode(2)
            trunk.truncate(trunk.length - 1)
            yield trunk

    result = make_engine().generate([5, 6, 7], strategy=Early(), logprobs=True, eos_token_id=None)
    kids = result.tree.children
    assert [k.id for k in kids] == ["0.3", "0.4", "0.0", "0.1", "0.2"]
    assert [k.fate for k in kids] == ["joined", "joined", "discarded", "killed", "discarded"]
    assert result.tree.token_ids[3:-2] == (9, *kids[0].token_ids) and len(result.tree.forgotten) == 1
    assert_replays(result, make_engine())


def test_an_aborted_generation_replays_as_far_as_it_came():
    engine = make_engine()

    @dataclass(frozen=True)
    class Aborts(Strategy):
        def run(self, trunk):
            yield trunk.decode(4)
            kids = trunk.fork(2)
            yield [kid.decode(3) for kid in kids]
            kids[0].decode(50)
            engine.abort()
            yield trunk.decode(4)

    result = engine.generate([5, 6, 7], strategy=Aborts(), eos_token_id=None)
    assert {node.fate for node in result.tree.walk()} == {"killed"}
    again = ab.replay(result, engine)
    assert [n.runs for n in again.tree.walk()] == [n.runs for n in result.tree.walk()]


def test_a_replay_that_cannot_be_is_told(result):
    data = result.trace().as_dict()

    def log(child, i, **change):
        changed = copy.deepcopy(data)
        node = changed["tree"]["children"][child] if child is not None else changed["tree"]
        node["log"][i] |= change
        return trace.Trace.from_dict(changed)

    kinds = [action["do"] for action in data["tree"]["log"]]
    assert kinds == ["sample", "fork", "join", "insert", "sample"]
    engine = make_engine()
    for changed, message in (
        (log(None, 0, token_ids=[3] * 7), "its replay differs in thread 0, token_ids"),
        (log(None, 0, token_ids=[9999]), "token id 9999 at 0 is outside the model's vocabulary"),
        (log(None, 1, children=["0.0", "0.7"]), "fork of '0.7', which is no child"),
        (log(None, 1, headers=[]), "not one header a child"),
        (log(None, 2, children=[]), "join of 0 threads"),
        (log(None, 2, mode="reprefill"), "differs in thread 0, "),
        (log(1, 1, token_ids=[3] * 5), "differs in thread 0, token_ids"),
        (log(1, 1, token_ids=[3]), "truncate: length=.*: thread 0.1 can be cut to"),
    ):
        with pytest.raises(ValueError, match=message):
            ab.replay(changed, engine)
        assert_nothing_held(engine)
    for i, change, message in (
        (0, {"do": "dream"}, r"trace.tree.log\[0\].do: expected one of insert, sample"),
        (2, {"mode": "merge"}, r"trace.tree.log\[2\].mode: expected a join mode"),
        (1, {"headers": [[-1], None]}, r"trace.tree.log\[1\].headers\[0\].header\[0\]: expected a number"),
    ):
        with pytest.raises(ValueError, match=message):
            log(None, i, **change)


def test_scoring_of_given_tokens():
    seen = []

    @dataclass(frozen=True)
    class Scores(Strategy):
        def run(self, trunk):
            seen.append((yield trunk.score([9, 8, 7, 6, 5, 4, 3, 2, 1])))
            kids = trunk.fork(3)
            seen.append((yield [kid.score([i, 50, 60]) for i, kid in enumerate(kids)]))
            trunk.join(kids, "discard")
            seen.append((yield trunk.score([])))
            yield trunk.score([77])
            yield trunk.decode(1)

    prompt = [5, 6, 7, 8]
    for engine in (make_engine(), make_engine(max_rows=2), make_engine(num_pages=6, max_rows=3)):
        seen.clear()
        result = engine.generate(prompt, strategy=Scores())
        flat = [*prompt, *range(9, 0, -1)]
        logp = make_model()(torch.tensor([flat])).logits[0].log_softmax(-1)
        expected = [float(logp[3 + i, token]) for i, token in enumerate(flat[4:])]
        assert seen[0] == pytest.approx(expected, abs=2e-4) and seen[2] == ()
        for i, found in enumerate(seen[1]):
            logp = make_model()(torch.tensor([[*flat, i, 50, 60]])).logits[0].log_softmax(-1)
            expected = [float(logp[12 + n, token]) for n, token in enumerate((i, 50, 60))]
            assert found == pytest.approx(expected, abs=2e-4)
        assert result.metrics.inserted_tokens == 9 + 9 + 1 and result.metrics.sampled_tokens == 1
        last = make_model()(torch.tensor([[*flat, 77]])).logits[0, -1]
        assert result.token_ids[-1] == int(last.argmax())
        assert_nothing_held(engine)


def test_metrics_of_drafts_may_be_missing(result):
    data = json.loads(json.dumps(result.trace().as_dict()))
    del data["metrics"]["draft_tokens"], data["metrics"]["accepted_tokens"]
    assert trace.Trace.from_dict(data).metrics.draft_tokens == 0
