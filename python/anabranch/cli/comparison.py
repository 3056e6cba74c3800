"""``anabranch compare``: strategies side by side on tasks and models, into a store that a later call goes on from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anabranch._check import nearest
from anabranch.cli.common import USAGE, Mistake, load_model, load_tokenizer
from anabranch.viz.console import consoles, machine_note, plain_terminal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from anabranch.evaluation.comparison import Cell, Outcome, Task


@dataclass(frozen=True)
class Options:
    """What the command line asked for; None leaves it to the preset."""

    preset: str = "quick"
    store: Path = Path("anabranch-compare.sqlite")
    models: str | None = None
    strategies: str | None = None
    tasks: str | None = None
    problems: int | None = None
    seeds: int | None = None
    budget: str | None = None
    max_new_tokens: int | None = None
    batch: int = 1
    plots: Path | None = None
    retry_errors: bool = False
    dtype: str = "auto"
    url: str | None = None
    api_key: str | None = None
    as_json: bool = False


@dataclass(frozen=True)
class Preset:
    """models: those that are on this machine are taken; strategies: those that fit a model."""

    models: tuple[str, ...]
    strategies: tuple[str, ...]
    tasks: tuple[str, ...]
    problems: int
    seeds: int
    max_new_tokens: int
    budget: str | None


MODELS = ("multiplication", "smollm2-adaptive", "smollm2")
PRESETS = {
    "quick": Preset(
        MODELS, ("plain", "threadweaver", "sequential(threadweaver)", "self-consistency(n=4,vote=line)"),
        ("multiplication", "leg_counting(max_animals=5)", "chain_sum(max_digits=2,max_terms=3)", "letter_counting"),
        problems=4, seeds=1, max_new_tokens=256, budget="420s",
    ),
    "full": Preset(
        MODELS,
        (
            "plain", "threadweaver", "sequential(threadweaver)", "self-consistency(n=4,vote=line)", "best-of-n(n=4)",
            "deepconf(n=4,warmup=2,window=16,vote=line)",
            "parallel-probe(n=4,every=32,probe=' So the answer is',probe_tokens=8,stable=2,warmup=2,vote=line)",
            "entropy-fork(vote=line)", "beam-search(width=4)",
            "tree-of-thoughts(propose=2,keep=1,thought_tokens=32)", "aspects", "skeleton-of-thought",
            "pacore(answer_tokens=64)", "hogwild(workers=2,tokens=64)",
        ),
        (
            "multiplication", "leg_counting(min_animals=2,max_animals=2)", "chain_sum(max_digits=2,max_terms=3)",
            "products(max_digits=2)", "letter_counting", "spell_backward(max_word_len=5)",
            "number_filtering(max_numbers=5)", "prime_factorization(max_value=100)",
            "needle_haystack(max_num_statements=20)", "word_sorting(max_words=5)",
        ),
        problems=5, seeds=3, max_new_tokens=160, budget=None,
    ),
    # Accuracy against the length of irrelevant context: all of it in view, each passage in a thread of its own, and
    # passage after passage discarded for a summary.
    "context-rot": Preset(
        ("smollm2-adaptive", "smollm2"),
        (
            "plain", "threadweaver", "select-passages", "select-passages(threadweaver)", "running-summary",
            "running-summary(threadweaver)",
        ),
        tuple(f"buried({task},filler={words})" for words in (0, 75, 250, 750) for task in ("whereabouts", "bills")),
        problems=8, seeds=1, max_new_tokens=320, budget=None,
    ),
}  # fmt: skip


def run(options: Options) -> None:
    """The whole command."""
    from anabranch.evaluation import comparison
    from anabranch.evaluation.comparison import plots

    preset = PRESETS.get(options.preset)
    if preset is None:
        raise Mistake(f"--preset {options.preset!r}: expected one of {', '.join(PRESETS)}", USAGE)
    strategies = _parts("--strategies", options.strategies) or preset.strategies
    if options.url is not None and options.batch > 1:
        raise Mistake("--batch with --url: problems go to a server one at a time; leave --batch out", USAGE)
    if options.url is not None and options.models is None:
        raise Mistake("--url: name the tokenizer of the server's model with --models", USAGE)
    models = _models(_parts("--models", options.models), preset)
    try:
        budget_text = options.budget or preset.budget
        budget = None if budget_text is None else comparison.read_budget(budget_text)
        tasks = _tasks(options, preset)
        _check_strategies(strategies)
        if options.plots is not None:
            plots.require_matplotlib()
    except ValueError as error:
        raise Mistake(str(error), USAGE) from None
    _, err = consoles()
    facts: dict[str, Any] = {"machine": machine_note(), "dtype": options.dtype, "preset": options.preset}
    tokens = options.max_new_tokens or preset.max_new_tokens
    with comparison.Store(options.store) as store:
        if options.retry_errors and (dropped := store.forget_errors()):
            err.print(f"{dropped} errors are tried again", style="dim")
        with _bar(err, shown=not options.as_json and not plain_terminal(err)) as report:
            try:
                outcome = comparison.compare(
                    dict(_engine(name, options) for name in models), strategies, tasks, store,
                    problems=options.problems or preset.problems, seeds=range(options.seeds or preset.seeds),
                    budget=budget, max_new_tokens=tokens, batch=options.batch, facts=facts, report=report,
                )  # fmt: skip
            except KeyboardInterrupt:
                raise KeyboardInterrupt(
                    f"{len(store.rows())} results are in {options.store}; the same command goes on from there"
                ) from None
        found = comparison.cells(store.rows(), outcome.keys)
        runs = store.runs()
    drawn = plots.save_plots(found, options.plots) if options.plots is not None else []
    if options.as_json:
        print(json.dumps(_report(options, outcome, found, runs, drawn), ensure_ascii=False))
    else:
        _show(options, outcome, found, facts, drawn)


def _parts(option: str, text: str | None) -> tuple[str, ...]:
    from anabranch.strategies.registry import split

    if text is None:
        return ()
    try:
        parts = tuple(split(text))
    except ValueError as error:
        raise Mistake(f"{option} {error}", USAGE) from None
    if not parts:
        raise Mistake(f"{option} is empty: name at least one", USAGE)
    return parts


def _models(given: tuple[str, ...], preset: Preset) -> tuple[str, ...]:
    """Those asked for, checked; or the preset's that are on this machine."""
    from anabranch import models

    for name in given:
        if name not in models.names() and not (Path(name).expanduser() / "config.json").is_file():
            close = nearest(name, models.names(), 2)
            near = f"did you mean {' or '.join(close)}? " if close else ""
            known = ", ".join(models.names())
            raise Mistake(f"--models: no model {name!r}; {near}Known: {known}, or a Transformers folder", USAGE)
    return given or tuple(name for name in preset.models if _here(name))


def _here(name: str) -> bool:
    from anabranch import models

    try:
        models.path(name)
    except (models.ModelUnavailable, OSError):
        return False
    return True


def _tasks(options: Options, preset: Preset) -> list[Task]:
    from anabranch.evaluation import comparison

    return [comparison.find_task(name) for name in _parts("--tasks", options.tasks) or preset.tasks]


def _check_strategies(names: tuple[str, ...]) -> None:
    from anabranch.strategies import registry

    for name in names:
        registry.parse(name)


def _engine(name: str, options: Options) -> tuple[str, Callable[[], Any]]:
    """What a model is stored as, and what makes its engine."""

    def local() -> Any:
        import anabranch as ab

        model, tokenizer, _ = load_model(name, options.dtype)
        # Eager from the first problem to the last: "auto" would begin to compile in mid-run, and seconds before and
        # after would not be comparable.
        return ab.Engine(model, tokenizer, compile=False)

    def remote() -> Any:
        import anabranch as ab

        return ab.RemoteEngine(str(options.url), load_tokenizer(name), options.api_key)

    return (name, local) if options.url is None else (f"{name} at {options.url}", remote)


def _bar(console: Console, shown: bool) -> AbstractContextManager[Callable[[str, int, int], None]]:
    """Context: report(where, done, total)."""
    if not shown:
        return nullcontext(lambda where, done, total: None)
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    @contextmanager
    def bar() -> Iterator[Callable[[str, int, int], None]]:
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("")
            yield lambda where, done, total: progress.update(task, description=where, completed=done, total=total)

    return bar()


def _report(
    options: Options, outcome: Outcome, found: list[Cell], runs: list[dict[str, Any]], drawn: list[Path]
) -> dict[str, Any]:
    """``--json``. runs: the facts of every call that wrote to the store, this one's last."""
    import anabranch as ab
    from anabranch.evaluation.comparison.summary import ALL

    return {
        "schema": "anabranch.compare", "version": 1, "anabranch": ab.__version__, "preset": options.preset,
        "store": str(options.store), "settings": json.loads(outcome.settings), "stopped": outcome.stopped,
        "results": {"new": outcome.new, "there": outcome.there},
        "cells": [cell.as_dict() for cell in found if cell.task != ALL],
        "totals": [cell.as_dict() for cell in found if cell.task == ALL],
        "skipped": [vars(skip) for skip in outcome.skipped], "plots": [str(path) for path in drawn],
        "machine": {"note": runs[-1]["machine"]}, "runs": runs,
    }  # fmt: skip


def _show(options: Options, outcome: Outcome, found: list[Cell], facts: dict[str, Any], drawn: list[Path]) -> None:
    out, _ = consoles()
    if found:
        out.print(table(found))
    for skip in outcome.skipped:
        out.print(f"left out: {skip.what} with {skip.model}: {skip.why}", style="dim", markup=False)
    for cell in found:
        if cell.first_error is not None and cell.task != "all tasks":
            where = f"{cell.model}, {cell.task}, {cell.strategy}"
            out.print(f"{cell.errors} errors: {where}: {cell.first_error:.200}", style="yellow", markup=False)
    if outcome.stopped:
        out.print("stopped by the budget; the same command goes on from there", style="yellow")
    for path in drawn:
        out.print(f"{path} written", style="dim", markup=False)
    lines = (
        "right: with 95 % Wilson intervals; tokens, critical path and seconds: a problem; context and pages: the most",
        *((f"seconds: with {options.batch} answers under way at a time",) if options.batch > 1 else ()),
        f"{outcome.new} results are new, {outcome.there} were in {options.store}; {facts['machine']}",
    )
    for line in lines:
        out.print(line, style="dim", markup=False)


def table(found: list[Cell]) -> Table:
    """One row a model, task and strategy; all tasks together at the end."""
    from rich.markup import escape
    from rich.table import Table

    t = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    heads = ("model", "task", "strategy", "n", "right", "95 %", "tokens", "critical", "s", "context", "pages")
    for head in (*heads, "deciding", "forks", "broken", "errors"):
        t.add_column(
            head, justify="left" if head in heads[:3] else "right", no_wrap=head not in heads[:3], overflow="fold"
        )
    last: tuple[str, str] | None = None
    for cell in found:
        place = (cell.model, cell.task)
        if last is not None and place != last:
            t.add_section()
        low, high = cell.accuracy_95
        right = "–" if cell.accuracy is None else f"{100 * cell.accuracy:.0f} %"
        between = "–" if cell.accuracy is None else f"{100 * low:.0f}–{100 * high:.0f}"
        t.add_row(
            *(escape(name) if place != last else "" for name in place), escape(cell.strategy), str(cell.problems),
            right, between, f"{cell.total_tokens:.0f}", f"{cell.critical_path_tokens:.0f}", f"{cell.wall_seconds:.2f}",
            str(cell.longest_context), str(cell.pages_peak), f"{100 * cell.overhead:.1f} %",
            f"{100 * cell.trigger_rate:.0f} %", f"{100 * cell.malformed_rate:.0f} %",
            f"[yellow]{cell.errors}[/yellow]" if cell.errors else "0",
        )  # fmt: skip
        last = place
    return t
