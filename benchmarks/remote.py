"""Threads on a server that runs already, beside the same threads one after another: wall seconds of both, in turns.

The adapted model answers problems with `ThreadWeaver` through a `RemoteEngine`, greedy: the same tokens either way, so
what differs is who waits for whom. Who is first changes with every problem and round, since the second one finds the
prompt in the server's prefix cache. Problems that the model does not answer by threads do not count.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import anabranch as ab

from .serve import PROBLEMS

WAYS: dict[str, Callable[[], Any]] = {
    "threads": ab.ThreadWeaver,
    "sequential": lambda: ab.Sequential(ab.ThreadWeaver()),
}


def run(
    engine: ab.RemoteEngine, count: int, rounds: int, new_tokens: int = 300, report: Callable[[str], None] = print
) -> Iterator[dict[str, Any]]:
    """The first `count` problems that the model answers by threads, `rounds` times each way: the results so far, behind
    each of them."""
    problems: list[dict[str, Any]] = []
    engine.generate("Hello", max_new_tokens=4)  # a connection is there, and the server has computed something
    for number, prompt in enumerate(_prompts()):
        if len(problems) == count:
            break
        found = _problem(engine, prompt, rounds, new_tokens, number)
        if found["forks"]:
            problems.append(found)
            report(line(found))
            yield {"strategy": "threadweaver", "new_tokens": new_tokens, **summary(problems)}
    if not problems:
        raise ValueError("the model answered no problem by threads; serve smollm2-adaptive")


def _prompts() -> Iterator[list[dict[str, str]]]:
    """Problems that have parts."""
    for text in PROBLEMS.read_text(encoding="utf-8").splitlines():
        problem = json.loads(text)
        if problem["threads"] > 1:
            yield [{"role": "user", "content": problem["prompt"]}]


def _timed(engine: ab.RemoteEngine, way: str, prompt: list[dict[str, str]], new_tokens: int) -> dict[str, Any]:
    begin = time.perf_counter()
    result = engine.generate(prompt, strategy=WAYS[way](), max_new_tokens=new_tokens, do_sample=False)
    return {"seconds": time.perf_counter() - begin, "result": result}


def _problem(
    engine: ab.RemoteEngine, prompt: list[dict[str, str]], rounds: int, new_tokens: int, number: int
) -> dict[str, Any]:
    """Both ways in turns, who is first by turns as well."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    results: dict[str, Any] = {}
    for turn in range(rounds):
        for way in WAYS if (turn + number) % 2 == 0 else reversed(WAYS):
            found = _timed(engine, way, prompt, new_tokens)
            seconds[way].append(round(found["seconds"], 4))
            results[way] = found["result"]
    tokens = {way: [node.token_ids for node in result.tree.walk()] for way, result in results.items()}
    metrics = results["threads"].metrics
    return {
        "forks": metrics.num_forks, "threads": metrics.num_threads, "tokens": metrics.sampled_tokens,
        "critical": metrics.critical_path_tokens, "same_tokens": tokens["threads"] == tokens["sequential"],
        "seconds": seconds, "ratio": round(statistics.median(s / t for t, s in zip(*seconds.values(), strict=True)), 3),
    }  # fmt: skip


def summary(problems: list[dict[str, Any]]) -> dict[str, Any]:
    """Sequential over threads: of all seconds, and by problem."""
    ratios = sorted(p["ratio"] for p in problems)
    spent = {way: sum(statistics.median(p["seconds"][way]) for p in problems) for way in WAYS}
    quarters = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "problems": len(problems), "rounds": len(problems[0]["seconds"]["threads"]), "seconds": spent,
        "ratio": round(spent["sequential"] / spent["threads"], 3),
        "ratios": {"median": round(quarters[1], 3), "quarters": [round(q, 3) for q in quarters[::2]],
                   "least": ratios[0], "most": ratios[-1]},
        "tokens_by_critical": round(sum(p["tokens"] for p in problems) / sum(p["critical"] for p in problems), 3),
        "same_tokens": sum(p["same_tokens"] for p in problems), "by_problem": list(problems),
    }  # fmt: skip


def line(problem: dict[str, Any]) -> str:
    """A problem's figures."""
    threads, sequential = (statistics.median(problem["seconds"][way]) for way in WAYS)
    same = "same tokens" if problem["same_tokens"] else "other tokens"
    return (
        f"{problem['threads']} threads, {problem['tokens']} tokens ({problem['critical']} on the critical path): "
        f"{threads:.2f} s against {sequential:.2f} s one after another, × {problem['ratio']}, {same}"
    )
