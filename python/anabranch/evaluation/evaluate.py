"""A model on problems with known answers: forked, forced sequential and plain, with confidence intervals.

``anabranch eval`` on the command line. A problem file has one JSON object a line::

    {"prompt": "7308 * 4406", "answer": "32199048", "threads": 3, "family": "4x4"}

``prompt`` (text, or chat messages) and ``answer`` (text or a number) are needed; ``threads`` (what the problem calls
for, 0 = no fork) and ``family`` (for a breakdown) are not.

Three modes run the same model on the same problems: ``forked`` (the strategy), ``sequential`` (the same format, one
thread after another, each as blind to its siblings) and ``plain`` (``strategy=None``). Accuracy and tokens come from
batches; wall clock is taken one problem at a time, forked and sequential in turns, because a batch hides what forking
saves.
"""

from __future__ import annotations

import json
import math
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anabranch.answers import final_answer, is_right, require
from anabranch.strategies import Sequential, Strategy
from anabranch.text.prompts import as_message, takes_chats

__all__ = ["MODES", "Problem", "evaluate", "final_answer", "is_right", "read_problems", "wilson"]

MODES = ("forked", "sequential", "plain")


@dataclass(frozen=True)
class Problem:
    """One line of a problem file; `more` holds the fields that nothing here reads."""

    prompt: Any
    answer: str
    threads: int | None = None
    family: str = ""
    more: dict[str, Any] = field(default_factory=dict)


def read_problems(path: str | Path) -> list[Problem]:
    """The problems of a .jsonl file. Raises ValueError that names the line."""
    out = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            data = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error}); one object a line is expected") from None
        if not isinstance(data, dict) or not data.get("prompt") or "answer" not in data:
            raise ValueError(f'{where}: expected an object with "prompt" and "answer"')
        known = data["answer"]
        number = isinstance(known, (int, float)) and not isinstance(known, bool) and math.isfinite(known)
        if not number and not (isinstance(known, str) and known.strip()):
            raise ValueError(f'{where}: "answer" is {known!r}; expected a number, or text that is not empty')
        threads = data.pop("threads", None)
        if threads is not None and (not isinstance(threads, int) or threads < 0):
            raise ValueError(f'{where}: "threads" is {threads!r}; expected a whole number, 0 for no fork')
        prompt, answer, family = data.pop("prompt"), str(data.pop("answer")), str(data.pop("family", ""))
        out.append(Problem(prompt, answer, threads, family, data))
    if not out:
        raise ValueError(f"{path}: no problems in it")
    return out


# ------------------------------------------------------------------------------------------------ statistics


def wilson(hits: int, of: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson 1927); (0, 1) for no trials."""
    if not of:
        return 0.0, 1.0
    share, scale = hits / of, 1 + z * z / of
    middle, half = share + z * z / (2 * of), z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def bootstrap(
    pairs: Sequence[tuple[float, float]], statistic: Callable[[Sequence[tuple[float, float]]], float]
) -> tuple[float, float] | None:
    """95 % percentile interval over problems drawn again, 2,000 times, with a fixed seed; None for a single one."""
    if len(pairs) < 2:
        return None
    rng = random.Random(0)
    values = sorted(statistic(rng.choices(pairs, k=len(pairs))) for _ in range(2000))
    return values[49], values[1949]


def ratio_of_sums(pairs: Sequence[tuple[float, float]]) -> float:
    return sum(a for a, _ in pairs) / max(sum(b for _, b in pairs), 1e-12)


# ------------------------------------------------------------------------------------------------ running


@dataclass
class _Run:
    """One problem in one mode."""

    right: bool
    threads: int
    malformed: bool
    total: int
    critical: int
    text: str


def evaluate(
    engine: Any,
    problems: Sequence[Problem],
    strategy: Strategy | None,
    *,
    modes: Sequence[str] = MODES,
    batch: int = 16,
    timed: int = 0,
    max_new_tokens: int = 1024,
    seed: int = 0,
    chat: bool | None = None,
    sampling: dict[str, Any] | None = None,
    check: Callable[[Problem, str], bool] | None = None,
    report: Callable[[str, int, int], None] = lambda mode, done, total: None,
) -> dict[str, Any]:
    """Run `problems` in each of `modes`; one dict with everything, ready for JSON.

    engine: an `Engine`. strategy: None leaves mode "plain" alone possible. batch: prompts at a time for accuracy.
    timed: problems that are also run one at a time, forked and sequential in turns, evenly spaced over the list.
    Speed-ups are given where at least one of them forked, intervals from two problems on.
    max_new_tokens: most tokens one after another. chat: whether a prompt that is text goes through the chat template;
    None: where there is one. sampling: arguments for ``engine.generate``; default greedy. check(problem, text): whether
    an answer is right; default `is_right`.
    report(mode, done, total) is called as problems come back.
    """
    unknown = [m for m in modes if m not in MODES]
    if unknown or not modes:
        raise ValueError(f"modes: {list(modes)}; pass some of {', '.join(MODES)}")
    if strategy is None and tuple(modes) != ("plain",):
        raise ValueError(f"modes: {list(modes)} without a strategy; pass modes=['plain'], or a strategy")
    if not problems:
        raise ValueError("problems: none; pass at least one")
    if check is None:
        require("evaluate")
    good = check or (lambda problem, text: is_right(text, problem.answer))
    how = {"do_sample": False, "max_new_tokens": max_new_tokens, "seed": seed, **(sampling or {})}
    use_chat = takes_chats(engine.tokenizer) if chat is None else chat
    prompts = [as_message(p.prompt, use_chat) for p in problems]
    strategies = {"forked": strategy, "plain": None}
    if strategy is not None:
        strategies["sequential"] = Sequential(strategy)
    runs: dict[str, list[_Run]] = {}
    out: dict[str, Any] = {"problems": len(problems), "batch": batch, "modes": {}, "wrong": []}
    for mode in modes:
        runs[mode] = []
        start = time.perf_counter()
        for at in range(0, len(problems), batch):
            report(mode, at, len(problems))
            results = engine.generate(prompts[at : at + batch], strategy=strategies[mode], **how)
            runs[mode] += [_run(p, r, mode, good) for p, r in zip(problems[at : at + batch], results, strict=True)]
        report(mode, len(problems), len(problems))
        out["modes"][mode] = _summary(problems, runs[mode], time.perf_counter() - start)
        out["wrong"] += [
            {"mode": mode, "prompt": p.prompt, "answer": p.answer, "text": r.text}
            for p, r in zip(problems, runs[mode], strict=True)
            if not r.right
        ]
    if "forked" in runs and "sequential" in runs:
        pairs = [(float(a.right), float(b.right)) for a, b in zip(runs["forked"], runs["sequential"], strict=True)]
        difference = [_mean_difference(pairs), *(bootstrap(pairs, _mean_difference) or (None, None))]
        out["forked_minus_sequential"] = dict(zip(("difference", "low", "high"), difference, strict=True))
    if timed:
        out["timed"] = _timed(engine, prompts, strategies, timed, how, report)
    return out


def _mean_difference(pairs: Sequence[tuple[float, float]]) -> float:
    return sum(a - b for a, b in pairs) / len(pairs)


def _run(problem: Problem, result: Any, mode: str, good: Callable[[Problem, str], bool]) -> _Run:
    m, text = result.metrics, result.text or ""
    threads = len(re.findall("<Thread>", text)) if mode == "plain" else m.num_threads
    return _Run(good(problem, text), threads, bool(result.malformed), m.total_tokens, m.critical_path_tokens, text)


def _summary(problems: Sequence[Problem], runs: list[_Run], seconds: float) -> dict[str, Any]:
    n, right = len(runs), sum(r.right for r in runs)
    forked = [r for r in runs if r.threads]
    out: dict[str, Any] = {
        "right": right,
        "accuracy": right / n,
        "accuracy_95": wilson(right, n),
        "malformed": sum(r.malformed for r in runs),
        "malformed_rate": sum(r.malformed for r in runs) / n,
        "forked": len(forked),
        "total_tokens": sum(r.total for r in runs),
        "critical_path_tokens": sum(r.critical for r in runs),
        "token_speedup_where_forked": (
            sum(r.total for r in forked) / sum(r.critical for r in forked) if forked else None
        ),
        "seconds_in_batches": seconds,
    }
    asked = [(p.threads, r.threads) for p, r in zip(problems, runs, strict=True) if p.threads is not None]
    if asked:
        hits = sum(a == b for a, b in asked)
        out |= {"threads_right": hits / len(asked), "threads_right_95": wilson(hits, len(asked))}
    for name, key in (("by_family", lambda p: p.family), ("by_threads", lambda p: p.threads)):
        groups: dict[str, list[bool]] = {}
        for p, r in zip(problems, runs, strict=True):
            groups.setdefault(str(key(p)), []).append(r.right)
        if len(groups) > 1:
            out[name] = {k: f"{sum(v)}/{len(v)}" for k, v in sorted(groups.items())}
    return out


def _timed(
    engine: Any, prompts: Sequence[Any], strategies: dict[str, Any], count: int, how: dict[str, Any],
    report: Callable[[str, int, int], None],
) -> dict[str, Any]:  # fmt: skip
    """Wall clock of forked and sequential, one problem at a time, in turns after one that is not counted."""
    count = min(count, len(prompts))
    chosen = [prompts[i * len(prompts) // count] for i in range(count)]
    sides = ("forked", "sequential")
    for side in sides:
        engine.generate(chosen[0], strategy=strategies[side], **how)
    pairs, where_forked, overhead = [], [], []
    for done, prompt in enumerate(chosen):
        report("timed", done, count)
        seconds = {}
        for side in sides if done % 2 else sides[::-1]:
            start = time.perf_counter()
            result = engine.generate(prompt, strategy=strategies[side], **how)
            seconds[side] = time.perf_counter() - start
            if side == "forked":
                m = result.metrics
        pair = (seconds["sequential"], seconds["forked"])
        pairs.append(pair)
        overhead.append((m.overhead_seconds, sum(m.seconds.values())))
        if m.num_threads:
            where_forked.append(pair)
    report("timed", count, count)
    out: dict[str, Any] = {"problems": count, "forked": len(where_forked), "overhead": ratio_of_sums(overhead)}
    for name, some in (("all", pairs), ("where_forked", where_forked)):
        if where_forked:  # else both ways are the same, and there is nothing to compare
            out[name] = {
                "sequential_seconds": sum(a for a, _ in some),
                "forked_seconds": sum(b for _, b in some),
                "speedup": ratio_of_sums(some),
                "speedup_95": bootstrap(some, ratio_of_sums),
            }
    return out
