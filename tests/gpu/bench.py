"""A small benchmark of the triton and cuda backends on this GPU: ``python tests/gpu/bench.py [--json FILE]``.

For each tree: one decode step of attention (a row a leaf), cold L2, the median of many. ``eager`` launches from Python,
``graph`` replays a captured CUDA graph; the plan is made once and timed apart. The floor is what the memory and the
tensor cores allow, measured in the same run: max(bytes of unique K, V, q and out ÷ copy bandwidth, FLOPs ÷ bf16 rate).
``sdpa`` is torch's scaled_dot_product_attention over every leaf's own dense copy of its context (no sharing).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

PAGE = 8
# name: (nodes a level, tokens a node)
TREES = {
    "few-shot 1,10 / 4000,400": ((1, 10), (4000, 400)),
    "1,256 / 256,32": ((1, 256), (256, 32)),
    "1,16,64 / 1024,256,32": ((1, 16, 64), (1024, 256, 32)),
    "1,4,16,512 / 1024,256,128,32": ((1, 4, 16, 512), (1024, 256, 128, 32)),
    "1,1024 / 2048,32": ((1, 1024), (2048, 32)),
    "deep 1,2,…,128,1024 / 16 each": ((1, 2, 4, 8, 16, 32, 64, 128, 1024), (16,) * 9),
    "1,8,512 / 32,2048,256": ((1, 8, 512), (32, 2048, 256)),
    "forest 8,16,32,256 / 512,512,256,32": ((8, 16, 32, 256), (512, 512, 256, 32)),
    "no sharing 256 / 4096": ((256,), (4096,)),
    "one chain 1 / 32768": ((1,), (32768,)),
    "one query 1 / 512": ((1,), (512,)),
}
SDPA_LIMIT = 12 * 2**30  # bytes of dense K and V that the unshared baseline may take


def block_tables(nodes: tuple[int, ...], tokens: tuple[int, ...]) -> tuple[torch.Tensor, int]:
    """Tables [leaves, pages] of a regular tree whose nodes own whole pages, and the number of pages."""
    page, above = 0, [[] for _ in range(nodes[0])]
    for level, (count, length) in enumerate(zip(nodes, tokens, strict=True)):
        parents = above if level == 0 else [above[i * len(above) // count] for i in range(count)]
        above = []
        for parent in parents:
            above.append(parent + list(range(page, page + length // PAGE)))
            page += length // PAGE
    return torch.tensor(above, dtype=torch.int32), page


class Timer:
    """Median GPU time in µs, with L2 flushed before each run."""

    def __init__(self) -> None:
        self.flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")

    def __call__(self, work: Any, runs: int = 30) -> float:
        for _ in range(3):
            work()
        times = []
        for _ in range(runs):
            self.flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) * 1e3)
        return statistics.median(times)


def ceilings(timer: Timer) -> dict[str, float]:
    """Copy bandwidth (bytes read and written, TB/s) and dense bf16 rate (TFLOP/s) of this GPU."""
    x = torch.empty(2**30, dtype=torch.int8, device="cuda").random_()
    y = torch.empty_like(x)
    bandwidth = 2 * x.numel() / timer(lambda: y.copy_(x)) / 1e6
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    rate = 2 * 8192**3 / timer(lambda: a @ a) / 1e6
    return {"copy_TB_s": bandwidth, "bf16_TFLOP_s": rate}


def measure(
    name: str,
    timer: Timer,
    ceiling: dict[str, float],
    num_q_heads: int = 32,
    num_kv_heads: int = 8,
    head_dim: int = 128,
    backend_name: str = "triton",
) -> dict[str, Any]:
    """One tree on one backend: times in µs, and its share of the floor."""
    import anabranch as ab
    from anabranch import backends

    backend = backends.choose(backend_name, torch.device("cuda"), torch.bfloat16, head_dim)

    nodes, tokens = TREES[name]
    tables, pages = block_tables(nodes, tokens)
    length = tables.shape[1] * PAGE
    leaves = tables.shape[0]
    lengths = [length] * leaves
    shape = (pages, PAGE, num_kv_heads, head_dim)
    k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    q = torch.randn(leaves, num_q_heads, head_dim, device="cuda", dtype=torch.bfloat16)
    profile = backend.profile(num_q_heads, num_kv_heads, head_dim, q.dtype, q.device)
    tables_cuda = tables.cuda()

    def make_plan() -> Any:
        plan = ab.Plan.from_block_tables(tables, lengths, PAGE)
        plan.check(0, k)
        return plan, plan.arrays(num_q_heads // num_kv_heads, profile)  # which the backend asks for again, and finds

    plan_times = []
    for _ in range(5):
        begin = time.perf_counter()
        plan, arrays = make_plan()
        torch.cuda.synchronize()
        plan_times.append((time.perf_counter() - begin) * 1e6)

    scale = head_dim**-0.5

    def attend() -> Any:
        return backend.attention(q, k, v, plan, scale=scale, softcap=None, window=None, sinks=None, return_lse=False)

    out = ab.paged_tree_attention(q, k, v, plan, backend=backend_name)
    eager = timer(attend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend()
    captured = timer(graph.replay)

    unique = pages * PAGE
    moved = 2 * unique * num_kv_heads * head_dim * 2 + 2 * q.numel() * 2
    flops = 4 * leaves * length * num_q_heads * head_dim
    floor = max(moved / ceiling["copy_TB_s"] / 1e6, flops / ceiling["bf16_TFLOP_s"] / 1e6)
    row: dict[str, Any] = dict(
        case=name, backend=backend_name, heads=f"{num_q_heads}/{num_kv_heads}", head_dim=head_dim, unique_tokens=unique,
        logical_tokens=leaves * length, items=arrays.num_items, partials=arrays.num_partials,
        plan_us=statistics.median(plan_times), eager_us=eager, graph_us=captured, floor_us=floor,
        share_of_floor=floor / captured, sdpa_us=None, sdpa_error=None,
    )  # fmt: skip
    if 2 * leaves * length * num_kv_heads * head_dim * 2 <= SDPA_LIMIT:
        dense_k, dense_v = (
            x[tables_cuda.long()].reshape(leaves, length, num_kv_heads, head_dim).transpose(1, 2).contiguous()
            for x in (k, v)
        )

        def sdpa() -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(
                q[:, :, None], dense_k, dense_v, scale=scale, enable_gqa=True
            )

        want = sdpa()[:, :, 0].float()
        row["sdpa_error"] = float((out.float() - want).norm() / want.norm())
        row["sdpa_us"] = timer(sdpa)
    return row


def run() -> dict[str, Any]:
    """All trees; one that fails is reported with its error and the others still run."""
    timer = Timer()
    properties = torch.cuda.get_device_properties(0)
    ceiling = ceilings(timer)
    rows: list[dict[str, Any]] = []
    work: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in TREES]
    for heads in ((32, 32), (64, 8), (16, 8), (16, 1)):
        work.append(("1,16,64 / 1024,256,32", dict(num_q_heads=heads[0], num_kv_heads=heads[1])))
    for name, shape in [(name, shape | dict(backend_name=b)) for name, shape in work for b in ("triton", "cuda")]:
        try:
            rows.append(measure(name, timer, ceiling, **shape))
        except Exception as error:
            rows.append(dict(case=name, **shape, error=f"{type(error).__name__}: {str(error)[:500]}"))
        torch.cuda.empty_cache()
        print(json.dumps(rows[-1]), flush=True)
    return dict(gpu=properties.name, multiprocessors=properties.multi_processor_count, **ceiling, cases=rows)


def markdown(result: dict[str, Any]) -> str:
    lines = [
        f"{result['gpu']}: copy {result['copy_TB_s']:.2f} TB/s, bf16 {result['bf16_TFLOP_s']:.0f} TFLOP/s. "
        "Times in µs, cold L2, medians; bf16.",
        "",
        "| tree (nodes / tokens) | backend | heads | plan | eager | graph | floor | floor ÷ graph | SDPA alone | ÷ |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["cases"]:
        if "error" in row:
            lines.append(f"| {row['case']} | {row['backend_name']} | **failed**: {row['error']} | | | | | | | |")
            continue
        sdpa = ("–", "–")
        if row["sdpa_us"]:
            sdpa = (f"{row['sdpa_us']:.0f}", f"{row['sdpa_us'] / row['graph_us']:.1f}×")
        lines.append(
            f"| {row['case']} | {row['backend']} | {row['heads']} | {row['plan_us']:.0f} | {row['eager_us']:.1f} | "
            f"{row['graph_us']:.1f} | {row['floor_us']:.1f} | {row['share_of_floor']:.0%} | {sdpa[0]} | {sdpa[1]} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="also write the result here")
    args = parser.parse_args()
    found = run()
    print(markdown(found))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(found, file, indent=1)
