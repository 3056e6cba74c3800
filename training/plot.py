"""The README's figure of the two models, from committed results: ``python -m training.plot --out docs``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
CARDS = {
    "multiplication": "eval-multiplication.json",
    "SmolLM2-135M\nwith our adapter": "eval-smollm2-adaptive.json",
    "SmolLM2-135M\nstock": "eval-smollm2-stock.json",
}
MODES = {"forked": "#0b7285", "sequential": "#66a5ad", "plain": "#adb5bd"}


def draw(cards: dict[str, dict[str, Any]], out: Path) -> list[Path]:
    """Accuracy with 95 % intervals, and what forking saves in tokens and in wall clock."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.9), gridspec_kw={"width_ratios": [1.25, 1]})
    for i, card in enumerate(cards.values()):
        modes = [m for m in MODES if m in card["modes"]]
        for j, mode in enumerate(modes):
            m = card["modes"][mode]
            low, high = m["accuracy_95"]
            x = i + (j - (len(modes) - 1) / 2) * 0.26
            share = 100 * m["accuracy"]
            left.bar(x, share, 0.24, color=MODES[mode])
            left.errorbar(x, share, [[share - 100 * low], [100 * high - share]], color="#343a40", capsize=2, lw=1)
            left.text(x, min(100 * high + 2, 104), f"{share:.1f}", ha="center", fontsize=8)
    left.set_xticks(range(len(cards)), cards)
    left.set_ylim(0, 112)
    left.set_ylabel("right answers, %")
    left.set_title("held-out problems", loc="left", fontweight="bold")
    left.legend([plt.Rectangle((0, 0), 1, 1, color=c) for c in MODES.values()], MODES, loc="center right", fontsize=8)
    rows = []
    for name, card in cards.items():
        if "forked" in card["modes"]:
            title = name.replace("\n", " ")
            rows.append((f"{title}: tokens", card["modes"]["forked"]["token_speedup_where_forked"], None))
            if "where_forked" in card.get("timed", {}):
                timed = card["timed"]["where_forked"]
                rows.append((f"{title}: wall clock", timed["speedup"], timed["speedup_95"]))
    for y, (_, value, interval) in enumerate(reversed(rows)):
        right.barh(y, value, 0.6, color="#0b7285" if interval is None else "#d0a85c")
        if interval is not None:
            right.errorbar(
                value, y, xerr=[[value - interval[0]], [interval[1] - value]], color="#343a40", capsize=2, lw=1
            )
        right.text((interval or (0, value))[1] + 0.05, y, f"{value:.2f}×", va="center", fontsize=9)
    right.set_yticks(range(len(rows)), [label for label, *_ in reversed(rows)], fontsize=8)
    right.axvline(1, color="#868e96", lw=0.8)
    right.set_xlim(0, max(v for _, v, _ in rows) * 1.25)
    right.set_title("against its own sequential run", loc="left", fontweight="bold")
    right.set_xlabel("times as short, where it forks")
    figure.tight_layout()
    paths = [out / f"adaptive.{kind}" for kind in ("svg", "png")]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths


def main(out: Annotated[Path, typer.Option(help="Folder for adaptive.svg and .png.")] = Path("docs")) -> None:
    """Draw it."""
    cards = {
        name: json.loads((RESULTS / file).read_text()) for name, file in CARDS.items() if (RESULTS / file).is_file()
    }
    for name, card in cards.items():  # the wall clock may have been measured by itself, over fewer problems
        timed = RESULTS / CARDS[name].replace(".json", "-timed.json")
        if timed.is_file():
            card["timed"] = json.loads(timed.read_text())["timed"]
    for path in draw(cards, out):
        print(path)


if __name__ == "__main__":
    typer.run(main)
