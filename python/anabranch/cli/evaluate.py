"""``anabranch eval``: a model on a file of problems, forked, forced sequential and plain."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anabranch.cli.common import USAGE, Mistake, check_save, load_model
from anabranch.viz.console import consoles, machine_note, plain_terminal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.table import Table

    from anabranch.evaluation.evaluate import Problem


@dataclass(frozen=True)
class Options:
    """What the command line asked for."""

    problems: Path
    model: str = "multiplication"
    modes: tuple[str, ...] = ()
    limit: int | None = None
    batch: int = 16
    timed: int = 0
    max_new_tokens: int = 1024
    seed: int = 0
    as_json: bool = False
    save: Path | None = None
    dtype: str = "auto"


def run(options: Options, check: Callable[[Problem, str], bool] | None = None) -> None:
    """The whole command. check: judges the answers of a model that was taught the tags, in place of `is_right`."""
    from anabranch import evaluation

    check_save(options.save)
    unknown = [m for m in options.modes if m not in evaluation.MODES]
    if unknown:
        raise Mistake(f"--mode {unknown[0]!r}: expected one of {', '.join(evaluation.MODES)}", USAGE)
    problems = evaluation.read_problems(options.problems)
    if options.limit is not None:
        step = max(1, len(problems) // options.limit)  # evenly spaced: files are often sorted
        problems = problems[::step][: options.limit]
    out, err = consoles()
    import anabranch as ab

    model, tokenizer, dtype = load_model(options.model, options.dtype)
    strategy = strategy_for(tokenizer)
    modes = options.modes or (evaluation.MODES if strategy is not None else ("plain",))
    if strategy is None and set(modes) != {"plain"}:
        raise Mistake(
            f"--model {options.model!r} does not know ThreadWeaver's tags as single tokens, so it cannot fork by "
            "itself; use --mode plain",
            USAGE,
        )
    engine = ab.Engine(model, tokenizer)
    try:
        with _bars(err, not options.as_json and not plain_terminal(err)) as report:
            found = evaluation.evaluate(
                engine, problems, strategy, modes=modes, batch=options.batch, timed=options.timed if strategy else 0,
                max_new_tokens=options.max_new_tokens, seed=options.seed, report=report,
                check=check if strategy else None,
            )  # fmt: skip
    except KeyboardInterrupt:
        engine.abort()
        raise
    facts = {
        "schema": "anabranch.eval", "version": 1, "model": options.model, "dtype": str(dtype).removeprefix("torch."),
        "strategy": str(strategy), "file": options.problems.name, "seed": options.seed, "machine": machine_note(),
        "anabranch": ab.__version__,
    }  # fmt: skip
    report_ = {**facts, **found}
    if options.save is not None:
        options.save.write_text(json.dumps(report_, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.as_json:
        print(json.dumps(report_, ensure_ascii=False))
        return
    out.print(table(report_))
    for line in remarks(report_):
        out.print(line, style="dim")


def strategy_for(tokenizer: Any) -> Any:
    """`ThreadWeaver` where each of its tags is one token of the vocabulary; else None."""
    import anabranch as ab

    strategy = ab.ThreadWeaver()
    vocabulary = tokenizer.get_vocab()
    return strategy if all(tag in vocabulary for tag in strategy.tags) else None


def _bars(console: Any, shown: bool) -> Any:
    """Context: report(mode, done, total), drawn as one bar a mode."""
    if not shown:
        return nullcontext(lambda mode, done, total: None)
    from contextlib import contextmanager

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    @contextmanager
    def bars() -> Iterator[Callable[[str, int, int], None]]:
        columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            tasks: dict[str, Any] = {}

            def report(mode: str, done: int, total: int) -> None:
                if mode not in tasks:
                    tasks[mode] = progress.add_task(mode, total=total)
                progress.update(tasks[mode], completed=done)

            yield report

    return bars()


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def table(report: dict[str, Any]) -> Table:
    """One row a mode."""
    from rich.table import Table

    t = Table(title=f"{report['model']} on {report['problems']} problems of {report['file']}", title_justify="left")
    for head in ("", "right", "95 % interval", "threads right", "malformed", "tokens", "critical path", "speed-up"):
        t.add_column(head, justify="left" if not head else "right", no_wrap=True)
    for mode, m in report["modes"].items():
        low, high = m["accuracy_95"]
        speedup = m["token_speedup_where_forked"] if mode == "forked" else None
        t.add_row(
            mode, percent(m["accuracy"]), f"{100 * low:.1f} to {100 * high:.1f} %",
            percent(m["threads_right"]) if "threads_right" in m else "–", percent(m["malformed_rate"]),
            f"{m['total_tokens']:,}", f"{m['critical_path_tokens']:,}" if mode == "forked" else "–",
            f"{speedup:.2f}×" if speedup else "–",
        )  # fmt: skip
    return t


def remarks(report: dict[str, Any]) -> list[str]:
    """What the table has no room for."""
    lines = []
    for mode, m in report["modes"].items():
        if "by_family" in m:
            lines.append(f"{mode}, right by family: " + ", ".join(f"{k} {v}" for k, v in m["by_family"].items()))
    if "forked_minus_sequential" in report:
        d = report["forked_minus_sequential"]
        known = d["low"] is not None
        interval = f"{100 * d['low']:+.1f} to {100 * d['high']:+.1f}" if known else "one problem, no interval"
        lines.append(f"forked less sequential: {100 * d['difference']:+.1f} points ({interval})")
    if "timed" in report:
        for name, what in (("where_forked", "where it forks"), ("all", "over all")):
            if name in report["timed"]:
                s = report["timed"][name]
                both = s["speedup_95"]
                interval = f"{both[0]:.2f} to {both[1]:.2f}" if both else "one problem, no interval"
                lines.append(
                    f"wall clock {what}, one problem at a time: {s['speedup']:.2f}× its own sequential run "
                    f"({interval}); {s['sequential_seconds']:.1f} s against {s['forked_seconds']:.1f} s"
                )
        if "all" not in report["timed"]:
            lines.append(
                f"wall clock: none of the {report['timed']['problems']} timed problems forked: nothing to compare"
            )
        lines.append(f"deciding (strategy, plan and bookkeeping): {percent(report['timed']['overhead'])} of the time")
    lines.append("speed-up: tokens ÷ critical path where it forks; " + report["machine"] + "; " + report["dtype"])
    return lines
