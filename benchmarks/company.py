"""Decoding beside other programs: tokens a second alone, and with programs that spin on every core they get.

Each contender is a process of its own with the model loaded, asked for one generation at a time; rounds are interleaved
over contenders and numbers of competitors. With C competitors and T threads of ours on P cores, the fair share of the
quiet speed is P / (T + C), at most 1: what a scheduler that treats all threads alike would leave us. A process that
waits for threads which are not running gets less; one that goes on without them as much.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
SPIN = "while True: pass"

# What a contender runs: one line in (branches and tokens), one line out (tokens a second while decoding).
PROGRAM = """
import json, sys, time, torch, anabranch as ab
model, tokenizer = ab.models.load(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
engine = ab.Engine(model, tokenizer)
ids = tokenizer("Think step by step: a farmer has 17 sheep, buys 5 more and sells 8. How many are left, and why?")
ids = ids["input_ids"]
print(json.dumps({"threads": torch.get_num_threads()}), flush=True)
for line in sys.stdin:
    n, count = json.loads(line)
    how = {"do_sample": True, "top_k": 50, "min_new_tokens": count, "max_new_tokens": count}
    strategy = ab.SelfConsistency(n=n, temperature=1.0) if n > 1 else None
    if n == 1:
        how = {"do_sample": False, "min_new_tokens": count, "max_new_tokens": count}
    begin = time.perf_counter()
    result = engine.generate(ids, strategy=strategy, **how)
    spent = time.perf_counter() - begin
    seconds = {name: round(value, 4) for name, value in result.metrics.seconds.items()}
    rate = n * (count - 1) / (spent - seconds["prefill"])
    print(json.dumps({"rate": rate, "seconds": seconds}), flush=True)
"""


class Contender:
    """A process that generates when told to."""

    def __init__(self, python: Path, model: str, dtype: str) -> None:
        folders = [str(python), str(python.parent / "kernels")]
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, model, dtype],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(folders)},
        )  # fmt: skip
        self.threads: int = self._answer()["threads"]

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process under test ended; its error is above")
        return json.loads(line)

    def rate(self, branches: int, tokens: int) -> float:
        """Tokens a second of one generation, its prefill left out."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([branches, tokens]) + "\n")
        self._process.stdin.flush()
        return self._answer()["rate"]

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


@contextmanager
def competitors(count: int) -> Iterator[None]:
    """So many programs that never sleep, at our own priority."""
    running = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def fair_share(threads: int, others: int) -> float:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(1.0, cores / (min(threads, cores) + others))


def run(
    against: Path | None = None, model: str = "smollm2", dtype: str = "bfloat16", branches: tuple[int, ...] = (1, 16),
    tokens: int = 32, others: tuple[int, ...] = (0, 1, 2), rounds: int = 5,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One entry a contender, number of branches and number of competitors.

    against: the ``python`` folder of another build of the package, to be measured in turns with this one.
    """
    places = {"this": HERE / "python"} | ({"other": against} if against is not None else {})
    contenders = {name: Contender(place, model, dtype) for name, place in places.items()}
    try:
        for n in branches:
            rates: dict[tuple[str, int], list[float]] = {}
            for contender in contenders.values():
                contender.rate(n, 8)  # warm
            for _ in range(rounds):
                for count in others:
                    with competitors(count):
                        for name, contender in contenders.items():
                            rates.setdefault((name, count), []).append(contender.rate(n, tokens))
            for (name, count), found in rates.items():
                share = fair_share(contenders[name].threads, count)
                quiet = statistics.median(rates[name, others[0]])
                rate = statistics.median(found)
                yield {
                    "contender": name, "branches": n, "competitors": count, "dtype": dtype, "model": model,
                    "threads": contenders[name].threads, "tokens_per_second": round(rate, 1),
                    "smallest": round(min(found), 1), "largest": round(max(found), 1), "rounds": rounds,
                    "of_quiet": round(rate / quiet, 3), "fair_share": round(share, 3),
                    "of_fair_share": round(rate / quiet / share, 3),
                }  # fmt: skip
    finally:
        for contender in contenders.values():
            contender.close()


def line(entry: dict[str, Any]) -> str:
    """One entry for people."""
    return (
        f"{entry['contender']:6} {entry['branches']:3} branches, {entry['competitors']} spinning: "
        f"{entry['tokens_per_second']:7.1f} tokens/s ({entry['smallest']:.1f}–{entry['largest']:.1f}), "
        f"{entry['of_quiet']:.2f} of quiet, {entry['of_fair_share']:.2f} of the fair share"
    )
