"""The packaged model (or a folder's) on held-out problems: ``python -m training.multiplication.evaluate``.

Three ways of running the same model: forked (``ab.ThreadWeaver()``), forced sequential (``ab.Sequential(…)``: the same
threads one after another), and plain decoding (``strategy=None``: it writes the flat text from left to right). An
answer is right when the number behind the last ``=`` is. ``--write-problems`` makes problems.jsonl anew.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

from training.multiplication.traces import draw, problem

PROBLEMS = Path(__file__).with_name("problems.jsonl")
COUNT = 600


def write_problems() -> None:
    """problems.jsonl: distinct problems of the test split, {"prompt", "answer", "threads"} a line."""
    rng = random.Random("test")
    pairs: dict[tuple[int, int], None] = {}
    while len(pairs) < COUNT:
        pairs[draw(rng, "test")] = None
    lines = []
    for a, b in pairs:
        question = problem(a, b)
        lines.append(json.dumps({"prompt": f"{a} * {b}", "answer": question.answer, "threads": question.threads}))
    PROBLEMS.write_text("\n".join(lines) + "\n")


def interval(hits: int, of: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson)."""
    share, scale = hits / of, 1 + z * z / of
    middle, half = share + z * z / (2 * of), z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def score(engine: Any, problems: list[dict[str, Any]], strategy: Any, batch: int) -> dict[str, Any]:
    """Counts and shares of one way of running."""
    from anabranch.metrics import summary

    results, start = [], time.perf_counter()
    for at in range(0, len(problems), batch):
        results += engine.generate([p["prompt"] for p in problems[at : at + batch]], strategy=strategy)
    seconds = time.perf_counter() - start
    right = threads = 0
    sizes: Counter[str] = Counter()
    good: Counter[str] = Counter()
    wrong = []
    for question, result in zip(problems, results, strict=True):
        number = re.search(r"=(\d+)$", result.text)
        hit = number is not None and number[1] == question["answer"]
        asked = result.text.count("<Thread>")
        size = "x".join(str(len(part)) for part in question["prompt"].split(" * "))
        right, threads = right + hit, threads + (asked == question["threads"])
        sizes[size] += 1
        good[size] += hit
        if not hit:
            wrong.append({"prompt": question["prompt"], "text": result.text})
    forked = [r for r in results if r.metrics.num_threads]
    out: dict[str, Any] = {
        "problems": len(problems),
        "right": right,
        "accuracy": right / len(problems),
        "accuracy_95": interval(right, len(problems)),
        "threads_right": threads / len(problems),
        "threads_right_95": interval(threads, len(problems)),
        "malformed": sum(bool(r.malformed) for r in results) / len(problems),
        "seconds": round(seconds, 1),
        "by_size": {s: f"{good[s]}/{sizes[s]}" for s in sorted(sizes)},
        "wrong": wrong,
    }
    if forked:
        total = summary(forked)
        out["where_it_forks"] = {
            k: total[k] for k in ("answers", "total_tokens", "critical_path_tokens", "token_speedup", "num_threads")
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a model folder; default: the packaged one")
    parser.add_argument("--limit", type=int, help="only so many problems")
    parser.add_argument("--batch", type=int, default=50, help="prompts of one call")
    parser.add_argument("--json", type=Path, help="write the whole report here")
    parser.add_argument("--ways", default="forked,sequential,plain")
    parser.add_argument("--write-problems", action="store_true")
    args = parser.parse_args()
    if args.write_problems:
        write_problems()
        return
    import anabranch as ab
    from anabranch.cli.common import load_model

    ways = {"forked": ab.ThreadWeaver(), "sequential": ab.Sequential(ab.ThreadWeaver()), "plain": None}
    model, tokenizer, _ = load_model(args.model or "multiplication", "float32")
    engine = ab.Engine(model, tokenizer, num_pages=64 * args.batch)
    problems = [json.loads(line) for line in PROBLEMS.read_text().splitlines()][: args.limit]
    report = {}
    for name in args.ways.split(","):
        report[name] = line = score(engine, problems, ways[name], args.batch)
        print(name, json.dumps({k: v for k, v in line.items() if k != "wrong"}), flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
