"""Plots of a comparison: accuracy by task, against what it costs, and against the length of irrelevant context."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from anabranch.evaluation.comparison.buried import buried_of
from anabranch.evaluation.comparison.summary import ALL, Cell

__all__ = ["require_matplotlib", "save_plots"]


def require_matplotlib() -> None:
    """ValueError that says how to install it, where it is missing."""
    if find_spec("matplotlib") is None:
        raise ValueError("plots need matplotlib: pip install 'anabranch[plots]'")


def save_plots(found: Sequence[Cell], folder: str | os.PathLike[str], kind: str = "svg") -> list[Path]:
    """Write ``compare-accuracy`` and ``compare-cost`` into `folder`, which is made if need be; their paths.

    Where a task is there with several lengths of filler (``buried(TASK,filler=…)``), ``compare-context`` as well.

    kind: "svg", "png" or "pdf".

    Raises:
        ValueError: there is nothing to draw, or matplotlib is missing.
        OSError: the folder cannot be written.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    judged = [cell for cell in found if cell.accuracy is not None]
    if not judged:
        raise ValueError("plots: no result to draw; run more problems")
    models = list(dict.fromkeys(cell.model for cell in judged))
    strategies = list(dict.fromkeys(cell.strategy for cell in judged))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, draw, width in (("accuracy", _accuracy, 7.0), ("cost", _cost, 5.0)):
        wide = width * len(models)
        ncols = _columns(strategies, wide)
        figure = Figure(figsize=(wide, 4.2 + 0.18 * math.ceil(len(strategies) / ncols)), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
            draw(axes, [cell for cell in judged if cell.model == model], strategies)
            axes.set_title(model)
            axes.set_ylim(-0.03, 1.04)  # so that points at either end are seen whole
            axes.yaxis.grid(True, alpha=0.3)
            axes.set_axisbelow(True)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        for axes in figure.axes[1:]:
            more = zip(*axes.get_legend_handles_labels(), strict=True)
            handles, labels = _added(handles, labels, more)
        figure.legend(handles, labels, loc="outside lower center", ncols=ncols, fontsize="small")
        path = folder / f"compare-{name}.{kind}"
        figure.savefig(path)
        paths.append(path)
    if panels := _buried_panels(judged):
        paths.append(_save_context(panels, folder / f"compare-context.{kind}"))
    return paths


Panels = dict[tuple[str, str], dict[str, list[tuple[int, Cell]]]]


def _buried_panels(judged: Sequence[Cell]) -> Panels:
    """For each model and task with several lengths of filler: each strategy's cells, by words of filler."""
    panels: Panels = {}
    for cell in judged:
        if (found := buried_of(cell.task)) is not None:
            task, words = found
            panels.setdefault((cell.model, task), {}).setdefault(cell.strategy, []).append((words, cell))
    for lines in panels.values():
        for line in lines.values():
            line.sort(key=lambda point: point[0])
    return {panel: lines for panel, lines in panels.items() if len({w for line in lines.values() for w, _ in line}) > 1}


def _save_context(panels: Panels, path: Path) -> Path:
    """One column a model and task: right answers, and below them the longest context that any thread saw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(panels), 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    columns = figure.subplots(2, len(panels), squeeze=False, sharex="col", height_ratios=(3, 2)).T
    strategies = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    shown: dict[str, Any] = {}
    for (top, bottom), ((model, task), lines) in zip(columns, panels.items(), strict=True):
        lengths = sorted({words for line in lines.values() for words, _ in line})
        for strategy, line in lines.items():
            number = strategies.index(strategy)
            x = [lengths.index(words) + 0.05 * (number - (len(strategies) - 1) / 2) for words, _ in line]
            bars = [list(side) for side in zip(*(_error(cell) for _, cell in line), strict=True)]
            looks: dict[str, Any] = {"color": _colour(number, len(strategies)), "marker": "o", "markersize": 4}
            accuracy = [cell.accuracy for _, cell in line]
            shown[strategy] = top.errorbar(x, accuracy, yerr=bars, capsize=2, elinewidth=0.8, **looks)
            bottom.plot(x, [cell.longest_context for _, cell in line], **looks)
        top.set_title(f"{model}: {task}", fontsize="medium")
        top.set_ylim(-0.03, 1.04)
        top.set_ylabel("right, with 95 % intervals")
        bottom.set_ylabel("longest context, tokens")
        bottom.set_ylim(bottom=0)
        bottom.set_xticks(range(len(lengths)), lengths)
        bottom.set_xlabel("words that have nothing to do with the problem")
        for axes in (top, bottom):
            axes.yaxis.grid(True, alpha=0.3)
    ncols = _columns(strategies, 5.2 * len(panels))
    figure.legend(list(shown.values()), list(shown), loc="outside lower center", ncols=ncols, fontsize="small")
    figure.savefig(path)
    return path


def _columns(labels: Sequence[str], inches: float) -> int:
    """Columns of a legend that fit: about 5 points a character, 40 for the mark and the gap."""
    return max(1, min(3, int(inches * 72 / (5 * max(map(len, labels)) + 40))))


def _colour(number: int, of: int) -> Any:
    """Of strategy `number`: told apart up to twenty."""
    from matplotlib import colormaps

    return f"C{number}" if of <= 10 else colormaps["tab20"](number % 20)


def _added(handles: list[Any], labels: list[str], more: Any) -> tuple[list[Any], list[str]]:
    for handle, label in more:
        if label not in labels:
            handles, labels = [*handles, handle], [*labels, label]
    return handles, labels


def _error(cell: Cell) -> tuple[float, float]:
    assert cell.accuracy is not None
    low, high = cell.accuracy_95
    return max(0.0, cell.accuracy - low), max(0.0, high - cell.accuracy)


def _accuracy(axes: Any, mine: Sequence[Cell], strategies: Sequence[str]) -> None:
    tasks = list(dict.fromkeys(cell.task for cell in mine))
    width = 0.8 / len(strategies)
    for number, strategy in enumerate(strategies):
        some = [cell for cell in mine if cell.strategy == strategy]
        if some:
            x = [tasks.index(cell.task) + (number - (len(strategies) - 1) / 2) * width for cell in some]
            errors = [list(side) for side in zip(*map(_error, some), strict=True)]
            axes.bar(
                x, [cell.accuracy for cell in some], width, yerr=errors, label=strategy,
                color=_colour(number, len(strategies)), error_kw={"elinewidth": 0.8, "alpha": 0.7},
            )  # fmt: skip
    axes.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right", fontsize="small")
    axes.set_ylabel("right, with 95 % intervals")


def _cost(axes: Any, mine: Sequence[Cell], strategies: Sequence[str]) -> None:
    for cell in mine:
        if cell.task == ALL:
            number = strategies.index(cell.strategy)
            axes.errorbar(
                cell.critical_path_tokens, cell.accuracy, yerr=[[side] for side in _error(cell)], fmt="o",
                color=_colour(number, len(strategies)), label=cell.strategy, capsize=2, elinewidth=0.8,
            )  # fmt: skip
            axes.plot(
                [cell.critical_path_tokens, cell.total_tokens],
                [cell.accuracy] * 2,
                color=_colour(number, len(strategies)),
                alpha=0.35,
            )
    axes.set_xlabel("tokens a problem: critical path (dot) to all (end of the line)")
    axes.set_ylabel("right over all tasks")
    axes.set_xlim(left=0)
