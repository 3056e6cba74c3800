"""What every process of a tensor-parallel run does: ``python ranks_program.py FOLDER OUT PART…``.

Each writes what it saw to OUT.<rank>.json. The parts, in order, are functions of this file; those that end in a lost
process come last.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    warnings.simplefilter("ignore", FutureWarning)

import torch
import torch.distributed as dist
from engine_kit import Nested, assert_nothing_held

import anabranch as ab
from anabranch.strategies import Strategy

PROMPTS = [list(range(1, 9)), list(range(40, 63))]
TIGHT = 26  # pages of 4 tokens: threads of `busy` push one another out


@dataclass(frozen=True)
class Scored(Strategy):
    """Asks for scores and for the likeliest tokens on the way."""

    def run(self, trunk):
        yield trunk.decode(3)
        found = yield trunk.score([5, 6, 7])
        kids = trunk.fork(2)
        yield [kid.decode(4, sampling={"do_sample": True}) for kid in kids]
        trunk.join(kids)
        trunk.insert([70 + int(sum(found) < 0)])
        yield trunk.decode(3)


class Own(Exception):
    """Cannot be read back after pickling."""

    def __init__(self, one, two):
        super().__init__(f"{one} {two}")


@dataclass(frozen=True)
class Raises(Strategy):
    def run(self, trunk):
        yield trunk.decode(2)
        raise Own("mine", "alone")


def told(results) -> list:
    """Tokens of all threads, by prompt; positions too."""
    results = results if isinstance(results, list) else [results]
    runs = [[(r.kind, list(r.token_ids), r.position) for r in node.runs] for res in results for node in res.tree.walk()]
    return json.loads(json.dumps(runs))


def calls(engine) -> dict:
    """The same calls on any engine: what they come to."""
    sampled = {"do_sample": True, "temperature": 1.3, "top_k": 40}
    many = {
        "greedy": lambda: engine.generate(PROMPTS, max_new_tokens=16),
        "sampled": lambda: engine.generate(PROMPTS, max_new_tokens=16, seed=[5, 9], **sampled),
        "votes": lambda: engine.generate(PROMPTS[0], ab.SelfConsistency(4), max_new_tokens=9, seed=3, **sampled),
        "nested": lambda: engine.generate(PROMPTS[1], Nested(), max_new_tokens=64, seed=2),
        "sequential": lambda: engine.generate(PROMPTS[1], ab.Sequential(Nested()), max_new_tokens=64, seed=2),
        "scored": lambda: engine.generate(PROMPTS[1], Scored(), max_new_tokens=64, seed=2),
        "drafts": lambda: engine.generate(PROMPTS[0], ab.DraftTree(), max_new_tokens=20),
    }
    return {name: told(call()) for name, call in many.items()}


def busy(engine) -> list:
    """More than fits the cache: (tokens, pre-emptions)."""
    results = engine.generate(PROMPTS * 2, ab.SelfConsistency(3), max_new_tokens=14, seed=[1, 2, 3, 4], do_sample=True)
    return [told(results), sum(r.metrics.preemptions for r in results)]


# ---------------------------------------------------------------------------------------------- the parts


def alike(model, found: dict) -> None:
    """The same calls in every process."""
    engine = ab.Engine(model, num_pages=256, page_size=4, rank_timeout=60)
    found["calls"] = calls(engine)
    found["stream"] = [type(e).__name__ for e in engine.stream(PROMPTS[0], max_new_tokens=3)]
    found["plans"] = list(engine.cache.plan_stats())
    found["errors"] = []
    try:
        engine.generate(PROMPTS[0], Raises())
    except Exception as error:
        found["own"] = [type(error).__name__, str(error)]
    for prompt in ([], [999]):
        try:
            engine.generate(prompt)
        except ValueError as error:
            found["errors"].append(str(error))
    engine.clear_prefix_cache()
    found["after"] = told(engine.generate(PROMPTS[0], max_new_tokens=4))
    engine.clear_prefix_cache()
    engine.generate([1], max_new_tokens=1)
    engine.cache.check()
    usage = engine.cache.usage()
    found["pages"] = [usage.pages_free, usage.pages_total]
    if dist.get_rank() == 0:
        engine.clear_prefix_cache()
        assert_nothing_held(engine)
    tight = ab.Engine(model, num_pages=TIGHT, page_size=4, rank_timeout=60)
    found["busy"] = busy(tight)


def refused(model, found: dict) -> None:
    found["refused"] = []
    for options in ({"own_linear": True}, {"batch_invariant": True}, {"compile": True}, {"cuda_graphs": True}):
        try:
            ab.Engine(model, num_pages=64, **options)
        except ValueError as error:
            found["refused"].append(str(error))
    try:
        ab.Engine(model, num_pages=64 + dist.get_rank())
    except ValueError as error:
        found["refused"].append(str(error))


def arrivals(model, found: dict) -> None:
    """Requests come in on rank 0 alone, at any time."""
    engine = ab.Engine(model, num_pages=256, page_size=4, rank_timeout=60)
    if dist.get_rank() != 0:
        try:
            engine.add([1, 2])
        except RuntimeError as error:
            found["add"] = str(error)
        engine.follow()
        return
    handles = [engine.add(PROMPTS[0], max_new_tokens=16)]
    for _ in range(3):
        engine.step()
    handles.append(engine.add(PROMPTS[1], max_new_tokens=16))
    dropped = engine.add(PROMPTS[1], ab.SelfConsistency(3), max_new_tokens=50, do_sample=True)
    engine.step()
    time.sleep(0.3)  # nothing to do for a while is no error
    dropped.abort()
    found["arrivals"] = told([handle.result() for handle in handles])
    engine.close()
    try:
        engine.generate(PROMPTS[0], max_new_tokens=2)
    except RuntimeError as error:
        found["closed"] = f"{type(error).__name__}: {error}"


def leaves(model, found: dict) -> None:
    """No thread of torch's groups is left at the end, though the model is there."""
    from anabranch.runner.ranks import leave

    engine = ab.Engine(model, num_pages=64, rank_timeout=60)
    engine.generate(PROMPTS[0], max_new_tokens=2)
    found["before"] = group_threads()
    engine.close()
    leave()
    found["after"] = group_threads()


def group_threads() -> list[str]:
    names = [Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")]
    return sorted(name for name in names if "gloo" in name or "tcpstore" in name)


def loses(model, found: dict, end) -> None:
    """Rank 1 ends in some way while rank 0 works: an error for all others, and no wait beyond the timeout."""
    engine = ab.Engine(model, num_pages=256, page_size=4, rank_timeout=5)
    engine.generate(PROMPTS[0], max_new_tokens=2)
    if dist.get_rank() == 1:
        end()
    begin = time.monotonic()
    for name in ("lost", "again"):
        try:
            engine.generate(PROMPTS[0], max_new_tokens=8) if dist.get_rank() == 0 else engine.follow()
        except ab.RankLost as error:
            found[name] = str(error)
    found["waited"] = time.monotonic() - begin
    if dist.get_rank() == 0:
        usage = engine.cache.usage()
        found["free"] = usage.pages_free == usage.pages_total


def dies(model, found: dict) -> None:
    loses(model, found, lambda: os._exit(9))


def stops(model, found: dict) -> None:
    loses(model, found, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def leader_dies(model, found: dict) -> None:
    engine = ab.Engine(model, num_pages=256, page_size=4, rank_timeout=5)
    if dist.get_rank() == 0:
        engine.generate(PROMPTS[0], max_new_tokens=2)
        os._exit(9)
    try:
        engine.follow()
    except ab.RankLost as error:
        found["lost"] = str(error)


def main(folder: str, out: str, *parts: str) -> None:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", attn_implementation="anabranch")
    rank = dist.get_rank()
    for part in parts:
        found: dict = {}
        globals()[part](model, found)
        Path(f"{out}.{part}.{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
