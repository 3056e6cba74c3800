"""The benchmark table on a GPU: ``python tests/gpu/bench.py [--json FILE] [--seconds N]``.

Every case of benchmarks/shapes.py (node counts per level / tokens per node), bfloat16, 32/8 heads of 128 unless said,
one layer's attention of one decode step. Per contender:

- ``eager``: launched from Python, from an idle GPU; ``graph``: a captured CUDA graph of several layers, replayed, per
  layer. Each layer has its own K and V and L2 is flushed before each run, so every read comes from memory.
- ``plan``: what is paid once a topology, shared by all layers. ``(plan + run) ÷ layers`` = plan ÷ 32 + eager: a step
  whose topology is new, in a model of 32 layers.
- floor: max(bytes of unique K, V, q and out ÷ copy bandwidth, FLOPs ÷ bf16 rate), both measured in this run.

Every result is checked against float64 before it is timed. What does not run says why. Results are written after each
case, so a run that is stopped leaves what it has. ``--device cpu --tiny`` goes the same way without a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]
sys.path.append(str(Path(__file__).resolve().parents[2] / "python"))

import contenders  # noqa: E402
from benchmarks.shapes import Case, all_cases, draft, levels, parse_heads  # noqa: E402
from benchmarks.workload import TOLERANCE  # noqa: E402
from contenders import Ready, Unfit, synchronize  # noqa: E402
from problem import MOST_LAYERS, Problem  # noqa: E402

LAYERS = 32  # of the model that (plan + run) ÷ layers speaks of
SWEEP = ("32/32", "64/8", "16/8", "16/1")
FLEX_SECONDS = 40.0  # compiling goes on for seconds a shape: no new one after that many
CORE = ("tree", "headline", "no sharing", "chain")  # groups of the first rows


class Clock:
    """µs a layer, with cold caches: the median of up to thirty runs within about a third of a second."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.on_gpu = torch.device(device).type == "cuda"
        self.flush = torch.empty((256 if self.on_gpu else 4) << 20, dtype=torch.int8, device=device)

    def _once(self, work: Callable[[], object], idle: bool) -> float:
        self.flush.zero_()
        if not self.on_gpu:
            start = time.perf_counter()
            work()
            return (time.perf_counter() - start) * 1e6
        if idle:  # the host's own time shows; without, launches queue behind the flush and only the GPU's is seen
            torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) * 1e3

    def run(self, work: Callable[[], object], idle: bool = False, best: bool = False) -> float:
        work()
        first = self._once(work, idle)
        most = 30 if self.on_gpu else 3
        times = [self._once(work, idle) for _ in range(int(min(most, max(3, 3e5 // max(first, 1.0)))))]
        return min(times) if best else statistics.median(times)

    def eager(self, attend: Callable[[int], object], layers: int) -> float:
        def work() -> None:
            for layer in range(layers):
                attend(layer)

        return self.run(work, idle=True) / layers

    def graph(self, attend: Callable[[int], object], layers: int) -> float:
        """Raises what the capture raises."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            attend(0)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for layer in range(layers):
                attend(layer)
        return self.run(graph.replay) / layers


def ceilings(clock: Clock, dtype: torch.dtype = torch.bfloat16) -> dict[str, float]:
    """Copy bandwidth (bytes read and written, TB/s) and dense rate (TFLOP/s) of this device: the best of many runs."""
    size, n = (2**30, 8192) if clock.on_gpu else (2**24, 256)
    x = torch.zeros(size, dtype=torch.int8, device=clock.device)
    y = torch.empty_like(x)
    bandwidth = 2 * size / clock.run(lambda: y.copy_(x), best=True) / 1e6
    a = torch.randn(n, n, device=clock.device).to(dtype)
    rate = 2 * n**3 / clock.run(lambda: a @ a, best=True) / 1e6
    return {"copy_TB_s": bandwidth, "bf16_TFLOP_s": rate}


def quick_contenders(backends: tuple[str, ...]) -> dict[str, Callable[[Problem], Ready]]:
    """Ours first; then those that need no compiler of their own."""
    found = {name: contenders.ours(name) for name in backends}
    found |= {f"flat {name}": contenders.flat(name) for name in backends}
    return found | {"sdpa": contenders.sdpa}


SLOW: dict[str, Callable[[Problem], Ready]] = {
    "flashinfer cascade": contenders.flashinfer_cascade,
    "flashinfer decode": contenders.flashinfer_decode,
    "flex": contenders.flex,
}


def measure(p: Problem, prepare: Callable[[Problem], Ready], clock: Clock, want: torch.Tensor) -> dict[str, Any]:
    """One contender on one case; a reason instead of times where it does not run or computes something else."""
    try:
        ready = prepare(p)
        got = ready.attend(0)[p.sampled()].double()
        error = float((got - want).norm() / want.norm())
        if not error <= TOLERANCE[p.dtype]:
            return {"left_out": f"wrong: relative error {error:.1e} against float64", "wrong": True}
        eager = clock.eager(ready.attend, p.layers)
        row: dict[str, Any] = dict(
            plan_us=ready.plan_us, eager_us=eager, graph_us=None, step_us=ready.plan_us / LAYERS + eager,
            relative_error=error, note=ready.note,
        )  # fmt: skip
    except Unfit as reason:
        return {"left_out": str(reason)}
    except Exception as error:
        return {"left_out": f"{type(error).__name__}: {str(error).strip()[:300]}", "failed": True}
    if clock.on_gpu:
        try:
            row["graph_us"] = clock.graph(ready.attend, p.layers)
        except Exception as error:
            row["graph_error"] = f"not captured: {type(error).__name__}: {str(error).strip()[:200]}"
            synchronize(p.device)
    return row


def jobs(tiny: bool) -> list[tuple[Case, str]]:
    """(case, heads) in order of importance: the time may not do for all."""
    if tiny:
        some = [levels("tiny 1,4 / 32,8", [1, 4], [32, 8]), draft("tiny draft", 12, 5)]
        return [(some[0], "4/2"), (some[1], "2/2")]
    cases = all_cases()
    first = [case for case in cases if case.group in CORE]
    order = first + [case for case in cases if case.group not in CORE]
    sweep = [case for case in cases if case.name in ("1,16,64 / 1024,256,32", "few-shot 1,10 / 4000,400")]
    heads = [(case, shape) for case in sweep for shape in SWEEP]
    return [(case, "32/8") for case in first] + heads + [(case, "32/8") for case in order[len(first) :]]


def run(
    device: str = "cuda",
    backends: tuple[str, ...] = ("triton", "cuda"),
    seconds: float = 150.0,
    tiny: bool = False,
    save: Callable[[dict[str, Any]], None] = lambda _: None,
    slow: dict[str, Callable[[Problem], Ready]] | None = None,
) -> dict[str, Any]:
    """The whole table, as far as ``seconds`` go; ``save`` gets it after each case."""
    end = time.perf_counter() + seconds
    if slow is None:  # compiled for a CPU, FlexAttention takes a minute and tells nothing
        slow = {name: prepare for name, prepare in SLOW.items() if name != "flex" or device != "cpu"}
    clock = Clock(device)
    head_dim, dtype = (32, torch.float32) if tiny else (128, torch.bfloat16)
    result: dict[str, Any] = dict(
        device=name_of(device), layers=LAYERS, dtype=str(dtype).removeprefix("torch."), ours=list(backends),
        **ceilings(clock, dtype), cases=[],
    )  # fmt: skip
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    flex_left = FLEX_SECONDS

    def problems() -> Iterator[tuple[dict[str, Any], Problem, torch.Tensor]]:
        for case, heads in jobs(tiny):
            if time.perf_counter() > end:
                return
            row = rows.get((case.name, heads))
            q_heads, kv_heads = parse_heads(heads)
            try:
                p = Problem(case, q_heads, kv_heads, head_dim, dtype, device, most_layers=2 if tiny else MOST_LAYERS)
                want = p.oracle(p.sampled())
            except Exception as error:  # memory, as a rule
                if row is None:
                    rows[case.name, heads] = row = dict(case=case.name, heads=heads, contenders={})
                    row["error"] = f"{type(error).__name__}: {str(error).strip()[:300]}"
                    result["cases"].append(row)
                continue
            if row is None:
                moved = p.moved_bytes() / result["copy_TB_s"] / 1e6
                computed = p.flops() / result["bf16_TFLOP_s"] / 1e6
                row = rows[case.name, heads] = dict(
                    case=case.name, group=case.group, heads=heads, head_dim=head_dim, rows=len(case.rows),
                    page_size=p.page_size, pools=p.layers, unique_tokens=case.unique_tokens,
                    logical_tokens=case.logical_tokens, floor_us=max(moved, computed),
                    bound="memory" if moved >= computed else "compute", contenders={},
                )  # fmt: skip
                result["cases"].append(row)
            yield row, p, want
            del p, want
            if clock.on_gpu:
                torch.cuda.empty_cache()
            save(result)

    for row, p, want in problems():
        for name, prepare in quick_contenders(backends).items():
            row["contenders"][name] = measure(p, prepare, clock, want)
        print(json.dumps(row), flush=True)
    for row, p, want in problems():
        for name, prepare in slow.items():
            if name == "flex" and flex_left <= 0:
                row["contenders"][name] = {"left_out": f"compiles for seconds a shape: {FLEX_SECONDS:.0f} s in all"}
                continue
            begin = time.perf_counter()
            row["contenders"][name] = measure(p, prepare, clock, want)
            flex_left -= (time.perf_counter() - begin) * (name == "flex")
    done = {(row["case"], row["heads"]) for row in result["cases"]}
    result["not_reached"] = [f"{case.name} ({heads})" for case, heads in jobs(tiny) if (case.name, heads) not in done]
    save(result)
    return result


def name_of(device: str) -> str:
    return torch.cuda.get_device_name() if torch.device(device).type == "cuda" else "CPU: the times mean nothing"


def time_of(entry: dict[str, Any] | None, planned: bool) -> float | None:
    """µs a layer: a replay's (or where nothing was captured, eager), or a step's with its planning."""
    if not entry or "left_out" in entry:
        return None
    return entry["step_us"] if planned else entry["graph_us"] or entry["eager_us"]


def best(row: dict[str, Any], names: list[str], planned: bool) -> tuple[str, float] | None:
    times = {n: t for n in names if (t := time_of(row["contenders"].get(n), planned)) is not None}
    return min(times.items(), key=lambda item: item[1]) if times else None


def _us(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def markdown(result: dict[str, Any]) -> str:
    """Ours against the floor and the best peer; all peers; what is missing, and why."""
    mine = result["ours"]
    peers = [name for name in (*quick_contenders(tuple(mine)), *SLOW) if name not in mine]
    lines = [
        f"{result['device']}: copy {result['copy_TB_s']:.2f} TB/s, {result['dtype']} {result['bf16_TFLOP_s']:.0f} "
        f"TFLOP/s, both measured. µs a layer, medians, cold L2; step = plan ÷ {result['layers']} + eager; the floor's "
        "share and the first × compare replays of a captured graph, the second × steps. × is the best peer's time ÷ "
        "ours.",
        "", "| tree (nodes / tokens) | heads | backend | plan | eager | graph | step | floor | % of floor "
        "| best peer | × | best peer, planned | × |", "|---" * 13 + "|",
    ]  # fmt: skip
    for row in result["cases"]:
        if "error" in row:
            lines.append(f"| {row['case']} | {row['heads']} | **failed**: {row['error']} " + "| " * 10 + "|")
            continue
        for name in mine:
            entry = row["contenders"].get(name)
            if entry is None:
                continue
            start = f"| {row['case']} | {row['heads']} | {name} | "
            if "left_out" in entry:
                lines.append(start + f"**none**: {entry['left_out']} " + "| " * 9 + "|")
                continue
            cells = [_us(entry[f"{key}_us"]) for key in ("plan", "eager", "graph", "step")]
            now = time_of(entry, False) or 1.0
            cells += [_us(row["floor_us"]), f"{row['floor_us'] / now:.0%}"]
            for planned in (False, True):
                peer, own = best(row, peers, planned), time_of(entry, planned)
                cells += [f"{peer[0]} {_us(peer[1])}", f"{peer[1] / own:.2f}"] if peer and own else ["–", "–"]
            lines.append(start + " | ".join(cells) + " |")
    entries = [row["contenders"] for row in result["cases"]]
    shown = [name for name in (*mine, *peers) if any(time_of(found.get(name), False) for found in entries)]
    if shown:
        lines += ["", "Every contender, µs a layer: graph (step).", "", f"| tree | heads | {' | '.join(shown)} |"]
        lines.append("|---|---|" + "---|" * len(shown))
    for row in result["cases"]:
        cells = []
        for name in shown:
            entry = row["contenders"].get(name)
            now, step = time_of(entry, False), time_of(entry, True)
            cells.append("–" if now is None else f"{_us(now)} ({_us(step)})")
        if cells:
            lines.append(f"| {row['case']} | {row['heads']} | {' | '.join(cells)} |")
    lines += ["", "Left out:"]
    reasons: dict[str, list[str]] = {}
    for row in result["cases"]:
        for name, entry in row["contenders"].items():
            for key in ("left_out", "graph_error"):
                if key in entry:
                    reasons.setdefault(f"{name}: {entry[key]}", []).append(f"{row['case']} {row['heads']}")
    lines += [f"- {why} ({where[0] if len(where) == 1 else f'{len(where)} cases'})" for why, where in reasons.items()]
    lines += [f"- not reached in time: {name}" for name in result.get("not_reached", [])]
    return "\n".join(lines) + "\n"


def failures(result: dict[str, Any]) -> list[str]:
    """Cases of ours that failed or were wrong."""
    found = [f"{row['case']} {row['heads']}: {row['error']}" for row in result["cases"] if "error" in row]
    for row in result["cases"]:
        for name in result["ours"]:
            entry = row["contenders"].get(name, {})
            if "failed" in entry or "wrong" in entry or "graph_error" in entry:
                found.append(f"{row['case']} {row['heads']} {name}: {entry.get('left_out') or entry['graph_error']}")
    return found


def write(path: Path, result: dict[str, Any]) -> None:
    """All or nothing: a reader never sees half a file."""
    scratch = path.with_suffix(".writing")
    scratch.write_text(json.dumps(result, indent=1) + "\n")
    scratch.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the result here, after every case")
    parser.add_argument("--seconds", type=float, default=150.0, help="no new case after that many (default: 150)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backends", nargs="*", default=["triton", "cuda"], help="ours (default: triton cuda)")
    parser.add_argument("--tiny", action="store_true", help="two small cases in float32: does it run at all?")
    args = parser.parse_args()
    save = (lambda result: write(args.json, result)) if args.json else (lambda result: None)
    found = run(args.device, tuple(args.backends), args.seconds, args.tiny, save)
    print(markdown(found))
    return int(bool(failures(found)))


if __name__ == "__main__":
    sys.exit(main())
