"""Traces: written, read back, and refused field by field when they are wrong."""

from __future__ import annotations

import copy
import json

import pytest

from anabranch import trace
from anabranch.strategies import Aspects, SelfConsistency
from engine_kit import byte_tokenizer, make_engine


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
    assert back.version == 1 and back.seed == 3 and back.strategy.startswith("Aspects(headers=('é:'")
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
        (["schema"], "other", "trace.schema: expected 'anabranch.trace'"),
        (["version"], 2, "trace.version: 2 is not readable here"),
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
