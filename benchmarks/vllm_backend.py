"""vLLM with our attention backend beside vLLM with its own: tokens a second while decoding, in turns in one run.

Each is a process of its own, with the model loaded and the prompts in its prefix cache, and generates when told to; the
other waits for its input meanwhile. What decoding takes is the time of many tokens less the time of one.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from anabranch import models

from .programs import Program
from .vllm_env import environment

PROGRAM = Path(__file__).with_name("vllm_turns.py")
#: name → (prompts, tokens each, samples of each); "unshared" and "one" have nothing to gain by
CASES = {"shared": (1, 6000, 16), "unshared": (16, 400, 1), "one": (1, 6000, 1)}
BACKENDS = {"own": {}, "anabranch": {"attention_backend": "CUSTOM"}}


class Contender(Program):
    """A vLLM in a process of its own."""

    def __init__(self, python: Path, folder: Path, threads: int, options: dict[str, Any]) -> None:
        super().__init__([python, PROGRAM, json.dumps(options)], environment(folder, OMP_NUM_THREADS=str(threads)))

    def generate(self, prompts: list[list[int]], n: int, new_tokens: int) -> dict[str, Any]:
        return self.ask({"prompts": prompts, "n": n, "new_tokens": new_tokens})


def prompts_of(case: str, quick: bool) -> list[list[int]]:
    count, length, _ = CASES[case]
    dice = random.Random(case)
    return [[dice.randrange(100, 40_000) for _ in range(length // 8 if quick else length)] for _ in range(count)]


def run(
    python: Path, dtypes: list[str], cases: list[str] | None = None, block_size: int = 128, new_tokens: int = 48,
    rounds: int = 5, threads: int = 2, quick: bool = False, clock: str = "wall",
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One entry a case and dtype.

    Args:
        python: of an environment with vLLM.
        block_size: tokens a block; 128 is what vLLM's CPU build takes by itself.
        clock: "wall", or "cpu" for a machine that is busy otherwise: CPU time, with one thread.
    """
    if quick:
        rounds, new_tokens = min(rounds, 2), min(new_tokens, 12)
    for dtype in dtypes:
        options = {
            "model": str(models.path("smollm2")), "dtype": dtype, "block_size": block_size, "max_num_seqs": 16,
            "max_model_len": max(length for _, length, _ in CASES.values()) + new_tokens + 8,
            "max_num_batched_tokens": 8192,  # no prompt in chunks: vLLM's CPU build cannot seed such requests
        }  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            contenders: dict[str, Contender] = {}
            try:
                for name, more in BACKENDS.items():
                    contenders[name] = Contender(python, Path(folder), threads, options | more)
                for case in cases or list(CASES):
                    entry = _measure(contenders, clock, prompts_of(case, quick), CASES[case][2], new_tokens, rounds)
                    yield {"case": case, "dtype": dtype, "block_size": block_size, "new_tokens": new_tokens, **entry}
            finally:
                for contender in contenders.values():
                    contender.close()


def _measure(
    contenders: dict[str, Contender], clock: str, prompts: list[list[int]], n: int, new_tokens: int, rounds: int
) -> dict[str, Any]:
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    tokens: dict[str, Any] = {}
    for contender in contenders.values():
        contender.generate(prompts, n, 4)  # the prompts are in the prefix cache from here on
    for turn in range(rounds):
        order = list(contenders) if turn % 2 == 0 else list(reversed(contenders))
        for name in order:
            first = contenders[name].generate(prompts, n, 1)[clock]
            done = contenders[name].generate(prompts, n, new_tokens)
            tokens[name] = done["tokens"]
            rates[name].append(len(prompts) * n * (new_tokens - 1) / max(done[clock] - first, 1e-9))
    pairs = [ours / own for ours, own in zip(rates["anabranch"], rates["own"], strict=True)]
    about = contenders["own"].about
    return {
        "prompts": len(prompts), "prompt_tokens": len(prompts[0]), "n": n, "clock": clock,
        "threads": about["threads"], "versions": about["versions"],
        "rates": {name: [round(rate, 2) for rate in found] for name, found in rates.items()},
        "ratio": round(statistics.median(pairs), 3), "ratios": [round(ratio, 3) for ratio in pairs],
        "same_tokens": tokens["anabranch"] == tokens["own"],
    }  # fmt: skip


def line(entry: dict[str, Any]) -> str:
    own, ours = (statistics.median(entry["rates"][name]) for name in ("own", "anabranch"))
    same = "same tokens" if entry["same_tokens"] else "other tokens"
    what = f"{entry['prompts']} × {entry['prompt_tokens']} tokens, n = {entry['n']}"
    rates = f"{ours:7.1f} against {own:7.1f} tokens a second" + (" of CPU time" if entry["clock"] == "cpu" else "")
    return f"{entry['case']:9} {what:27} {entry['dtype']:9} {rates}: × {entry['ratio']}, {same}"
