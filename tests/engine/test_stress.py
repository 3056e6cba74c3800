"""Many generations at random: no page leaked, no token lost, no hang, and the same tree whatever the pages.

pytest tests/test_stress.py -m slow            # 1,000 of them
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from engine_kit import EOS, SIZES, assert_nothing_held
from programs_of_threads import Anything
from steps_kit import Steps
from threadweaver_kit import Babble, tag_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import anabranch as ab
from anabranch.engine import Result
from anabranch.strategies import Aspects, EntropyFork, SelfConsistency, Sequential, Strategy, ThreadWeaver

SHORT, LONG = 60, 1000


@pytest.fixture(autouse=True)
def watch(monkeypatch):
    Steps.watch(monkeypatch)


@cache
def tiny_model():
    torch.manual_seed(0)
    small = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    model = LlamaForCausalLM._from_config(LlamaConfig(**SIZES | small), attn_implementation="anabranch")
    return model.eval()


def engine(**options: Any) -> ab.Engine:
    return ab.Engine(tiny_model(), tag_tokenizer(), **options)


@dataclass
class Problem:
    """One call: prompts, strategy, seeds and options, all drawn from its number."""

    number: int
    strategy: Strategy = field(init=False)
    prompts: list[list[int]] = field(init=False)
    options: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        rng = random.Random(self.number)
        many = rng.choice([1, 1, 2, 3, 5, 16])
        self.prompts = [[rng.randrange(200) for _ in range(rng.randint(1, 24))] for _ in range(many)]
        self.options = dict(
            seed=[rng.randrange(1000) for _ in range(many)],
            max_new_tokens=rng.randint(8, 60),
            eos_token_id=rng.choice([None, EOS, [EOS, *range(30)]]),
            do_sample=rng.random() < 0.5,
        )
        self.strategy = rng.choice(
            [self._weaver, self._program, self._program, self._vote, self._entropy, self._aspects]
        )(rng)
        if rng.random() < 0.2:
            self.strategy = Sequential(self.strategy)

    def _weaver(self, rng):
        self.options |= dict(logits_processor=[Babble()], eos_token_id=EOS, do_sample=False)
        return ThreadWeaver(max_threads=rng.choice([1, 2, 64]), thread_tokens=rng.choice([None, 6]))

    def _program(self, rng):
        return Anything(rng.randrange(10**6))

    def _vote(self, rng):
        return SelfConsistency(rng.randint(1, 9), max_new_tokens=rng.choice([None, 9]), temperature=1.0)

    def _entropy(self, rng):
        fell = dict(min_confidence=rng.choice([None, 4.0, 6.0, 8.0, 99.0]), window=rng.randint(1, 6))
        return EntropyFork(rng.uniform(3.0, 5.5), rng.randint(1, 5), look_ahead=rng.choice([None, 4]), **fell)

    def _aspects(self, rng):
        cut = dict(intro_tokens=rng.randint(1, 9), aspect_tokens=rng.randint(1, 9), aspect_stop=())
        return Aspects(([1], [2, 3], [4, 5, 6])[: rng.randint(1, 3)], [7, 8], after=(), **cut)

    def run(self, engine: ab.Engine, steps: int = 5000, only: int | None = None) -> list[Result]:
        """In one call; `only`: that prompt alone."""
        Steps.left = steps
        some = range(len(self.prompts)) if only is None else [only]
        options = self.options | {"seed": [self.options["seed"][i] for i in some]}
        return engine.generate([self.prompts[i] for i in some], strategy=self.strategy, **options)


def assert_no_token_lost(results: list[Result]) -> None:
    """Every token that was sampled or inserted stands where it was written, and only there."""
    for result in results:
        nodes = {node.id: node for node in result.tree.walk()}
        runs = [run for node in result.tree.walk() for run in (*node.runs, *node.forgotten)]
        of_kind = {kind: sum(len(r.token_ids) for r in runs if r.kind == kind) for kind in ("sampled", "inserted")}
        assert of_kind["sampled"] == result.metrics.sampled_tokens
        assert of_kind["inserted"] == result.metrics.inserted_tokens
        for node in nodes.values():
            held = [t for run in node.runs if run.kind != "prompt" for t in run.token_ids]
            assert held == list(node.token_ids) and node.fate is not None
            for run in node.runs:
                assert not run.spliced or run.token_ids == nodes[run.source].token_ids


def generations(numbers: Iterable[int]) -> dict[str, int]:
    """Run them; what there was to see."""
    roomy = engine(num_pages=6000, page_size=4)
    seen = dict.fromkeys(("forks", "preemptions", "queued", "too small", "tight", "killed", "batches of 16"), 0)
    for number in numbers:
        problem, rng = Problem(number), random.Random(-number - 1)
        expected = problem.run(roomy)
        assert_nothing_held(roomy)
        assert_no_token_lost(expected)
        alone = rng.randrange(len(expected))
        assert problem.run(roomy, only=alone)[0].tree == expected[alone].tree, number
        seen["batches of 16"] += len(expected) == 16
        seen["forks"] += sum(r.metrics.num_forks for r in expected)
        seen["killed"] += sum(node.fate == "killed" for r in expected for node in r.tree.walk())
        size, peak = rng.choice([1, 2, 4, 16]), max(r.metrics.tokens_physical_peak for r in expected)
        tight = engine(
            num_pages=rng.randint(max(1, peak // 3), peak) // size + rng.randint(2, 16),
            page_size=size,
            max_rows=rng.choice([2, 5, 16, 512]),
            max_threads=rng.choice([None, None, 1, 2, 5]),
        )
        try:
            results = problem.run(tight, steps=20_000)
        except ValueError as error:
            assert "num_pages" in str(error), (number, error)
            seen["too small"] += 1
        else:
            assert [r.tree for r in results] == [r.tree for r in expected], number
            assert [sorted(r.malformed) for r in results] == [sorted(r.malformed) for r in expected]
            assert_no_token_lost(results)
            assert tight.max_threads is None or max(r.metrics.max_concurrency for r in results) <= tight.max_threads
            seen["tight"] += 1
            seen["preemptions"] += sum(r.metrics.preemptions for r in results)
            seen["queued"] += tight.max_threads is not None
        assert_nothing_held(tight)
    return seen


def test_generations_at_random():
    # The two at the end failed once: a prompt in turns waited for ever for a slot, and equally sure branches tied.
    seen = generations([*range(SHORT), 211, 509])
    assert seen["tight"] > SHORT // 2 and min(seen.values()) > 0, seen


@pytest.mark.slow
def test_a_thousand_generations_at_random():
    seen = generations(range(LONG))
    print(seen)
    assert seen["tight"] > LONG // 2 and seen["preemptions"] > LONG // 10 and min(seen.values()) > LONG // 100, seen
