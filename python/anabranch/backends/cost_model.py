"""A small model of GPUs: what a plan should take on one, from bytes, operations, launches and occupancy.

It follows the cuda backend's kernels: every (item × KV head) is a unit; resident blocks take the units, costliest
first, back and forth (csrc/cuda/attention.cuh); a unit waits for memory once and then streams. Nothing here was fitted
to a measurement, because there is none yet: predictions are for comparing shapes, chunks and splits, and are never
shown as measurements. ``anabranch bench --predict`` prints them.

The GPU backends take their chunk and their split from it (``cut_for``): from the device's name and its number of
multiprocessors, once a head shape, so the same for every call on a device. A GPU that is not in ``KNOWN`` gets the
defaults; a chunk given to a backend's ``tile_config`` goes before both.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from anabranch.plan.arrays import PlanArrays
from anabranch.plan.plan import Plan
from anabranch.plan.tile_config import TileConfig

__all__ = [
    "GPUS",
    "TREES",
    "Cut",
    "Gpu",
    "Prediction",
    "block_tables",
    "choose",
    "cut_for",
    "gpu_of",
    "plan_for",
    "predict",
]


@dataclass(frozen=True)
class Gpu:
    """One GPU, from its data sheet; what is assumed beyond it is said beside the figure."""

    name: str
    multiprocessors: int
    memory_TB_s: float  # data sheet
    bf16_TFLOP_s: float  # dense, data sheet
    blocks: int  # of the attention kernel a multiprocessor at head_dim 128 (benchmarks/results/cuda_resources.md)


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 108, 2.04, 312, 2),
        Gpu("H100", 132, 3.35, 989, 2),
        Gpu("H200", 132, 4.8, 989, 2),
        Gpu("B200", 148, 8.0, 2250, 2),
    )
}

# Part of a device's name as the driver gives it → which of the above, and its memory in TB/s where that differs (data
# sheets). The first that fits decides.
KNOWN: tuple[tuple[str, str, float | None], ...] = (
    ("A100-SXM4-40GB", "A100", 1.555),
    ("A100-PCIE-40GB", "A100", 1.555),
    ("A100 80GB PCIe", "A100", 1.935),
    ("A100", "A100", None),
    ("H100 PCIe", "H100", 2.0),
    ("H100 NVL", "H100", 3.9),
    ("H100", "H100", None),
    ("H200", "H200", None),
    ("B200", "B200", None),
)

# Assumptions, not measurements.
REACHED = 0.9  # of the data sheet's bandwidth, by a kernel that only streams
MMA_SYNC = 0.3  # of the data sheet's rate, by mma.sync with these tiles (later GPUs reach their peak by other means)
LATENCY_US = 0.8  # one read from memory
CHAIN = 3  # reads that wait for each other before a unit streams: item, slots, first tile
IN_FLIGHT = 48 * 1024  # bytes a block has on their way: three tiles of 64 tokens at head_dim 128
LAUNCH_US = {"eager": 4.0, "graph": 1.2}  # a launch, when launches follow one another

# name: (nodes a level, tokens a node); one query row a leaf
TREES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "few-shot 1,10 / 4000,400": ((1, 10), (4000, 400)),
    "1,256 / 256,32": ((1, 256), (256, 32)),
    "1,16,64 / 1024,256,32": ((1, 16, 64), (1024, 256, 32)),
    "1,4,16,512 / 1024,256,128,32": ((1, 4, 16, 512), (1024, 256, 128, 32)),
    "1,1024 / 2048,32": ((1, 1024), (2048, 32)),
    "1,8,512 / 32,2048,256": ((1, 8, 512), (32, 2048, 256)),
    "no sharing 256 / 4096": ((256,), (4096,)),
    "one chain 1 / 32768": ((1,), (32768,)),
    "one query 1 / 512": ((1,), (512,)),
}
PAGE = 8

# What `choose` weighs: chunks in tokens, and blocks a multiprocessor that a long run should at least be split for.
CHUNKS = (128, 256, 512)
WAVES = (1, 2, 4)
DEFAULT_CHUNK = 256  # K and V of one chunk are some 4 µs of one multiprocessor's share of the memory bandwidth
DEFAULT_WAVES = 2
REFERENCE: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    TREES["few-shot 1,10 / 4000,400"],
    TREES["1,16,64 / 1024,256,32"],
    TREES["one chain 1 / 32768"],
    ((16,), (4096,)),
)


@dataclass(frozen=True)
class Cut:
    """How long runs of tokens are cut: ``TileConfig.chunk`` and ``TileConfig.parallelism``."""

    chunk: int
    parallelism: int


def gpu_of(name: str, multiprocessors: int) -> Gpu | None:
    """The GPU of that name (as the driver gives it) with that many multiprocessors; None where it is not known.

    A MIG slice has the whole card's name but not its bandwidth: not known.
    """
    if "MIG" in name:
        return None
    for part, known, memory in KNOWN:
        if part in name:
            gpu = GPUS[known]
            return replace(gpu, multiprocessors=multiprocessors, memory_TB_s=memory or gpu.memory_TB_s)
    return None


def cut_for(
    device: torch.device, multiprocessors: int, num_q_heads: int, num_kv_heads: int, head_dim: int, elem_size: int,
    tile: int, chunk: int | None = None,
) -> Cut:  # fmt: skip
    """Chunk and split for a device: by the model where its name is known, else the defaults; a given chunk stays.

    Raises:
        ValueError: a chunk below 1.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk: must be at least 1 token, or None for what suits the device, got {chunk}")
    gpu = gpu_of(torch.cuda.get_device_name(device), multiprocessors) if device.type == "cuda" else None
    if gpu is None:
        cut = Cut(DEFAULT_CHUNK, DEFAULT_WAVES * multiprocessors)
    else:
        cut = choose(gpu, num_q_heads, num_kv_heads, head_dim, elem_size, tile)
    return cut if chunk is None else replace(cut, chunk=chunk)


@functools.cache
def choose(
    gpu: Gpu, num_q_heads: int = 32, num_kv_heads: int = 8, head_dim: int = 128, elem_size: int = 2, tile: int = 64
) -> Cut:
    """The cut with the least predicted time ÷ floor, in the geometric mean over ``REFERENCE``; some 10 ms, once.

    Of equal ones the shorter chunk and the smaller split.
    """

    def cost(cut: Cut) -> float:
        tile_config = TileConfig(tile, cut.chunk, cut.parallelism, num_kv_heads, elem_size)
        total = 0.0
        for plan in _reference_plans():
            arrays = plan.arrays(num_q_heads // num_kv_heads, tile_config)
            found = predict(arrays, gpu, num_q_heads, num_kv_heads, head_dim, elem_size)
            total += math.log(found.total_us / found.floor_us)
        return total

    cuts = [Cut(chunk, waves * gpu.multiprocessors) for chunk in CHUNKS for waves in WAVES]
    return min(cuts, key=lambda cut: (round(cost(cut), 6), cut.chunk, cut.parallelism))


@functools.cache
def _reference_plans() -> list[Plan]:
    tables = [block_tables(nodes, tokens) for nodes, tokens in REFERENCE]
    return [Plan.from_block_tables(t, [t.shape[1] * PAGE] * t.shape[0], PAGE) for t in tables]


def block_tables(nodes: tuple[int, ...], tokens: tuple[int, ...], page_size: int = PAGE) -> torch.Tensor:
    """int32 [leaves, pages]: tables of a regular tree whose nodes own whole pages."""
    page = 0
    above: list[list[int]] = [[] for _ in range(nodes[0])]
    for level, (count, length) in enumerate(zip(nodes, tokens, strict=True)):
        parents = above if level == 0 else [above[i * len(above) // count] for i in range(count)]
        above = []
        for parent in parents:
            above.append([*parent, *range(page, page + length // page_size)])
            page += length // page_size
    return torch.tensor(above, dtype=torch.int32)


def plan_for(
    gpu: Gpu, nodes: tuple[int, ...], tokens: tuple[int, ...], num_q_heads: int = 32, num_kv_heads: int = 8,
    chunk: int | None = None,
) -> PlanArrays:  # fmt: skip
    """The plan that the cuda backend would make on this GPU for one decode step of a regular tree, bfloat16."""
    tables = block_tables(nodes, tokens)
    plan = Plan.from_block_tables(tables, [tables.shape[1] * PAGE] * tables.shape[0], PAGE)
    cut = choose(gpu, num_q_heads, num_kv_heads)
    tile_config = TileConfig(tile=64, chunk=chunk or cut.chunk, parallelism=cut.parallelism, num_kv_heads=num_kv_heads)
    return plan.arrays(num_q_heads // num_kv_heads, tile_config)


@dataclass(frozen=True)
class Prediction:
    """Times in µs: ``total_us`` = launches, attention and merge; ``floor_us``: the unique bytes and nothing else."""

    gpu: str
    launches: int
    units: int
    megabytes: float
    attention_us: float
    merge_us: float
    total_us: float
    floor_us: float
    bound: str  # what most of the attention's time goes to: "bytes", "operations", "waiting" or "balance"


def predict(
    arrays: PlanArrays, gpu: Gpu, num_q_heads: int = 32, num_kv_heads: int = 8, head_dim: int = 128,
    elem_size: int = 2, unique_tokens: int | None = None, mode: str = "graph",
) -> Prediction:  # fmt: skip
    """One layer's attention on a plan.

    Args:
        arrays: on the CPU.
        unique_tokens: tokens in the pool that are read, for the floor; default: the plan's kv_tokens.
        mode: "graph" or "eager".
    """
    group = num_q_heads // num_kv_heads
    items = arrays.items.numpy().astype(np.float64)
    tokens, packed = items[:, 1], items[:, 3] * group
    written = np.concatenate([[0], np.cumsum(arrays.dest.numpy() < 0)])  # rows whose output an item writes itself
    begin = arrays.items.numpy()[:, 2]
    direct = written[begin + arrays.items.numpy()[:, 3]] - written[begin] == items[:, 3]
    results = packed * np.where(direct, head_dim * elem_size, 4 * (head_dim + 2))
    loaded = tokens * (2 * head_dim * elem_size + 4) + packed * head_dim * elem_size
    passes = np.ceil(packed / 64)
    flops = 4 * tokens * head_dim * np.ceil(packed / 16) * 16  # rows are padded to a warp's sixteen
    bandwidth = gpu.memory_TB_s * 1e6 * REACHED  # bytes a µs
    rate = gpu.bf16_TFLOP_s * 1e6 * MMA_SYNC
    units = len(items) * num_kv_heads
    slots = min(units, gpu.multiprocessors * gpu.blocks)
    share = min(bandwidth / max(slots, 1), IN_FLIGHT / LATENCY_US)
    streaming = np.maximum(
        (loaded + results) / share,
        flops / (rate / gpu.multiprocessors / min(gpu.blocks, 1 + slots // gpu.multiprocessors)),
    )
    unit_us = np.repeat(CHAIN * LATENCY_US + passes * streaming, num_kv_heads)
    columns = np.pad(unit_us, (0, -units % max(slots, 1))).reshape(-1, max(slots, 1))
    columns[1::2] = columns[1::2, ::-1].copy()  # back and forth
    busiest = float(columns.sum(axis=0).max()) if units else 0.0
    total_bytes = float((loaded + results).sum()) * num_kv_heads
    total_flops = float(flops.sum()) * num_kv_heads
    parts = {
        "bytes": total_bytes / bandwidth,
        "operations": total_flops / rate,
        "waiting": CHAIN * LATENCY_US * -(-units // max(slots, 1)),
    }
    attention = max(busiest, parts["bytes"], parts["operations"])
    parts["balance"] = attention - max(parts.values())
    merged = arrays.num_partials * num_q_heads * 4 * (head_dim + 2)
    merge = 0.0
    if arrays.num_merge:
        merge = 2 * LATENCY_US + merged / bandwidth
    launches = int(units > 0) + int(arrays.num_merge > 0)
    unique = arrays.kv_tokens if unique_tokens is None else unique_tokens
    floor_bytes = (
        2 * unique * num_kv_heads * head_dim * elem_size + 2 * arrays.num_rows * num_q_heads * head_dim * elem_size
    )
    return Prediction(
        gpu=gpu.name,
        launches=launches,
        units=units,
        megabytes=total_bytes / 1e6,
        attention_us=attention,
        merge_us=merge,
        total_us=launches * LAUNCH_US[mode] + attention + merge,
        floor_us=floor_bytes / (gpu.memory_TB_s * 1e6),
        bound=max(parts, key=lambda name: parts[name]),
    )
