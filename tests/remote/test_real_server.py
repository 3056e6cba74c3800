"""A remote engine on a real vLLM server: `make test-servers` installs and starts one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

import anabranch as ab
from anabranch.strategies import Strategy

pytestmark = pytest.mark.server
ROOT = Path(__file__).resolve().parents[2]


class Scored(Strategy):
    def run(self, trunk):
        return (yield trunk.score(" Paris, of course"))


@pytest.fixture(scope="module")
def engines():
    url = os.environ.get("ANABRANCH_TEST_SERVER")
    if not url:
        pytest.skip("no server: run make test-servers, or set ANABRANCH_TEST_SERVER")
    model, tokenizer = ab.models.load("smollm2-adaptive", dtype=torch.float32)
    with ab.RemoteEngine(url, tokenizer) as remote:
        yield ab.Engine(model, tokenizer, num_pages=3000), remote


@pytest.mark.parametrize("strategy", [ab.ThreadWeaver(), ab.Sequential(ab.ThreadWeaver()), None], ids=str)
def test_the_same_trees_as_here(engines, strategy):
    lines = (ROOT / "training" / "adaptive" / "problems.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [[{"role": "user", "content": json.loads(line)["prompt"]}] for line in lines[:16]]
    here, there = (e.generate(prompts, strategy=strategy, max_new_tokens=300) for e in engines)
    for one, other in zip(here, there, strict=True):
        assert [n.token_ids for n in one.tree.walk()] == [n.token_ids for n in other.tree.walk()]
        assert one.metrics.critical_path_tokens == other.metrics.critical_path_tokens


def test_scores_agree(engines):
    here, there = (e.generate("The capital of France is", strategy=Scored()).answers for e in engines)
    assert there == pytest.approx(here, abs=1e-3)
