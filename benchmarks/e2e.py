"""A real model end to end: the same prompt, the same number of branches, exactly as many tokens from everybody.

Prefill is the time until the first sampled token's scores are there (ours: the engine's own account of its prefill);
decoding is what comes after: n · (tokens − 1) tokens in the rest of the time. "In all" is n · tokens over the whole
call. All sample at temperature 1 from the whole vocabulary, so that nobody gains by an easier filter; end-of-sequence
tokens are banned by `min_new_tokens`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

import anabranch as ab

from .programs import plain
from .timing import clock_name, now

SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
TITLES = {
    "anabranch": "anabranch",
    "anabranch_compiled": "anabranch, compiled",
    "generate": "Transformers generate",
    "generate_reused": "generate, prefill once and copy its cache",
    "vllm": "vLLM, CPU build",
}
QUESTION = "Think step by step: a farmer has 17 sheep, buys 5 more and sells 8. How many sheep are left, and why?"
PASSAGE = (
    "A river that leaves its bed and finds it again further down is said to braid. Between the arms lie islands of "
    "gravel, some bare after every flood, some old enough to carry willows. Water that takes the longer arm arrives "
    "later, colder and with less sand; where the arms meet, one can see for a while which is which. "
)


@dataclass(frozen=True)
class Prompt:
    name: str
    ids: list[int]


def prompts(tokenizer, quick: bool) -> list[Prompt]:
    """A question of some 30 tokens, and the same after a text that makes it about 1,500 (400 with quick)."""
    target = 400 if quick else 1500
    tail = tokenizer(QUESTION)["input_ids"]
    passage = tokenizer(PASSAGE)["input_ids"]
    long = (passage * (target // len(passage) + 1))[: target - len(tail)] + tail
    return [Prompt("short", tail), Prompt("long", long)]


class Clock(LogitsProcessor):
    """Notes when the first scores arrive; leaves them as they are."""

    def __init__(self) -> None:
        self.first: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.first is None:
            self.first = now()
        return scores


@dataclass
class Measured:
    """Seconds of one call: until the first scores, and in all."""

    prefill: float
    total: float


def _timed(call: Callable[[LogitsProcessorList], int], expected: int) -> Measured:
    clock = Clock()
    with warnings.catch_warnings():
        # Transformers renames an argument of generate within 5.x; the old name works in all of them.
        warnings.simplefilter("ignore", FutureWarning)
        start = now()
        tokens = call(LogitsProcessorList([clock]))
    total = now() - start
    if tokens != expected:
        raise RuntimeError(f"{tokens} tokens came out, not {expected}: the comparison would not be fair")
    return Measured((clock.first or start) - start, total)


class Bench:
    """Two copies of the model, one for our engine and one for `generate`, in one dtype."""

    def __init__(self, dtype: str, new_tokens: int) -> None:
        self.dtype, self.new_tokens = dtype, new_tokens
        # wall seconds of the last call of each of ours by phase, as the engine's metrics tell them
        self.phases: dict[str, dict[str, float]] = {}
        kind = getattr(torch, dtype)
        model, self.tokenizer = ab.models.load("smollm2", dtype=kind)
        # No prefix cache: a prompt that an earlier round has left there would cost nothing.
        self.engine = ab.Engine(model, self.tokenizer, compile=False, prefix_cache=False)
        self.compiled: ab.Engine | str  # or the reason why there is none
        try:
            self.compiled = ab.Engine(model, self.tokenizer, compile=True, prefix_cache=False)
        except ValueError as error:
            self.compiled = str(error)
        self.plain, _ = ab.models.load("smollm2", dtype=kind, attn_implementation="sdpa")

    def exactly(self, count: int) -> dict[str, int]:
        return {"min_new_tokens": count, "max_new_tokens": count}

    def ours(self, prompt: Prompt, n: int) -> Measured:
        return self._ours("anabranch", self.engine, prompt, n)

    def ours_compiled(self, prompt: Prompt, n: int) -> Measured:
        assert isinstance(self.compiled, ab.Engine)
        if not self.compiled.compiled:  # that happens behind an engine's first steps; they are not timed
            self.compiled.generate(prompt.ids[:8], do_sample=False, **self.exactly(8))
        return self._ours("anabranch_compiled", self.compiled, prompt, n)

    def _ours(self, name: str, engine: ab.Engine, prompt: Prompt, n: int) -> Measured:
        # No clock among the processors: the engine runs a caller's own for one branch at a time, and tells its phases.
        def call(_: LogitsProcessorList) -> int:
            options = self.exactly(self.new_tokens)
            if n == 1:
                result = engine.generate(prompt.ids, do_sample=False, **options)
            else:
                strategy = ab.SelfConsistency(n=n, temperature=1.0, top_p=1.0, top_k=0)
                result = engine.generate(prompt.ids, strategy=strategy, **options)
            self.phases[name] = {k: round(v, 4) for k, v in result.metrics.seconds.items()}
            return result.metrics.sampled_tokens

        timed = _timed(call, n * self.new_tokens)
        return Measured(self.phases[name]["prefill"], timed.total)

    def generate(self, prompt: Prompt, n: int) -> Measured:
        ids = torch.tensor([prompt.ids])

        def call(clock: LogitsProcessorList) -> int:
            how = {"do_sample": False} if n == 1 else {**SAMPLING, "num_return_sequences": n}
            out = self.plain.generate(
                ids, attention_mask=torch.ones_like(ids), logits_processor=clock, **how, **self.exactly(self.new_tokens)
            )
            return out[:, ids.shape[1] :].numel()

        return _timed(call, n * self.new_tokens)

    def generate_reused(self, prompt: Prompt, n: int) -> Measured:
        """What a careful user writes: one prefill, its cache repeated n times, then a batch of n."""
        ids = torch.tensor([prompt.ids])

        def call(clock: LogitsProcessorList) -> int:
            cache = DynamicCache(config=self.plain.config)
            with torch.no_grad():
                self.plain(ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.batch_repeat_interleave(n)
            many = ids.repeat(n, 1)
            out = self.plain.generate(
                many,
                attention_mask=torch.ones_like(many),
                past_key_values=cache,
                logits_processor=clock,
                **SAMPLING,
                **self.exactly(self.new_tokens),
            )
            return out[:, ids.shape[1] :].numel()

        return _timed(call, n * self.new_tokens)

    def seconds_a_token(self) -> tuple[float, float]:
        """Rough prices of one prefilled token, ours and Transformers', for leaving out what would take too long."""
        ids = torch.randint(0, 1000, (1, 64))

        def plain() -> None:
            with torch.no_grad():
                self.plain(ids, logits_to_keep=1)

        def ours() -> None:
            self.engine.generate(ids[0].tolist(), do_sample=False, **self.exactly(1))

        prices = []
        for forward in (ours, plain):
            forward()
            start = now()
            forward()
            prices.append((now() - start) / 64)
        return prices[0], prices[1]

    def entry(self, name: str, prompt: Prompt, n: int, runs: list[Measured]) -> dict[str, object]:
        total = statistics.median(r.total for r in runs)
        prefill = statistics.median(r.prefill for r in runs)
        decode = statistics.median(r.total - r.prefill for r in runs)
        rates = [n * self.new_tokens / r.total for r in runs]
        return {
            "contender": name, "title": TITLES[name], "prompt": prompt.name, "prompt_tokens": len(prompt.ids),
            "n": n, "dtype": self.dtype, "new_tokens": self.new_tokens, "prefill_seconds": prefill,
            "decode_seconds": decode, "total_seconds": total, "rounds": len(runs),
            "decode_tokens_per_s": n * (self.new_tokens - 1) / decode,
            "total_tokens_per_s": n * self.new_tokens / total,
            "min_total_tokens_per_s": min(rates), "max_total_tokens_per_s": max(rates),
        }  # fmt: skip


def run(
    quick: bool,
    dtypes: list[str],
    peer: Path | None,
    rounds: int,
    only: str = "",
    patience: float = 600.0,
    branches: Sequence[int] = (16, 1),
    report: Callable[[str], None] = lambda _: None,
) -> Iterator[dict[str, object]]:
    """Every contender on every prompt, interleaved; one dict a line of the table.

    Args:
        peer: the Python of an environment with vLLM, or None.
        rounds: calls of each contender; a single one where a call takes over a quarter of `patience`.
        only: the name of a prompt ("short" or "long"); empty for both.
        branches: numbers of branches, each a line of the table.
        patience: seconds that one call may take by the estimate; above, the contender is left out with the reason.
    """
    new_tokens = 16 if quick else 60
    for dtype in dtypes:
        report(f"loading the model in {dtype}")
        bench = Bench(dtype, new_tokens)
        cases = [(p, n) for p in prompts(bench.tokenizer, quick) if only in ("", p.name) for n in branches]
        prices = bench.seconds_a_token()
        for prompt, n in cases:
            yield from _case(bench, prompt, n, rounds, prices, patience, report)
        if peer is not None:
            report(f"vLLM, {dtype}")
            yield from _vllm(bench, cases, peer, rounds)


def _case(bench: Bench, prompt: Prompt, n: int, rounds: int, prices: tuple[float, float], patience: float, report):
    contenders = {"anabranch": bench.ours, "anabranch_compiled": bench.ours_compiled, "generate": bench.generate}
    if n > 1:
        contenders["generate_reused"] = bench.generate_reused
    ours, plain = (len(prompt.ids) * price for price in prices)
    estimates = {"anabranch": ours, "anabranch_compiled": ours, "generate": n * plain, "generate_reused": plain}
    ready, left = {}, []
    for name, call in contenders.items():
        why = bench.compiled if name == "anabranch_compiled" and isinstance(bench.compiled, str) else ""
        if estimates[name] > patience:
            why = f"prefill alone would take about {estimates[name]:.0f} s here"
        if why:
            left.append({
                "contender": name, "title": TITLES[name], "prompt": prompt.name, "prompt_tokens": len(prompt.ids),
                "n": n, "dtype": bench.dtype, "left_out": why,
            })  # fmt: skip
        else:
            ready[name] = call
    runs: dict[str, list[Measured]] = {name: [] for name in ready}
    # One short call each, not counted: allocations, thread pools, plans.
    full, bench.new_tokens = bench.new_tokens, 2
    for name, call in ready.items():
        if estimates[name] < patience / 30:
            report(f"{bench.dtype}, {prompt.name} prompt, n = {n}: {name}, warming up")
            call(prompt, n)
    bench.new_tokens = full
    for r in range(rounds):
        for name, call in ready.items():
            if r and runs[name][0].total > patience / 4:
                continue
            report(f"{bench.dtype}, {prompt.name} prompt, n = {n}: {name}, round {r + 1}")
            runs[name].append(call(prompt, n))
    for name in ready:
        entry = bench.entry(name, prompt, n, runs[name])
        yield {**entry, "phases_wall_seconds": bench.phases[name]} if name in bench.phases else entry
    yield from left


def _vllm(bench: Bench, cases: list[tuple[Prompt, int]], peer: Path, rounds: int) -> Iterator[dict[str, object]]:
    """vLLM in its own process; the prefix is in its cache when decoding is timed, and its prefill is added once."""
    script = Path(__file__).with_name("peer_vllm.py")
    names = {p.name: p for p, _ in cases}
    counts = sorted({n for _, n in cases})
    folder = ab.models.path("smollm2")
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "prompts.json"
        file.write_text(json.dumps({name: p.ids for name, p in names.items()}))
        command = [
            str(peer),
            str(script),
            "--model",
            str(folder),
            "--prompt-ids",
            str(file),
            "--dtype",
            bench.dtype,
            "--new-tokens",
            str(bench.new_tokens),
            "--rounds",
            str(rounds),
            "--threads",
            str(torch.get_num_threads()),
            "--clock",
            clock_name(),
            "--n",
            *map(str, counts),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=plain(), timeout=1500)
            problem = done.stderr.strip().splitlines()[-1] if done.returncode and done.stderr.strip() else ""
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        except (OSError, subprocess.TimeoutExpired) as error:
            problem, lines = str(error).splitlines()[0], []
    if not lines:
        for prompt, n in cases:
            yield {
                "contender": "vllm",
                "title": TITLES["vllm"],
                "prompt": prompt.name,
                "n": n,
                "dtype": bench.dtype,
                "prompt_tokens": len(prompt.ids),
                "left_out": problem[:300] or "it printed no result",
            }
        return
    result = json.loads(lines[-1].removeprefix("RESULT "))
    for prompt, n in cases:
        found = [r for r in result["runs"] if r["prompt"] == prompt.name and r["n"] == n]
        # Prefill of the prompt alone, then the call with the prefix cached: decoding is all of it but its first step.
        runs = []
        for r in found:
            prefill = r["prefill_seconds"]
            runs.append(Measured(prefill + r["first_seconds"], prefill + r["cached_seconds"]))
        entry = bench.entry("vllm", prompt, n, runs)
        yield {**entry, "title": f"vLLM {result['vllm']}, CPU build", "vllm": result["vllm"]}
