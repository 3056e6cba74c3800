"""Random programs over a server, against the naive engine: the same tree, tokens and metrics (naive_engine.py).

What a server cannot do is left out: splicing KV, and forks that see siblings. Tokens that it draws are its own affair.

pytest tests/remote/test_naive_remote.py -m slow     # 2,000 programs
"""

from __future__ import annotations

import random
from collections import Counter

import pytest
from completions_server import completions_server
from naive_engine import Run
from naive_problems import PIECES, assert_same, assert_same_story, make, tokenizer
from programs_of_threads import Everything

import anabranch as ab
from anabranch.engine import Finish
from anabranch.strategies import Sequential


def compare(engine: ab.RemoteEngine, number: int, seen: Counter) -> None:
    rng = random.Random(f"{number}/remote")
    prompts = [[rng.randrange(97) for _ in range(rng.randint(1, 12))] for _ in range(rng.randint(1, 6))]
    seeds = [rng.randrange(99) for _ in prompts]
    races = rng.random() < 0.25
    strategy = Everything(number, races=races, splices=False)
    strategy = Sequential(strategy) if races else strategy
    budget, eos = rng.choice([None, 3, 12]) if races else None, rng.choice([None, [3, 80]])
    limits = dict(max_new_tokens=rng.choice([6, 20, 60]), max_total_tokens=budget)
    options = dict(do_sample=False, eos_token_id=eos, logprobs=True, **limits)
    told = list(engine.stream(prompts, strategy=strategy, seed=seeds, **options))
    ends = {e.prompt: e.result for e in told if isinstance(e, Finish)}
    for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        naive = Run(make("eager"), prompt, strategy, seed, pieces=PIECES, eos=eos or (), follow=ends[i], draws=False,
                    **limits)  # fmt: skip
        assert_same(ends[i], naive)
        assert_same_story([e for e in told if e.prompt == i], ends[i], naive)
        for node in ends[i].tree.walk():
            seen.update(f"{a.do} {a.mode or ''}".strip() for a in node.log)
    seen["programs"] += len(prompts)


def programs(number: int, least: int) -> None:
    seen: Counter = Counter()
    with completions_server(make("eager"), tokenizer(), max_length=2048) as (url, state):
        with ab.RemoteEngine(url, tokenizer()) as engine:
            while seen["programs"] < least:
                try:
                    compare(engine, number, seen)
                except Exception as error:
                    raise AssertionError(f"problem {number}") from error
                number += 1
        assert state.running == 0
    wanted = ["insert", "sample", "fork", "spawn", "truncate", "kill killed", "join reprefill", "join summary"]
    assert min(seen[name] for name in wanted) >= least // 50, seen


def test_random_programs_over_a_server():
    programs(0, 60)


@pytest.mark.slow
def test_thousands_of_programs_over_a_server():
    programs(10**6, 2000)
