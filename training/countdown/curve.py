"""Draws a run: ``python -m training.countdown.curve log.jsonl card.json curve.png``.

Left: how training went, from the trainer's log.jsonl; right: answers found within a context, from the score card.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

COLOURS = {"sub-searches": "#0b7285", "serial": "#d9480f"}
FAMILY = "4 numbers, hard"


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    log, card, image = map(Path, sys.argv[1:4])
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    modes = json.loads(card.read_text())["modes"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.7), layout="constrained")
    minutes = [x["cpu_minutes"] for x in lines]
    left.semilogy(minutes, [x["loss"] for x in lines], label="training loss")
    left.semilogy(minutes, [max(x["tokens_wrong"], 1e-5) for x in lines], label="dev tokens wrong")
    left.set_xlabel("minutes of a core")
    for mode, families in modes.items():
        of = families[FAMILY]
        for kind, style in (("within", "-"), ("written_out_within", ":")):
            contexts = [int(c) for c in of[kind]]
            name = mode if kind == "within" else f"{mode}, no mistakes"
            right.plot(contexts, [100 * of[kind][str(c)] for c in contexts], style, color=COLOURS[mode], label=name)
    right.set_xlabel("longest context, tokens")
    right.set_ylabel(f"{FAMILY}: right, %")
    right.set_ylim(0, 101)
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(image, dpi=130)


if __name__ == "__main__":
    main()
