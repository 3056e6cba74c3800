"""Where a decode step's time goes, by rows, beside the floor: SmolLM2, eager and compiled.

A step of n branches that share a trunk is planned, its forward runs, a token is sampled per branch. The engine tells
these phases itself. Of the forward, the linear layers and the attention of all layers (with the KV write) are measured
alone, on as many rows and the same context; "other" is what is left: norms, rotary embedding, activation, residuals and
everything between them. The floor is the larger of bytes ÷ bandwidth (every weight once, the KV that exists once) and
operations ÷ rate (of the linear layers), both measured in the same run.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

import anabranch as ab
from anabranch.runner.linear import linear_context

from .e2e import QUESTION
from .floor import Floor
from .timing import now

ROWS = (1, 16, 64)
WARM_TOKENS = 6  # of the first call: compile=True compiles after its third step
RECORDED_TOKENS = 10  # of the first call of so many rows: a kind of step is recorded at its eighth, then replayed


class Bench:
    """One model, an engine that runs it as it is and one that compiles it."""

    def __init__(self, model: Any, prompt: list[int], new_tokens: int) -> None:
        self.model, self.prompt, self.new_tokens, self.dtype = model, prompt, new_tokens, model.dtype
        self.engines: dict[str, ab.Engine] = {}
        self.left_out: dict[str, str] = {}
        for name, compiled in (("eager", False), ("compiled", True)):
            try:
                self.engines[name] = ab.Engine(model, num_pages=1024, prefix_cache=False, compile=compiled)
            except ValueError as error:  # no compiler
                self.left_out[name] = str(error)
        for engine in self.engines.values():
            for rows in (2, 1):
                self._generate(engine, rows, WARM_TOKENS)

    def _generate(self, engine: ab.Engine, rows: int, tokens: int) -> ab.Result:
        return engine.generate(
            self.prompt, strategy=ab.SelfConsistency(n=rows, temperature=1.0, top_p=1.0, top_k=0),
            min_new_tokens=tokens, max_new_tokens=tokens,
        )  # fmt: skip

    def warm(self, rows: int) -> None:
        """Bring all engines to where they are after some steps of so many rows."""
        for engine in self.engines.values():
            self._generate(engine, rows, RECORDED_TOKENS)

    def phases(self, name: str, rows: int) -> dict[str, float]:
        """Seconds of a decode step by the engine's phases, and "all"; the prompt's prefill is left out."""
        start = now()
        metrics = self._generate(self.engines[name], rows, self.new_tokens).metrics
        whole, steps = now() - start, self.new_tokens - 1  # the first token comes of the prefill
        spent = {phase: metrics.seconds.get(phase, 0.0) / steps for phase in ("decode", "plan", "strategy", "sampling")}
        return spent | {"all": (whole - metrics.seconds.get("prefill", 0.0)) / steps}

    def linear_layers(self, rows: int) -> Callable[[], float]:
        """Seconds of all linear layers, one after another, on `rows` rows."""
        layers = [m for m in self.model.modules() if isinstance(m, nn.Linear)]
        inputs = {m.in_features: torch.randn(rows, m.in_features).to(self.dtype) for m in layers}
        context = linear_context(self.model)

        def call() -> float:
            with torch.inference_mode(), context:
                start = now()
                for layer in layers:
                    layer(inputs[layer.in_features])
                return now() - start

        return call

    def attention(self, rows: int) -> Callable[[], float]:
        """Seconds of the KV write and the attention of all layers, for a step of `rows` branches that have half of what
        is written behind them; each call makes a step anew and takes it back."""
        cache = ab.TreeCache.for_model(self.model, num_pages=1024)
        config = self.model.config

        def run(counts: dict[ab.Branch, int]) -> float:
            step = cache.step(counts)
            q = torch.randn(step.num_rows, config.num_attention_heads, cache.head_dim).to(self.dtype)
            k = torch.randn(step.num_rows, cache.num_kv_heads, cache.head_dim).to(self.dtype)
            start = now()
            for layer in range(cache.num_layers):
                cache.write(layer, k, k, step)
                ab.tree_attention(q, cache, layer, step)
            return now() - start

        trunk = cache.branch()
        run({trunk: len(self.prompt)})
        branches = cache.fork(trunk, rows)
        run(dict.fromkeys(branches, self.new_tokens // 2))
        lengths = {branch: branch.length for branch in branches}

        @torch.inference_mode()
        def call() -> float:
            seconds = run(dict.fromkeys(branches, 1))
            for branch, length in lengths.items():
                cache.truncate(branch, length)
            return seconds

        return call

    def floor(self, floor: Floor, rows: int) -> tuple[float, str]:
        weights = {p.data_ptr(): p for m in self.model.modules() if isinstance(m, nn.Linear) for p in m.parameters()}
        numbers = sum(p.numel() for p in weights.values())
        config, size = self.model.config, self.dtype.itemsize
        tokens = len(self.prompt) + rows * self.new_tokens // 2
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kv = 2 * tokens * config.num_hidden_layers * config.num_key_value_heads * head_dim
        return floor.seconds((numbers + kv) * size, 2 * numbers * rows, self.dtype)


def run(
    quick: bool, dtype: str, rounds: int, floor: Floor, report: Callable[[str], None] = lambda _: None
) -> Iterator[dict[str, Any]]:
    """One dict per number of rows and way to run the forward; microseconds, medians of interleaved rounds."""
    report(f"loading and compiling the model in {dtype}")
    model, tokenizer = ab.models.load("smollm2", dtype=getattr(torch, dtype), device="cpu")
    yield from steps_of(Bench(model, tokenizer(QUESTION).input_ids, 8 if quick else 32), ROWS, rounds, floor, report)


def steps_of(
    bench: Bench, numbers: Sequence[int], rounds: int, floor: Floor, report: Callable[[str], None] = lambda _: None
) -> Iterator[dict[str, Any]]:
    """The dicts of `run` for one model and these numbers of rows."""
    for rows in numbers:
        parts = {"linear": bench.linear_layers(rows), "attention": bench.attention(rows)}
        bench.warm(rows)
        for call in parts.values():
            call()
        phases: dict[str, list[dict[str, float]]] = {name: [] for name in bench.engines}
        alone: dict[str, list[float]] = {name: [] for name in parts}
        for turn in range(rounds):
            report(f"{rows} rows, round {turn + 1} of {rounds}")
            for name in phases:
                phases[name].append(bench.phases(name, rows))
            for name, call in parts.items():
                alone[name].append(call())
        least, bound = bench.floor(floor, rows)
        kind = {"dtype": str(bench.dtype).removeprefix("torch."), "rows": rows}
        for name, seen in phases.items():
            found = {phase: statistics.median(p[phase] for p in seen) for phase in seen[0]}
            found |= {part: statistics.median(times) for part, times in alone.items()}
            found["other"] = max(0.0, found["decode"] - found["linear"] - found["attention"])
            yield {
                "contender": name, **kind, "rounds": rounds, "bound": bound, "floor_us": round(least * 1e6, 1),
                "compiled": bool(bench.engines[name].compiled), "of_floor": round(found["all"] / least, 2),
                **{f"{phase}_us": round(seconds * 1e6, 1) for phase, seconds in found.items()},
            }  # fmt: skip
        for name, reason in bench.left_out.items():
            yield {"contender": name, **kind, "left_out": reason}
