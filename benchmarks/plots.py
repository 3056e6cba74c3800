"""Figures from a results file: attention over shapes, end to end, serving, the simulated fleet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .report import OURS, PEERS, in_order, median
from .report_load import ROUTES

# One colour a contender in every figure; ours stands out, peers are calm.
COLOURS = {
    OURS: "#0b7285",
    "sdpa": "#adb5bd",
    "sdpa_packed": "#343a40",
    "masked": "#f08c00",
    "two_phase": "#c2255c",
    "flex": "#7048e8",
}
MARKERS = {"sdpa_packed": "o", "masked": "s", "two_phase": "D", "flex": "^"}
STYLE = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#868e96",
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "svg.fonttype": "none",
    "svg.hashsalt": "anabranch",
}


def draw(data: dict[str, Any], folder: Path) -> list[Path]:
    """Draw what the results allow into `folder`, as SVG and PNG; returns the files."""
    try:
        import matplotlib
    except ImportError:
        raise ModuleNotFoundError("figures need matplotlib: pip install 'anabranch[plots]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    out: list[Path] = []
    with plt.rc_context(STYLE):
        figures = {
            "attention": _attention(data, plt), "end-to-end": _end_to_end(data, plt), "serving": _serving(data, plt),
            "fleet": _fleet(data, plt),
        }  # fmt: skip
        for name, figure in figures.items():
            if figure is None:
                continue
            for suffix in ("svg", "png"):
                path = folder / f"benchmark-{name}.{suffix}"
                metadata = {"Date": None} if suffix == "svg" else None  # the same data gives the same file
                figure.savefig(path, dpi=150, bbox_inches="tight", metadata=metadata)
                out.append(path)
            plt.close(figure)
    return out


def _threads(machine: dict[str, Any]) -> str:
    one = machine["threads"] == 1
    clock = ", CPU time" if machine.get("clock") == "cpu" else ""
    return f"{machine['threads']} thread{'' if one else 's'}{clock}"


def _label(name: str) -> str:
    """`1,16,64 / 1024,256,32` on two lines where it is long."""
    return name.replace(" / ", "\n/ ") if len(name) > 24 else name


def _attention(data: dict[str, Any], plt):
    """Speed-up over per-branch SDPA by shape: one dot a contender, a bar for the machine's ceiling."""
    dtypes = [d for d in ("float32", "bfloat16") if any(e["dtype"] == d for e in data.get("attention", []))]
    panels = []
    for dtype in dtypes:
        entries = [
            e
            for e in in_order(data["attention"])
            if (e["dtype"], e["heads"], e["head_dim"]) == (dtype, "32/8", 128) and median(e, "sdpa") and median(e, OURS)
        ]
        if entries:
            panels.append((dtype, entries))
    if not panels:
        return None
    rows = max(len(entries) for _, entries in panels)
    figure, axes = plt.subplots(1, len(panels), figsize=(6.2 * len(panels), 1.6 + 0.36 * rows), squeeze=False)
    for axis, (dtype, entries) in zip(axes[0], panels, strict=True):
        y = range(len(entries))
        base = [median(e, "sdpa") for e in entries]
        ceiling = [b / e["floor_us"] for b, e in zip(base, entries, strict=True)]
        axis.barh(y, ceiling, height=0.72, color="#e9ecef", zorder=1, label="the machine's ceiling")
        ours = [b / median(e, OURS) for b, e in zip(base, entries, strict=True)]
        axis.barh(y, ours, height=0.44, color=COLOURS[OURS], zorder=2, label="anabranch")
        for peer in PEERS:
            points = [(b / m, i) for i, (b, e) in enumerate(zip(base, entries, strict=True)) if (m := median(e, peer))]
            if peer == "sdpa" or not points:
                continue
            xs, ys = zip(*points, strict=True)
            axis.scatter(
                xs,
                ys,
                s=34,
                marker=MARKERS[peer],
                color=COLOURS[peer],
                edgecolor="white",
                linewidth=0.8,
                zorder=3,
                label=PEERS[peer],
            )
        axis.axvline(1, color="#495057", linewidth=1, zorder=4)
        for i, value in enumerate(ours):
            # Behind the last marker, so that a faster peer is not covered by our number.
            furthest = max(base[i] / m for c in (OURS, *MARKERS) if (m := median(entries[i], c)))
            axis.text(
                furthest * 1.08,
                i,
                f"{value:.1f}×",
                va="center",
                ha="left",
                fontsize=8.5,
                fontweight="bold",
                color=COLOURS[OURS],
                zorder=5,
                bbox={"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
            )
        axis.set_xscale("log")
        axis.set_yticks(list(y), [_label(e["case"]) for e in entries], fontsize=8.5)
        axis.invert_yaxis()
        axis.set_title(dtype)
        axis.set_xlabel("speed-up over SDPA with a dense K and V per branch (log scale)")
        axis.xaxis.set_major_formatter(plt.FuncFormatter(lambda v, _: f"{v:g}×"))
        axis.grid(axis="x", color="#dee2e6", linewidth=0.6, zorder=0)
        axis.set_axisbelow(True)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="lower center",
        ncol=len(labels),
        frameon=False,
        fontsize=9,
        bbox_to_anchor=(0.5, -0.02 - 0.2 / (1.6 + 0.36 * rows)),
    )
    m = data["machine"]
    figure.suptitle(
        f"Attention over trees, 32/8 heads, head_dim 128 · {m['cpu']}, {_threads(m)}",
        x=0.01,
        ha="left",
        fontsize=11.5,
        fontweight="bold",
    )
    figure.tight_layout()
    return figure


E2E_COLOURS = {"anabranch": "#0b7285", "generate": "#adb5bd", "generate_reused": "#868e96", "vllm": "#d0a85c"}


def _end_to_end(data: dict[str, Any], plt):
    """Tokens a second, in all and decoding alone, one group of bars a prompt."""
    entries = [e for e in data.get("e2e", []) if "left_out" not in e]
    keys = list(dict.fromkeys((e["dtype"], e["prompt"], e["n"]) for e in entries))
    if not keys:
        return None
    names = [n for n in E2E_COLOURS if any(e["contender"] == n for e in entries)]
    titles = {e["contender"]: e["title"] for e in entries}
    figure, axes = plt.subplots(1, 2, figsize=(12.4, 1.8 + 0.28 * len(keys) * len(names)), sharey=True)
    height = 0.8 / len(names)
    for axis, field, title in (
        (axes[0], "total_tokens_per_s", "in all: prompt and decoding"),
        (axes[1], "decode_tokens_per_s", "decoding alone"),
    ):
        for j, name in enumerate(names):
            found = [
                (i, e[field])
                for i, key in enumerate(keys)
                for e in entries
                if e["contender"] == name and (e["dtype"], e["prompt"], e["n"]) == key
            ]
            ys = [i + (j - (len(names) - 1) / 2) * height for i, _ in found]
            axis.barh(ys, [v for _, v in found], height=0.9 * height, color=E2E_COLOURS[name], label=titles[name])
            for y, (_, value) in zip(ys, found, strict=True):
                axis.text(
                    value,
                    y,
                    f" {value:.0f}" if value >= 10 else f" {value:.1f}",
                    va="center",
                    fontsize=8.5,
                    fontweight="bold" if name == OURS else "normal",
                )
        axis.set_title(title)
        axis.set_xlabel("tokens a second")
        axis.grid(axis="x", color="#dee2e6", linewidth=0.6)
        axis.set_axisbelow(True)
    tokens = {(e["dtype"], e["prompt"], e["n"]): e["prompt_tokens"] for e in entries}
    labels = [f"{k[0]}\n{k[2]} {'branches' if k[2] > 1 else 'sequence'}, {tokens[k]:,}-token prompt" for k in keys]
    axes[0].set_yticks(range(len(keys)), labels)
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=len(labels), frameon=False, bbox_to_anchor=(0.5, -0.06))
    m = data["machine"]
    figure.suptitle(
        f"SmolLM2-135M, end to end · {m['cpu']}, {_threads(m)}", x=0.01, ha="left", fontsize=11.5, fontweight="bold"
    )
    figure.tight_layout()
    return figure


SERVE_COLOURS = {"anabranch": "#0b7285", "no_prefix_cache": "#66c2cf", "vllm": "#d0a85c", "continuous": "#868e96",
                 "generate": "#ced4da"}  # fmt: skip


def _serving(data: dict[str, Any], plt):
    """By load: tokens a second, and from median to p99 the waits for the first token and between two."""
    entries = [e for e in data.get("serve", []) if "left_out" not in e]
    keys = list(dict.fromkeys((e["dtype"], e["answers"], e["rate"]) for e in entries))
    if not keys:
        return None
    names = [n for n in SERVE_COLOURS if any(e["contender"] == n for e in entries)]
    figure, axes = plt.subplots(
        1, 3, figsize=(13, 1.8 + 0.22 * len(keys) * len(names)), sharey=True, layout="constrained"
    )
    height = 0.8 / len(names)
    for j, name in enumerate(names):
        found = [(keys.index((e["dtype"], e["answers"], e["rate"])), e) for e in entries if e["contender"] == name]
        ys = [i + (j - (len(names) - 1) / 2) * height for i, _ in found]
        colour, rates = SERVE_COLOURS[name], [e["tokens_per_s"] for _, e in found]
        axes[0].barh(ys, rates, height=0.9 * height, color=colour, label=found[0][1]["title"])
        for axis, what in ((axes[1], "first"), (axes[2], "gap")):
            half, most = ([1e3 * e[f"{what}_{p}"] for _, e in found] for p in ("p50", "p99"))
            axis.hlines(ys, half, most, colors=colour, linewidth=3)
            axis.scatter(half, ys, s=46, color=colour, zorder=3)
            axis.scatter(most, ys, s=90, color=colour, marker="|", linewidth=2)
    axes[0].set(xlabel="tokens a second", title="throughput")
    for axis, title in ((axes[1], "to the first token"), (axes[2], "between two tokens")):
        axis.set(xlabel="ms, from p50 (dot) to p99 (log scale)", title=title, xscale="log")
        for which in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
            which(plt.FuncFormatter(lambda v, _: f"{v:g}" if f"{v:.0e}"[0] in "125" else ""))
    for axis in axes:
        axis.grid(axis="x", color="#dee2e6", linewidth=0.6)
        axis.set_axisbelow(True)
    axes[0].set_yticks(range(len(keys)), [f"{answers}, {dtype}\n{rate:g} requests/s" for dtype, answers, rate in keys])
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=3, frameon=False)
    m = data["machine"]
    figure.suptitle(
        f"SmolLM2-135M, Poisson arrivals · {m['cpu']}, {_threads(m)}", x=0.01, ha="left", fontsize=11.5,
        fontweight="bold",
    )  # fmt: skip
    return figure


def _fleet(data: dict[str, Any], plt):
    """The simulated fleet: branches held, what routing is worth, where forks stop to pay."""
    fleet = data.get("fleet")
    if fleet is None:
        return None
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    for kind, colour, words in (("shared", COLOURS[OURS], "one shared context"), ("alone", "#868e96", "one each")):
        held = [e for e in fleet["held"] if e["kind"] == kind]
        left.plot([e["branches"] for e in held], [e["tokens_per_s"] for e in held], "o-", color=colour, label=words)
    left.set(title="Branches on a replica", xlabel="branches", ylabel="tokens a second", xscale="log")
    for route, colour in (("prefix", COLOURS[OURS]), ("turns", "#868e96"), ("least", "#f08c00")):
        entries = [e for e in fleet["routing"] if e["route"] == route]
        middle.plot([e["rate"] for e in entries], [e["mean"] for e in entries], "o-", color=colour, label=ROUTES[route])
    middle.set(title="Routing", xlabel="requests a second", ylabel="mean latency, s", yscale="log")
    for (more, entries), line in zip(fleet["forking"].items(), ("-", "--"), strict=False):
        for kind, colour in (("forked", COLOURS[OURS]), ("one thread", "#868e96")):
            chosen = [e for e in entries if e["kind"] == kind]
            if kind == "forked" or line == "-":
                words = kind if kind != "forked" or line == "-" else f"forked, {float(more):.0%} more tokens"
                right.plot(
                    [e["rate"] for e in chosen], [e["mean"] for e in chosen], f"o{line}", color=colour, label=words
                )
    right.set(title="Forks", xlabel="requests a second", ylabel="mean latency, s", yscale="log")
    for axes in (left, middle, right):
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle("Simulation, from measured costs of steps", fontsize=9, color="#868e96")
    return figure
