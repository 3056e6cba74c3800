"""Commands that measure kernels and the bookkeeping around them."""

from __future__ import annotations

import math
import re
import time
from typing import Annotated, Any

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from .. import attention, report
from ..contenders import ALL
from ..floor import Floor
from ..shapes import parse_heads
from ..store import Store
from .app import app
from .options import (
    ClockOption,
    Contenders,
    Dtype,
    Dtypes,
    HeadDims,
    HeadShapes,
    Json,
    Memory,
    Minutes,
    Only,
    Plot,
    Quick,
    Rounds,
    Threads,
    console,
    finish,
    start,
)


def attention_settings(quick, only, dtypes, heads, head_dims, contenders, rounds, memory) -> attention.Settings:
    for shape in heads or ():
        try:
            parse_heads(shape)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--heads") from None
    for name in contenders or ():
        if name not in ALL:
            raise typer.BadParameter(f"{name!r}: expected one of {', '.join(ALL)}", param_hint="--contender")
    options = {}
    if dtypes:
        options["dtypes"] = tuple(getattr(torch, d.value) for d in dtypes)
    if contenders:
        options["contenders"] = tuple(contenders)
    return attention.Settings(
        quick=quick, only=only, heads=tuple(heads) if heads else None,
        head_dims=tuple(head_dims) if head_dims else None,
        rounds=min(rounds, 5) if quick else rounds, budget=2.0 if quick else 4.0, memory=memory * 1e9, **options,
    )  # fmt: skip


def progress_bar() -> Progress:
    return Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=console, transient=True,
    )  # fmt: skip


def run_attention(settings: attention.Settings, store: Store, minutes: float = math.inf) -> None:
    work = attention.jobs(settings)
    if not work:
        raise typer.BadParameter(f"no case matches {settings.only!r}", param_hint="--only")
    with progress_bar() as progress:
        task = progress.add_task("the machine's own ceiling", total=len(work))
        floor = Floor().measure(settings.dtypes)
        store.set("floor", floor.as_dict())
        end = time.monotonic() + 60 * minutes
        for number, job in enumerate(work):
            if time.monotonic() > end:
                left = f"{len(work) - number} of {len(work)} left out"
                console.print(f"[yellow]--minutes {minutes:g} are over: {left}[/yellow]")
                break
            result = attention.run_job(job, settings, floor, lambda text: progress.update(task, description=text))
            store.put("attention", ("case", "heads", "head_dim", "dtype"), result)
            progress.console.print(report.case_line(result))
            progress.update(task, completed=number + 1)
        # Again at the end: a floor measured in a noisy moment would flatter everybody.
        store.set("floor", floor.measure(settings.dtypes).as_dict())
    for entry in store.data["attention"]:
        seconds, bound = floor.seconds(entry["bytes"], entry["flops"], getattr(torch, entry["dtype"]))
        entry.update(floor_us=round(seconds * 1e6, 2), bound=bound)
    store.save()
    console.print(report.attention_table(store.data))


def run_host(store: Store, quick: bool) -> None:
    from .. import host

    with console.status("host costs"):
        for entry in host.run(quick=quick):
            store.put("host", ("name",), entry)
    console.print(report.host_table(store.data))


def run_branch(
    store: Store, quick: bool, only: str = "", dtypes: list[Dtype] | None = None, heads: str = "8/2", dim: int = 64,
    names: tuple[str, ...] | None = None, rounds: int = 7, memory: bool = True,
) -> None:  # fmt: skip
    from .. import branch

    cases = [c for c in branch.CASES if re.search(only, c.name, re.IGNORECASE)]
    if not cases:
        raise typer.BadParameter(f"no case matches {only!r}", param_hint="--only")
    for case in cases[:1] if quick and not only else cases:
        for dtype in dtypes or [Dtype.float32]:
            with console.status(case.name) as status:
                entry = branch.run_case(
                    case, heads, dim, getattr(torch, dtype.value), names=names or tuple(branch.ALL),
                    rounds=min(rounds, 3) if quick else rounds, report=status.update,
                )  # fmt: skip
            store.put("branch", ("case", "heads", "head_dim", "dtype"), entry)
            console.print(report.branch_line(entry))
    for entry in branch.construction():
        store.put("branch_masks", ("case",), entry)
    if memory and not quick:
        with console.status("memory, a process a case"):
            for entry in branch.memory():
                store.put("branch_memory", ("contender", "case"), entry)
    console.print(report.branch_table(store.data))


@app.command("attention")
def attention_command(
    quick: Quick = False, only: Only = "", dtype: Dtypes = None, heads: HeadShapes = None, head_dim: HeadDims = None,
    contender: Contenders = None, rounds: Rounds = 9, memory: Memory = 8.0, minutes: Minutes = math.inf,
    threads: Threads = None, clock: ClockOption = "wall", json: Json = None, plot: Plot = None,
) -> None:  # fmt: skip
    """Attention over trees: every shape beside its peers and the machine's floor."""
    settings = attention_settings(quick, only, dtype, heads, head_dim, contender, rounds, memory)
    store = start(threads, json, clock)
    run_attention(settings, store, minutes)
    finish(store, plot)


@app.command("host")
def host_command(quick: Quick = False, threads: Threads = None, clock: ClockOption = "wall", json: Json = None) -> None:
    """Forks, steps, plans and memory: what the bookkeeping costs."""
    store = start(threads, json, clock)
    run_host(store, quick)
    finish(store, None)


@app.command("branch")
def branch_command(
    quick: Quick = False, only: Only = "", dtype: Dtypes = None,
    heads: Annotated[str, typer.Option(help="Query/KV heads.")] = "8/2",
    head_dim: Annotated[int, typer.Option(min=1, max=256)] = 64,
    contender: Annotated[list[str] | None, typer.Option("--contender", help="May be repeated; default: all.")] = None,
    rounds: Rounds = 7, memory: Annotated[bool, typer.Option(help="Measure peak memory too.")] = True,
    threads: Threads = None, clock: ClockOption = "wall", json: Json = None,
) -> None:  # fmt: skip
    """Training: attention under a branch mask, forward and backward."""
    from .. import branch

    for name in contender or ():
        if name not in branch.ALL:
            raise typer.BadParameter(f"{name!r}: expected one of {', '.join(branch.ALL)}", param_hint="--contender")
    store = start(threads, json, clock)
    run_branch(store, quick, only, dtype, heads, head_dim, tuple(contender) if contender else None, rounds, memory)
    finish(store, None)


@app.command("linear")
def linear_command(
    quick: Quick = False, threads: Threads = None, clock: ClockOption = "wall", json: Json = None
) -> None:
    """Linear layers and forwards of SmolLM2 with batch_invariant=True, beside the default."""
    from .. import linear

    store = start(threads, json, clock)
    for entry in linear.run(quick=quick):
        store.put("linear", ("case", "dtype", "rows"), entry)
        times = " / ".join(f"{entry[name]['median_us']:,.0f}" for name in ("invariant", "default"))
        console.print(f"{entry['case']:24} {entry['dtype']:9} {entry['rows']:4} rows  {times} µs  × {entry['ratio']}")
    finish(store, None)


@app.command("kv_formats")
def kv_formats_command(quick: Quick = False, json: Json = None) -> None:
    """Accuracy of K and V kept as int8 and fp8: SmolLM2's perplexity, the adapted model's answers. Not timed."""
    from .. import kv_formats

    store = start(None, json)
    for entry in kv_formats.run(quick=quick):
        store.put("kv_formats", ("case", "dtype", "kv_format", "calls"), entry)
        what = (
            f"perplexity {entry['perplexity']:.4f}, divergence {entry['divergence']:.2g} nats"
            if entry["case"] == "perplexity"
            else f"{entry['right']} of {entry['problems']} right, {entry['same_text']} the same text"
        )
        console.print(f"{entry['dtype']:9} {entry['kv_format']:5} {entry['bytes_per_token']:6} bytes a token  {what}")
    finish(store, None)


@app.command("cuda-sass")
def cuda_sass_command(
    against: Annotated[
        str | None, typer.Option(help="A saved table, or a commit whose sources are compiled too: say what is worse.")
    ] = None,
    arch: Annotated[list[int] | None, typer.Option(help="90 for sm_90; may be repeated. Default: all.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="bf16, fp16, fp32; may be repeated. Default: all.")] = None,
    head_dim: Annotated[list[int] | None, typer.Option(help="May be repeated. Default: all compiled ones.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Compilers at once.")] = 1,
    save: Annotated[bool, typer.Option("--save", help="Write benchmarks/results/cuda_sass.json and .md.")] = False,
) -> None:
    """What the CUDA kernels' machine code promises (issue cycles, copies, products a block): read, never measured."""
    from .. import cuda_resources, cuda_sass

    if cuda_resources.nvcc() is None:
        raise typer.BadParameter("nothing compiled: nvcc was not found; put it on PATH or name it in CUDACXX")
    options: dict[str, Any] = dict(
        dtypes=dtype or cuda_sass.DTYPES, archs=arch or cuda_resources.ARCHS, head_dims=head_dim,
        processes=processes,
    )  # fmt: skip
    for name, given, known in (("dtype", dtype, cuda_sass.DTYPES), ("head-dim", head_dim, cuda_sass.HEAD_DIMS)):
        for value in given or ():
            if value not in known:
                raise typer.BadParameter(
                    f"{value!r}: expected one of {', '.join(map(str, known))}", param_hint=f"--{name}"
                )
    if save and (arch or dtype or head_dim):
        raise typer.BadParameter("the committed tables have every variant: leave --arch, --dtype, --head-dim out")
    found = cuda_sass.units(**options)
    rows = cuda_sass.table(found)
    if save:
        found += cuda_sass.units(("",), options["archs"], processes=processes)
        cuda_resources.save(cuda_resources.with_layouts([row for unit in found for row in unit.kernels]))
        cuda_sass.save(rows)
    print(cuda_sass.markdown(rows, cuda_resources.version()))
    if against is not None:
        try:
            lines = cuda_sass.worse(rows, cuda_sass.other_table(against, **options))
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--against") from None
        print("\n".join(lines) or f"nothing is worse than in {against}")
        raise typer.Exit(int(bool(lines)))
