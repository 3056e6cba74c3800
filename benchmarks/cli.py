"""`python -m benchmarks`: measure, print, save, draw."""

from __future__ import annotations

import math
import re
import time
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from . import attention, report
from .contenders import ALL
from .floor import Floor
from .shapes import parse_heads
from .store import Store, load
from .timing import CLOCKS, set_clock

console = Console()
app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    help="""Measure anabranch beside other ways to do the same, on this machine, in one run.

[bold]attention[/bold]  tree shapes × head shapes × dtypes; SDPA, masked, two-phase, FlexAttention, the floor
[bold]e2e[/bold]        SmolLM2: 16 branches through our engine, through model.generate and, optionally, through vLLM
[bold]host[/bold]       what a fork, a step and a plan cost; what a cache holds
[bold]linear[/bold]     what Engine(batch_invariant=True) costs: linear layers and forwards of 1 to 512 rows
[bold]step[/bold]       where a decode step of 1, 16 and 64 rows spends its time, eager and compiled, beside the floor
[bold]drafts[/bold]     speculative decoding: steps and seconds of the adapted models' answers with drafts and without
[bold]serve[/bold]      Poisson arrivals: throughput, time to the first token and between tokens, p50 and p99
[bold]branch[/bold]     training: attention under a branch mask, forward + backward; masked SDPA, FlexAttention
[bold]kv_formats[/bold] accuracy of K and V kept as int8 and fp8
[bold]company[/bold]    decoding beside programs that spin on the same cores
[bold]cuda-sass[/bold]  what the machine code of the CUDA kernels promises, without a GPU (read, not measured)
[bold]all[/bold]        all of them but kv_formats, company and cuda-sass (also what runs when no command is given)
[bold]report[/bold]     Markdown tables and figures from a results file

Every contender is checked against float64 before it is timed; rounds are interleaved (A B C A B C …) with cold caches;
what cannot run here is listed with the reason. Times are medians with the smallest and largest beside them.

Examples:

  python -m benchmarks attention --quick
  python -m benchmarks attention --only headline --heads 32/8 --dtype bfloat16
  python -m benchmarks all --json benchmarks/results/mine.json --plot docs/
  python -m benchmarks e2e --peer vllm-env/bin/python
  python -m benchmarks report benchmarks/results/mine.json
""",
)


class Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Quick = Annotated[bool, typer.Option("--quick", help="A few telling cases and fewer rounds: a minute or two.")]
Only = Annotated[str, typer.Option(help="Regular expression on a case's name or family: headline, GRPO, draft …")]
Dtypes = Annotated[list[Dtype] | None, typer.Option("--dtype", help="May be repeated. Default: float32 and bfloat16.")]
HeadShapes = Annotated[list[str] | None, typer.Option("--heads", help="Query/KV heads such as 32/8; may be repeated.")]
HeadDims = Annotated[list[int] | None, typer.Option("--head-dim", help="May be repeated. Default: 128.")]
Contenders = Annotated[list[str] | None, typer.Option("--contender", help=f"May be repeated: {', '.join(ALL)}.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write results here as they come; extends an existing file.")]
Plot = Annotated[Path | None, typer.Option("--plot", help="Draw the figures into this folder.")]
Minutes = Annotated[float, typer.Option(help="Start no new case after this time; the telling ones come first.")]
Rounds = Annotated[int, typer.Option(min=1, help="Rounds aimed at for each case.")]
Memory = Annotated[float, typer.Option(help="GB that the layouts of one case may take together.")]
Peer = Annotated[Path | None, typer.Option("--peer", help="Python of an environment with vLLM (see peer_vllm.py).")]
ClockOption = Annotated[
    str, typer.Option("--clock", help="wall, or cpu: CPU time of one thread (--threads 1), for a machine that is busy.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="torch's threads. Default: as torch chooses.")]


def _settings(quick, only, dtypes, heads, head_dims, contenders, rounds, memory) -> attention.Settings:
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


def _progress() -> Progress:
    return Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=console, transient=True,
    )  # fmt: skip


def _run_attention(settings: attention.Settings, store: Store, minutes: float = math.inf) -> None:
    work = attention.jobs(settings)
    if not work:
        raise typer.BadParameter(f"no case matches {settings.only!r}", param_hint="--only")
    with _progress() as progress:
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


def _run_host(store: Store, quick: bool) -> None:
    from . import host

    with console.status("host costs"):
        for entry in host.run(quick=quick):
            store.put("host", ("name",), entry)
    console.print(report.host_table(store.data))


def _run_branch(
    store: Store, quick: bool, only: str = "", dtypes: list[Dtype] | None = None, heads: str = "8/2", dim: int = 64,
    names: tuple[str, ...] | None = None, rounds: int = 7, memory: bool = True,
) -> None:  # fmt: skip
    from . import branch

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


def _run_e2e(
    store: Store,
    quick: bool,
    dtypes: list[Dtype] | None,
    peer: Path | None,
    rounds: int,
    only: str,
    patience: float = 600.0,
    branches: list[int] | None = None,
) -> None:
    from . import e2e

    names = [d.value for d in dtypes] if dtypes else ["bfloat16", "float32"]
    with console.status("loading the model") as status:
        for entry in e2e.run(
            quick=quick, dtypes=names, peer=peer, rounds=rounds, only=only, patience=patience,
            branches=branches or (16, 1), report=status.update,
        ):  # fmt: skip
            store.put("e2e", ("contender", "prompt", "dtype", "n"), entry)
            console.print(report.e2e_line(entry))
    console.print(report.e2e_table(store.data))


def _finish(store: Store, plot: Path | None) -> None:
    machine = store.data["machine"]
    console.print(f"[dim]{machine['cpu']}, {machine['threads']} threads, commit {machine['commit']}[/dim]")
    if store.path:
        console.print(f"results: {store.path}")
    if plot is not None:
        from . import plots

        for path in plots.draw(store.data, plot):
            console.print(f"figure: {path}")


def _start(threads: int | None, json: Path | None, clock: str = "wall") -> Store:
    if threads is not None:
        torch.set_num_threads(threads)
    if clock not in CLOCKS:
        raise typer.BadParameter(f"{clock!r}: expected one of {', '.join(CLOCKS)}", param_hint="--clock")
    try:
        set_clock(clock)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--clock") from None
    try:
        return Store(json, clock)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--json") from None


@app.command("attention")
def attention_command(
    quick: Quick = False, only: Only = "", dtype: Dtypes = None, heads: HeadShapes = None, head_dim: HeadDims = None,
    contender: Contenders = None, rounds: Rounds = 9, memory: Memory = 8.0, minutes: Minutes = math.inf,
    threads: Threads = None, clock: ClockOption = "wall", json: Json = None, plot: Plot = None,
) -> None:  # fmt: skip
    """Attention over trees: every shape beside its peers and the machine's floor."""
    settings = _settings(quick, only, dtype, heads, head_dim, contender, rounds, memory)
    store = _start(threads, json, clock)
    _run_attention(settings, store, minutes)
    _finish(store, plot)


@app.command("host")
def host_command(quick: Quick = False, threads: Threads = None, clock: ClockOption = "wall", json: Json = None) -> None:
    """Forks, steps, plans and memory: what the bookkeeping costs."""
    store = _start(threads, json, clock)
    _run_host(store, quick)
    _finish(store, None)


@app.command("linear")
def linear_command(
    quick: Quick = False, threads: Threads = None, clock: ClockOption = "wall", json: Json = None
) -> None:
    """Linear layers and forwards of SmolLM2 with batch_invariant=True, beside the default."""
    from . import linear

    store = _start(threads, json, clock)
    for entry in linear.run(quick=quick):
        store.put("linear", ("case", "dtype", "rows"), entry)
        times = " / ".join(f"{entry[name]['median_us']:,.0f}" for name in ("invariant", "default"))
        console.print(f"{entry['case']:24} {entry['dtype']:9} {entry['rows']:4} rows  {times} µs  × {entry['ratio']}")
    _finish(store, None)


@app.command("step")
def step_command(
    quick: Quick = False,
    dtype: Annotated[Dtype, typer.Option()] = Dtype.bfloat16,
    rounds: Rounds = 5,
    threads: Threads = None, clock: ClockOption = "wall", json: Json = None,
) -> None:  # fmt: skip
    """Where a decode step goes: plan, linear layers, attention, sampling, the rest; by rows, beside the floor."""
    from . import step

    store = _start(threads, json, clock)
    with console.status("measuring the floor") as status:
        floor = Floor().measure((getattr(torch, dtype.value),), tries=3 if quick else 10)
        store.set("floor", floor.as_dict())
        for entry in step.run(quick, dtype.value, min(rounds, 2) if quick else rounds, floor, status.update):
            store.put("step", ("contender", "rows", "dtype"), entry)
            if "left_out" in entry:
                console.print(
                    f"{entry['rows']} rows, {entry['contender']}: left out, {entry['left_out']}", markup=False
                )
    console.print(report.step_table(store.data))
    _finish(store, None)


@app.command("kv_formats")
def kv_formats_command(quick: Quick = False, json: Json = None) -> None:
    """Accuracy of K and V kept as int8 and fp8: SmolLM2's perplexity, the adapted model's answers. Not timed."""
    from . import kv_formats

    store = _start(None, json)
    for entry in kv_formats.run(quick=quick):
        store.put("kv_formats", ("case", "dtype", "kv_format", "calls"), entry)
        what = (
            f"perplexity {entry['perplexity']:.4f}, divergence {entry['divergence']:.2g} nats"
            if entry["case"] == "perplexity"
            else f"{entry['right']} of {entry['problems']} right, {entry['same_text']} the same text"
        )
        console.print(f"{entry['dtype']:9} {entry['kv_format']:5} {entry['bytes_per_token']:6} bytes a token  {what}")
    _finish(store, None)


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
    from . import cuda_resources, cuda_sass

    if cuda_resources.nvcc() is None:
        raise typer.BadParameter("nothing compiled: nvcc was not found; put it on PATH or name it in CUDACXX")
    options: dict[str, Any] = dict(
        dtypes=dtype or cuda_sass.DTYPES, archs=arch or cuda_resources.ARCHS, head_dims=head_dim or cuda_sass.HEAD_DIMS,
        processes=processes,
    )  # fmt: skip
    for name, given, known in (("dtype", dtype, cuda_sass.DTYPES), ("head-dim", head_dim, cuda_sass.HEAD_DIMS)):
        for value in given or ():
            if value not in known:
                raise typer.BadParameter(
                    f"{value!r}: expected one of {', '.join(map(str, known))}", param_hint=f"--{name}"
                )
    if save and (arch or dtype or head_dim):
        raise typer.BadParameter("the committed table has every variant: leave --arch, --dtype, --head-dim out")
    rows = cuda_sass.table(**options)
    if save:
        cuda_sass.save(rows)
    print(cuda_sass.markdown(rows, cuda_resources.version()))
    if against is not None:
        try:
            lines = cuda_sass.worse(rows, cuda_sass.other_table(against, **options))
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--against") from None
        print("\n".join(lines) or f"nothing is worse than in {against}")
        raise typer.Exit(int(bool(lines)))


@app.command("company")
def company_command(
    quick: Quick = False,
    against: Annotated[
        Path | None, typer.Option(help="The `python` folder of another build, measured in turns with this one.")
    ] = None,
    branches: Annotated[list[int] | None, typer.Option(help="May be repeated. Default: 1 and 16.")] = None,
    others: Annotated[list[int] | None, typer.Option(help="Spinning programs; may be repeated.")] = None,
    tokens: Annotated[int, typer.Option(min=2)] = 32,
    rounds: Rounds = 5, model: Annotated[str, typer.Option()] = "smollm2", dtype: Dtype = Dtype.bfloat16,
    json: Json = None,
) -> None:  # fmt: skip
    """Decoding of a real model alone and beside programs that spin: tokens a second, ratio to the fair share."""
    from . import company

    store = _start(None, json)
    for entry in company.run(
        against, model, dtype.value, tuple(branches or (1, 16)), tokens, tuple(others or (0, 1, 2)),
        min(rounds, 3) if quick else rounds,
    ):  # fmt: skip
        store.put("company", ("contender", "branches", "competitors", "dtype"), entry)
        console.print(company.line(entry))


@app.command("drafts")
def drafts_command(
    model: Annotated[list[str] | None, typer.Option("--model", help="May be repeated; default: both of ours.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Problems of each model.")] = 6, rounds: Rounds = 3,
    threads: Threads = None, json: Json = None,
) -> None:  # fmt: skip
    """Steps and seconds of our models' answers with drafts and without, trees compared."""
    from . import drafts

    store = _start(threads, json)
    for entry in drafts.run(tuple(model or ("multiplication", "smollm2-adaptive")), count, rounds):
        store.put("drafts", ("model", "draft"), entry)
        same = "same trees" if entry["same_trees"] else "[red]other trees[/red]"
        console.print(
            f"{entry['model']:18} {entry['draft']:20} {entry['steps']:5} steps (÷ {entry['fewer_steps']:.2f})  "
            f"{entry['accepted_tokens']:5} of {entry['draft_tokens']:5} guesses  "
            f"{entry['rows']:5} rows  time ÷ {entry['faster']}  {same}"
        )


@app.command("serve")
def serve_command(
    quick: Quick = False,
    rate: Annotated[list[float] | None, typer.Option(help="Requests a second; may be repeated.")] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests of each load.")] = 32,
    dtype: Annotated[Dtype, typer.Option()] = Dtype.bfloat16,
    threads: Threads = None, json: Json = None,
) -> None:  # fmt: skip
    """Requests that arrive at random: our engine with and without its prefix cache, and model.generate."""
    from . import serve

    store = _start(threads, json)
    with console.status("serving") as status:
        count = min(requests, 8) if quick else requests
        for entry in serve.run(quick, dtype.value, rate or ([1.0] if quick else [0.5, 2.0]), count, status.update):
            store.put("serve", ("contender", "answers", "rate", "dtype", "requests"), entry)
    console.print(report.serve_table(store.data))
    _finish(store, None)


@app.command("e2e")
def e2e_command(
    quick: Quick = False, only: Only = "", dtype: Dtypes = None, peer: Peer = None, rounds: Rounds = 3,
    threads: Threads = None, clock: ClockOption = "wall", json: Json = None, plot: Plot = None,
    patience: Annotated[
        float, typer.Option(help="Leave a contender out where its prefill alone would take more seconds than this.")
    ] = 600.0,
    branches: Annotated[
        list[int] | None, typer.Option("--branches", min=1, help="May be repeated. Default: 16 and 1.")
    ] = None,
) -> None:  # fmt: skip
    """A real model: our engine, model.generate and, with --peer, vLLM on the same prompts."""
    store = _start(threads, json, clock)
    _run_e2e(store, quick, dtype, peer, rounds, only, patience, branches)
    _finish(store, plot)


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
    from . import branch

    for name in contender or ():
        if name not in branch.ALL:
            raise typer.BadParameter(f"{name!r}: expected one of {', '.join(branch.ALL)}", param_hint="--contender")
    store = _start(threads, json, clock)
    _run_branch(store, quick, only, dtype, heads, head_dim, tuple(contender) if contender else None, rounds, memory)
    _finish(store, None)


@app.command("all")
def all_command(
    quick: Quick = False, peer: Peer = None, memory: Memory = 8.0, minutes: Minutes = math.inf, threads: Threads = None,
    json: Json = None, plot: Plot = None,
) -> None:  # fmt: skip
    """Everything, one after another."""
    store = _start(threads, json)
    _run_attention(_settings(quick, "", None, None, None, None, 9, memory), store, minutes)
    _run_host(store, quick)
    _run_branch(store, quick)
    _run_e2e(store, quick, None, peer, 1 if quick else 3, "")
    _finish(store, plot)


@app.command("report")
def report_command(
    file: Annotated[Path, typer.Argument(help="A results file.", exists=True, dir_okay=False)],
    full: Annotated[bool, typer.Option("--full", help="Every head shape instead of the README's selection.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the Markdown here instead of printing it.")] = None,
    plot: Plot = None,
) -> None:
    """Markdown tables (and figures) from a results file; numbers in documents come from here alone."""
    data = load(file)
    text = report.markdown(data, full=full)
    if out is None:
        print(text)
    else:
        out.write_text(text)
    if plot is not None:
        from . import plots

        for path in plots.draw(data, plot):
            console.print(f"figure: {path}")


@app.callback(invoke_without_command=True)
def main(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        options = {"quick": False, "peer": None, "memory": 8.0, "minutes": math.inf, "threads": None, "json": None}
        context.invoke(all_command, **options, plot=None)
