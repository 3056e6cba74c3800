"""Engines in Ray actors: the example's fleet, and a replica that is killed in the middle of a request."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from engine_kit import Nested, make_engine

import anabranch as ab

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
pytestmark = pytest.mark.slow  # ray takes 10 s to start, and each engine as long

ROOT = Path(__file__).parents[2]
PROMPT = list(range(40, 60))
LONG = dict(max_new_tokens=400, seed=3, do_sample=True)


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("ray_engines", ROOT / "examples" / "ray_engines.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["ray_engines"] = module
    spec.loader.exec_module(module)
    os.environ.setdefault("RAY_worker_niceness", "0")  # not behind every other program of a busy machine
    paths = os.pathsep.join(map(str, (ROOT / "examples", ROOT / "tests" / "kits", Path(ab.__file__).parents[1])))
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}},
    )  # fmt: skip
    yield module
    ray.shutdown()


def test_a_dead_replicas_requests_go_on_elsewhere(example) -> None:
    """Token for token, with what was written taken from the trace."""
    fleet = example.Fleet(make_engine, replicas=2, num_cpus=0.5)
    fleet.generate(PROMPT, max_new_tokens=2)  # both the imports and the model are there
    expected = make_engine().generate(PROMPT, strategy=ab.SelfConsistency(3), eos_token_id=None, **LONG)
    victims = [ray.get(replica.pid.remote()) for replica in fleet.replicas]
    traces: list = []
    note = example.Trace.note

    def noted(trace, event):
        traces.append(trace)
        note(trace, event)

    example.Trace.note = noted
    found: list = []
    options = {**LONG, "eos_token_id": None}
    asking = threading.Thread(
        target=lambda: found.append(fleet.generate(PROMPT, strategy=ab.SelfConsistency(3), **options))
    )
    asking.start()
    deadline = time.monotonic() + 60
    while not traces or sum(map(len, traces[-1].written.values())) < 200:
        assert time.monotonic() < deadline and asking.is_alive()
        time.sleep(0.005)
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    asking.join(120)
    example.Trace.note = note
    assert fleet.resumed == 1
    assert [node.token_ids for node in found[0].tree.walk()] == [node.token_ids for node in expected.tree.walk()]
    assert found[0].metrics.accepted_tokens > 100  # verified, not written again


def test_sessions_stay_where_their_prefix_is(example) -> None:
    fleet = example.Fleet(make_engine, replicas=2, num_cpus=0.5)
    first = fleet.generate(PROMPT, session="a", max_new_tokens=4)
    longer = [*PROMPT, *first.token_ids, 9, 9]
    second = fleet.generate(longer, session="a", strategy=Nested(), max_new_tokens=64)
    assert second.metrics.cached_tokens >= len(PROMPT)
    with pytest.raises(ValueError, match="vocabulary"):
        fleet.generate([10**6])


def test_map_batches(example) -> None:
    data = ray.data.from_items([{"prompt": "12*34="}, {"prompt": "7*8="}, {"prompt": "56*78="}])
    answered = data.map_batches(example.Answer, fn_constructor_args=(example.make,), batch_size=2, concurrency=1)
    rows = {row["prompt"]: row["answer"] for row in answered.take_all()}
    engine = example.make()
    assert rows == {prompt: engine.generate(prompt, max_new_tokens=40).text for prompt in rows}
