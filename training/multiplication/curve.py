"""Draws log.jsonl of a training run as curve.png: ``python -m training.multiplication.curve log.jsonl curve.png``."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    log, image = map(Path, sys.argv[1:3])
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    minutes = [x["minutes"] for x in lines]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.semilogy(minutes, [x["loss"] for x in lines], label="training loss")
    left.semilogy(minutes, [max(x["rows_wrong"], 1e-5) for x in lines], label="dev rows wrong")
    right.plot(minutes, [x["forked"] * 100 for x in lines], label="forked")
    right.plot(minutes, [x["plain"] * 100 for x in lines], label="plain", linestyle="--")
    right.set_ylabel("dev traces right in whole, %")
    right.set_ylim(0, 101)
    for axis in (left, right):
        axis.set_xlabel("minutes on one core")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(image, dpi=130)


if __name__ == "__main__":
    main()
