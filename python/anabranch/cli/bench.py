"""``anabranch bench``: the benchmarks of a checkout, or a small measurement that an installed package can make."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from anabranch.cli.common import USAGE, Mistake, choose_dtype
from anabranch.viz.console import consoles, machine_note, plain_terminal

COMMANDS = ("attention", "e2e", "host", "all", "report")
ALLOWED = {"float32": 1e-5, "bfloat16": 1e-2}  # relative error against float64
HOW = "the full table: git clone the repository, then `python -m benchmarks` in it"


def checkout() -> Path | None:
    """The root of the checkout this package runs from, if it has benchmarks."""
    root = Path(__file__).resolve().parents[3]
    return root if (root / "benchmarks" / "__main__.py").is_file() else None


def run(quick: bool, builtin: bool, as_json: bool, arguments: list[str]) -> None:
    """The whole command."""
    root = None if builtin else checkout()
    if root is not None and not as_json:
        _full(root, quick, arguments)
        return
    if arguments:
        where = "with --builtin or --json" if checkout() else "in an installed package"
        given = " ".join(arguments)
        raise Mistake(f"{given}: the small measurement, {where}, takes --quick and --json alone; {HOW}", USAGE)
    out, _ = consoles()
    spinner = not as_json and not plain_terminal(out)
    with out.status("measuring …") if spinner else nullcontext():
        report = measure(quick)
    if as_json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        _show(report)


def _full(root: Path, quick: bool, arguments: list[str]) -> None:
    """Hand over to the checkout's own benchmarks; their exit code is ours."""
    import typer

    if not arguments or arguments[0] not in COMMANDS:
        arguments = ["all", *arguments]
    # The package that runs now, which need not be the checkout's.
    paths = filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "benchmarks", *arguments, *(["--quick"] if quick else [])]
    code = subprocess.run(command, cwd=root, env=environment, check=False).returncode
    if code:
        raise typer.Exit(code if code > 0 else 128 - code)


def predict(as_json: bool, arguments: list[str]) -> None:
    """What the model of the machine expects of the cuda backend; nothing is measured."""
    from dataclasses import asdict

    from anabranch.backends import cost_model as machine

    if arguments:
        raise Mistake(f"{' '.join(arguments)}: --predict takes --json alone", USAGE)
    rows: list[dict[str, Any]] = []
    for name, (nodes, tokens) in machine.TREES.items():
        unique = sum(n * t for n, t in zip(nodes, tokens, strict=True))
        for gpu in machine.GPUS.values():
            found = machine.predict(machine.plan_for(gpu, nodes, tokens), gpu, unique_tokens=unique)
            rows.append({"tree": name, **asdict(found), **asdict(machine.choose(gpu))})
    what = (
        "Predicted, not measured: one decode step of one layer, 32/8 heads of 128, bfloat16, captured graph, by the "
        "model in anabranch/machine.py, whose assumptions are written there. No GPU has confirmed any of it."
    )
    if as_json:
        print(json.dumps({"schema": "anabranch.predict", "version": 1, "what": what, "rows": rows}))
        return
    from rich.table import Table

    out, _ = consoles()
    table = Table(title="Predicted µs a layer (floor of bytes alone in brackets)")
    table.add_column("tree (nodes / tokens)")
    for gpu_name in machine.GPUS:
        table.add_column(gpu_name, justify="right")
    table.add_column("bound by (H100)")
    for name in machine.TREES:
        mine = [row for row in rows if row["tree"] == name]
        cells = [f"{row['total_us']:.1f} ({row['floor_us']:.1f})" for row in mine]
        table.add_row(name, *cells, next(row["bound"] for row in mine if row["gpu"] == "H100"))
    cuts = [machine.choose(gpu) for gpu in machine.GPUS.values()]
    table.add_section()
    table.add_row("chunk / split that follow", *(f"{cut.chunk} / {cut.parallelism}" for cut in cuts), "")
    out.print(table)
    out.print(what, style="dim")


def measure(quick: bool) -> dict[str, Any]:
    """One decode-like call: 16 branches of 128 tokens on a prefix of 4,096 (quick: 8 × 64 on 1,024), 32/8 heads of 128.

    Each branch's last row asks. Both sides are checked against float64, then timed in turns; seconds are medians.
    """
    import torch

    from anabranch import TreeCache, tree_attention

    dtype, _ = choose_dtype()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = str(dtype).removeprefix("torch.")
    branches, own, prefix = (8, 64, 1024) if quick else (16, 128, 4096)
    heads, kv_heads, dim = 32, 8, 128
    rng = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Any:
        return torch.randn(*shape, generator=rng).to(device, dtype)

    pages = (prefix + 2 * branches * (own + 32)) // 16 + 2 * branches
    cache = TreeCache(1, kv_heads, dim, num_pages=pages, page_size=16, dtype=dtype, device=device)
    trunk = cache.branch()
    step = cache.step({trunk: prefix})
    cache.write(0, values(prefix, kv_heads, dim), values(prefix, kv_heads, dim), step)
    kids = cache.fork(trunk, branches)
    step = cache.step({kid: own - 1 for kid in kids})
    rows = branches * (own - 1)
    cache.write(0, values(rows, kv_heads, dim), values(rows, kv_heads, dim), step)
    step = cache.step({kid: 1 for kid in kids})
    cache.write(0, values(branches, kv_heads, dim), values(branches, kv_heads, dim), step)
    q = values(branches, heads, dim)
    # What a cache without sharing holds: each branch's whole context, contiguous, ready for SDPA.
    dense = [tuple(x.transpose(0, 1).contiguous()[None] for x in cache.read(kid, 0)) for kid in kids]

    def tree() -> Any:
        return tree_attention(q, cache, 0, step)

    def each() -> Any:
        sdpa = torch.nn.functional.scaled_dot_product_attention
        parts = [sdpa(q[i : i + 1].transpose(0, 1)[None], k, v, enable_gqa=True) for i, (k, v) in enumerate(dense)]
        return torch.cat([p[0].transpose(0, 1) for p in parts])

    errors = {side: _error(call(), q, dense) for side, call in (("anabranch", tree), ("sdpa", each))}
    # SDPA's own error is the measure of what a type can hold, for a type whose limit nobody knows beforehand.
    if errors["anabranch"] > max(ALLOWED.get(name, 1e-2), 2 * errors["sdpa"]):
        raise RuntimeError(f"wrong result, not timed: relative error {errors['anabranch']:.1e} in {name}")
    times = _in_turns({"anabranch": tree, "sdpa": each}, rounds=5 if quick else 9)
    medians = {side: statistics.median(seconds) for side, seconds in times.items()}
    usage = cache.usage()
    return {
        "schema": "anabranch.bench",
        "version": 1,
        "shape": {
            "branches": branches, "tokens": own, "prefix": prefix, "heads": f"{heads}/{kv_heads}", "head_dim": dim,
            "dtype": name, "device": device,
        },
        "ratio": medians["sdpa"] / medians["anabranch"],
        "milliseconds": {
            side: {"median": 1e3 * medians[side], "min": 1e3 * min(seconds), "max": 1e3 * max(seconds)}
            for side, seconds in times.items()
        },
        "relative_error": errors,
        "tokens_logical": branches * (prefix + own),
        "tokens_physical": usage.tokens_physical,
        "machine": machine_note(),
        "more": HOW,
    }  # fmt: skip


def _error(out: Any, q: Any, dense: list[Any]) -> float:
    """Largest relative error of four rows, against float64."""
    import torch

    worst = 0.0
    for i in range(0, len(dense), max(1, len(dense) // 4)):
        k, v = (x[0].cpu().double() for x in dense[i])
        group = q.shape[1] // k.shape[0]
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        weights = (torch.einsum("hd,hkd->hk", q[i].cpu().double(), k) / q.shape[-1] ** 0.5).softmax(-1)
        want = torch.einsum("hk,hkd->hd", weights, v)
        worst = max(worst, float((out[i].cpu().double() - want).norm() / want.norm()))
    return worst


def _in_turns(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    import torch

    def timed(call: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    with torch.inference_mode():
        for call in calls.values():
            timed(call)
        times: dict[str, list[float]] = {side: [] for side in calls}
        for _ in range(rounds):
            for side, call in calls.items():
                times[side].append(timed(call))
    return times


def _show(report: dict[str, Any]) -> None:
    from rich.table import Table

    out, _ = consoles()
    s = report["shape"]
    out.print(
        f"{s['branches']} branches of {s['tokens']} tokens on a prefix of {s['prefix']:,}; {s['heads']} heads of "
        f"{s['head_dim']}, {s['dtype']}; one decode step"
    )
    table = Table.grid(padding=(0, 2))
    table.add_column()
    for _ in range(3):
        table.add_column(justify="right", no_wrap=True)
    table.add_row("", "[dim]median[/dim]", "[dim]min – max[/dim]", "[dim]relative error[/dim]")
    labels = {"anabranch": "anabranch, one call", "sdpa": "SDPA, branch by branch"}
    for side, t in report["milliseconds"].items():
        spread = f"{t['min']:.2f} – {t['max']:.2f}"
        table.add_row(labels[side], f"{t['median']:.2f} ms", spread, f"{report['relative_error'][side]:.1e}")
    out.print(table)
    held = f"{report['tokens_physical']:,} instead of {report['tokens_logical']:,}"
    out.print(f"\n[bold]{report['ratio']:.1f}×[/bold] as fast as SDPA; tokens in memory: {held}")
    out.print(f"\n{report['machine']}\n{report['more']}", style="dim", markup=False)
