"""The training curve of a run: ``python -m training.adaptive.curve runs/adaptive/log.jsonl --out curve.png``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def main(log: Path, out: Annotated[Path, typer.Option(help="Image to write.")] = Path("curve.png")) -> None:
    """Loss on a logarithmic scale, and the share of dev problems that come out token for token."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [x for x in lines if "loss" in x]
    checks = [x for x in lines if "forked_exact" in x]
    figure, axis = plt.subplots(figsize=(8, 3.6))
    axis.semilogy([x["minutes"] for x in steps], [x["loss"] for x in steps], color="#0b7285", label="training loss")
    axis.set_xlabel("minutes")
    axis.set_ylabel("loss (weighted cross entropy, nats)")
    other = axis.twinx()
    for key, colour in (("forked_exact", "#d0a85c"), ("plain_exact", "#868e96")):
        other.plot([x["minutes"] for x in checks], [100 * x[key] for x in checks], "o-", color=colour, label=key)
    other.set_ylim(0, 100)
    other.set_ylabel("dev problems exact, %")
    axis.legend(loc="upper left", fontsize=8)
    other.legend(loc="upper right", fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    typer.run(main)
