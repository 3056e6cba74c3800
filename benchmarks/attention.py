"""The attention table: every contender on every case, checked against float64, then timed in interleaved rounds."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .contenders import ALL, Contender, Unfit
from .environment import available_bytes
from .floor import Floor
from .shapes import DEFAULT_HEADS, HEADS, Case, all_cases, parse_heads
from .timing import interleaved
from .workload import TOLERANCE, Workload, oracle, relative_error, sampled_rows


@dataclass(frozen=True)
class Settings:
    """What is measured and how long.

    `memory` bounds the layouts of one case in bytes; `patience` bounds one call of a contender in seconds at the
    machine's rate: what would need more is left out, with the reason in the table.
    """

    quick: bool = False
    only: str = ""
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    heads: tuple[str, ...] | None = None
    head_dims: tuple[int, ...] | None = None
    contenders: tuple[str, ...] = tuple(ALL)
    rounds: int = 9
    budget: float = 6.0
    memory: float = 8e9
    patience: float = 1.0


@dataclass(frozen=True)
class Job:
    case: Case
    heads: str
    head_dim: int
    dtype: torch.dtype

    @property
    def label(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.case.name} · {self.heads} · D{self.head_dim} · {dtype}"


def jobs(settings: Settings) -> list[Job]:
    """All combinations that the settings ask for: every case with the default heads first, then the sweep."""
    pattern = re.compile(settings.only, re.IGNORECASE) if settings.only else None
    first: list[Job] = []
    sweep: list[Job] = []
    for case in all_cases():
        if pattern is not None and not (pattern.search(case.name) or pattern.search(case.group)):
            continue
        if settings.quick and pattern is None and not case.quick:
            continue
        wide = case.sweep and not settings.quick
        for shape in settings.heads or (HEADS if wide else (DEFAULT_HEADS,)):
            for dim in settings.head_dims or ((128, 64) if wide and shape == DEFAULT_HEADS else (128,)):
                for dtype in settings.dtypes:
                    plain = (shape, dim) == (DEFAULT_HEADS, 128)
                    (first if plain else sweep).append(Job(case, shape, dim, dtype))
    return first + sweep


def run_job(job: Job, settings: Settings, floor: Floor, report: Callable[[str], None] = lambda _: None) -> dict:
    """Measure one combination; the dict goes into the results as it is."""
    case = job.case
    q_heads, kv_heads = parse_heads(job.heads)
    itemsize = torch.empty(0, dtype=job.dtype).element_size()
    nbytes, flops = case.bytes(q_heads, kv_heads, job.head_dim, itemsize), case.flops(q_heads, job.head_dim)
    floor_seconds, bound = floor.seconds(nbytes, flops, job.dtype)
    result: dict = {
        "case": case.name, "group": case.group, "note": case.note, "heads": job.heads, "head_dim": job.head_dim,
        "dtype": str(job.dtype).removeprefix("torch."), "rows": len(case.rows), "nodes": len(case.lengths),
        "unique_tokens": case.unique_tokens, "logical_tokens": case.logical_tokens, "bytes": nbytes, "flops": flops,
        "floor_us": round(floor_seconds * 1e6, 2), "bound": bound, "contenders": {},
    }  # fmt: skip
    budget = min(settings.memory, 0.6 * available_bytes())
    unique = 2.0 * case.unique_tokens * kv_heads * job.head_dim * itemsize
    if 2.2 * unique > budget:
        result["left_out"] = f"{unique / 1e9:.1f} GB of unique KV, twice: more than the {budget / 1e9:.1f} GB set aside"
        return result

    report(f"{job.label}: numbers")
    work = Workload(case, q_heads, kv_heads, job.head_dim, job.dtype)
    rows = sampled_rows(case)
    expected = oracle(work, rows)
    ready: list[Contender] = []
    taken = 1.0 * work.kv_bytes
    for name in settings.contenders:
        contender = ALL[name](work)
        try:
            taken += _prepare(contender, settings, floor, taken, budget, report, job)
        except Unfit as reason:
            result["contenders"][name] = {"left_out": str(reason)}
            continue
        error = relative_error(contender.call()[rows], expected)
        if not error <= TOLERANCE[job.dtype]:
            result["contenders"][name] = {"left_out": f"wrong: relative error {error:.1e} against float64"}
            continue
        result["contenders"][name] = {"variant": contender.variant, "relative_error": error}
        ready.append(contender)

    report(f"{job.label}: timing")
    timings = interleaved([c.call for c in ready], rounds=settings.rounds, budget=settings.budget)
    for contender, timing in zip(ready, timings, strict=True):
        contender.finish()
        entry = result["contenders"][contender.name]
        entry.update(timing.as_dict())
        entry.update({k: round(v, 2) for k, v in contender.extra.items()})
    del ready, work, expected
    gc.collect()
    return result


def _prepare(contender, settings, floor, taken, budget, report, job) -> float:
    """Build one contender, or raise `Unfit` with the reason before anything large is allocated."""
    if contender.name == "sdpa_packed" and contender.work.group == 1:
        raise Unfit("no GQA: the same call as SDPA per branch")
    if contender.name == "flex" and settings.heads is None and (job.heads, job.head_dim) != (DEFAULT_HEADS, 128):
        raise Unfit("compiles for many seconds a shape: measured with 32/8 and head_dim 128 unless --heads asks for it")
    need = contender.bytes_needed()
    if taken + need > budget:
        raise Unfit(f"needs {need / 1e9:.1f} GB beside {taken / 1e9:.1f} GB in use; {budget / 1e9:.1f} GB set aside")
    seconds = contender.flops() / floor.rate(torch.float32)
    if seconds > settings.patience:
        raise Unfit(f"computes {contender.flops() / 1e9:.0f} GFLOP, at least {seconds:.1f} s a call")
    report(f"{job.label}: {contender.title}")
    with torch.no_grad():
        contender.prepare()
    return need
