"""`python -m benchmarks`: what it says of itself; commands are in the files beside it."""

from __future__ import annotations

import typer

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
[bold]deciding[/bold]   what each strategy takes of a step's time
[bold]serve[/bold]      Poisson arrivals: throughput, time to the first token and between tokens, p50, p99; --peer: vLLM
[bold]remote[/bold]     threads on a vLLM server beside the same threads one after another
[bold]branch[/bold]     training: attention under a branch mask, forward + backward; masked SDPA, FlexAttention
[bold]kv_formats[/bold] accuracy of K and V kept as int8 and fp8
[bold]fleet[/bold]      a simulation from measured costs of steps: replicas, routing, forks; checked on two real engines
[bold]company[/bold]    decoding beside programs that spin on the same cores
[bold]cuda-sass[/bold]  what the machine code of the CUDA kernels promises, without a GPU (read, not measured)
[bold]all[/bold]        attention, host, branch and e2e (also what runs when no command is given)
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
