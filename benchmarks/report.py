"""Results as text: tables for the terminal and Markdown for documents, both from the results file's dict."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from .report_load import serve_markdown
from .shapes import all_cases
from .tables import head, micro, row

SECTIONS = ("attention", "e2e", "step", "host", "branch", "serve")
OURS = "anabranch"
PEERS = {
    "sdpa": "SDPA per branch",
    "sdpa_packed": "SDPA, GQA packed",
    "masked": "dense masked SDPA",
    "two_phase": "two-phase torch",
    "flex": "FlexAttention",
}
SHORT = {"sdpa": "SDPA", "sdpa_packed": "packed", "masked": "masked", "two_phase": "2-ph.", "flex": "Flex"}


def median(entry: dict[str, Any], name: str) -> float | None:
    return entry.get("contenders", {}).get(name, {}).get("median_us")


def in_order(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries in the order of shapes.py, whatever the order they were measured in."""
    place = {case.name: i for i, case in enumerate(all_cases())}
    return sorted(entries, key=lambda e: place.get(e["case"], len(place)))


def ratio(entry: dict[str, Any], name: str) -> float | None:
    """How many times as long as ours `name` takes."""
    ours, theirs = median(entry, OURS), median(entry, name)
    return theirs / ours if ours and theirs else None


def of_floor(entry: dict[str, Any]) -> float | None:
    """The floor as a share of our time: 1 would be the machine's own ceiling."""
    ours = median(entry, OURS)
    return entry["floor_us"] / ours if ours else None


def _times(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}×" if value >= 20 else f"{value:.1f}×" if value >= 1.95 else f"{value:.2f}×"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def case_line(entry: dict[str, Any]) -> str:
    """One finished case as a line for the terminal."""
    label = f"[bold]{escape(entry['case'])}[/bold] {entry['heads']} D{entry['head_dim']} {entry['dtype']}"
    if "left_out" in entry:
        return f"{label}: [yellow]left out[/yellow], {escape(entry['left_out'])}"
    parts = [f"floor {micro(entry['floor_us'])}"]
    for name, result in entry["contenders"].items():
        if "left_out" in result:
            parts.append(f"[yellow]{name}: {escape(result['left_out'])}[/yellow]")
        elif name == OURS:
            share = _percent(of_floor(entry))
            parts.append(f"[green]{name} {micro(result['median_us'])}[/green] ({share} of the ceiling)")
        else:
            times = ratio(entry, name)
            parts.append(f"{name} {micro(result['median_us'])}" + (f" ({_times(times)})" if times else ""))
    return f"{label}: " + ", ".join(parts)


def _shape(entry: dict[str, Any]) -> str:
    """Heads, dtype and, where it is not 128, head_dim in one short cell: 32/8 f32, 32/8 bf16 D64."""
    dtype = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}.get(entry["dtype"], entry["dtype"])
    return f"{entry['heads']} {dtype}" + (f" D{entry['head_dim']}" if entry["head_dim"] != 128 else "")


def attention_table(data: dict[str, Any]) -> Table:
    """The whole attention table for the terminal, 80 columns wide; peers as multiples of our time."""
    table = Table(
        title="Attention: peers as multiples of our time (above 1: slower than ours)",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("case", min_width=13, overflow="fold")
    table.add_column("shape", no_wrap=True)
    for name in ("ours", "ceil.", *SHORT.values()):
        table.add_column(name, justify="right", no_wrap=True)
    for e in in_order(data.get("attention", [])):
        if "left_out" in e:
            table.add_row(escape(e["case"]), _shape(e), "–", "–", *("–" for _ in PEERS))
            continue
        peers = [_times(ratio(e, p)) if ratio(e, p) else micro(median(e, p)) for p in PEERS]
        table.add_row(escape(e["case"]), _shape(e), micro(median(e, OURS)), _percent(of_floor(e)), *peers)
    return table


def host_table(data: dict[str, Any]) -> Table:
    table = Table(title="Host costs", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("what", "median", "min – max", "more"):
        table.add_column(name, justify="left" if name in ("what", "more") else "right")
    for e in data.get("host", []):
        spread = f"{micro(e['min_us'])} – {micro(e['max_us'])}" if "min_us" in e else ""
        table.add_row(escape(e["title"]), micro(e.get("median_us")), spread, escape(e.get("more", "")))
    return table


BRANCH = {
    "masked": "dense masked SDPA",
    "separate": "separate sequences",
    "flex": "FlexAttention",
    "flex_forward": "FlexAttention, forward alone",
}


def branch_line(entry: dict[str, Any]) -> str:
    """One finished case of branch attention as a line for the terminal."""
    label = f"[bold]{escape(entry['case'])}[/bold] {entry['heads']} D{entry['head_dim']} {entry['dtype']}"
    parts = []
    for name, result in entry["contenders"].items():
        if "left_out" in result:
            parts.append(f"[yellow]{name}: {escape(result['left_out'])}[/yellow]")
            continue
        times = ratio(entry, name)
        both = f"{micro(result.get('median_us'))}" + (f" ({_times(times)})" if name != OURS and times else "")
        parts.append(f"{name} {both}, forward {micro(result['forward_us'])}, mask {micro(result['mask_us'])}")
    return f"{label}: " + "; ".join(parts)


def _branch_total(entry: dict[str, Any], name: str) -> float | None:
    """One forward and backward and the mask's making: what a training step with a new mask pays in one layer."""
    time = median(entry, name)
    return None if time is None else time + entry["contenders"][name]["mask_us"]


def branch_table(data: dict[str, Any]) -> Table:
    table = Table(
        title="Branch attention, forward + backward: peers as multiples of our time",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("case", min_width=13, overflow="fold")
    table.add_column("shape", no_wrap=True)
    for name in ("ours", *BRANCH.values()):
        table.add_column(name, justify="right", overflow="fold")
    for e in data.get("branch", []):
        peers = [_times(ratio(e, p)) if ratio(e, p) else "–" for p in BRANCH]
        table.add_row(escape(e["case"]), _shape(e), micro(median(e, OURS)), *peers)
    for e in data.get("branch_masks", []):
        name = f"mask of {e['segments']:,} segments, {e['tokens']:,} tokens"
        table.add_row(name, e["case"], micro(e["median_us"]), *("" for _ in BRANCH))
    for e in data.get("branch_memory", []):
        grown = f"{e['peak_growth_bytes'] / 1e6:.0f} MB" if "peak_growth_bytes" in e else e.get("left_out", "")
        table.add_row(f"peak memory, {escape(e['case'])}", e["contender"], grown, *("" for _ in BRANCH))
    return table


def _branch_markdown(data: dict[str, Any]) -> list[str]:
    """Time with the mask's making shown apart and added, and memory by T."""
    lines = ["Branch attention: training, forward and backward.", ""]
    for e in data["branch"]:
        lines += [
            f"**{e['case']}**, {e['heads']} heads, head_dim {e['head_dim']}, {e['dtype']}; {e['tokens']:,} tokens, "
            f"{100 * e['pairs'] / e['dense_pairs']:.0f} % of all pairs visible",
            "",
            *head("", "forward", "forward + backward", "against ours", "mask made", "with mask", "against ours"),
        ]
        ours = _branch_total(e, OURS)
        for name, title in {OURS: "anabranch", **BRANCH}.items():
            found = e["contenders"].get(name, {})
            if not found or "left_out" in found:
                if found:
                    lines.append(row(title, found["left_out"], "–", "–", "–", "–", "–"))
                continue
            total = _branch_total(e, name)
            lines.append(
                row(
                    title,
                    micro(found["forward_us"]),
                    _spread(e, name),
                    _times(ratio(e, name)),
                    micro(found["mask_us"]),
                    micro(total),
                    _times(total / ours if total and ours else None),
                )
            )
        notes = [f"{BRANCH.get(n, n)}: {f['note']}." for n, f in e["contenders"].items() if f.get("note")]
        lines += ["", *notes, ""] if notes else [""]
    for e in data.get("branch_masks", []):
        spread = f"{micro(e['median_us'])} ({micro(e['min_us'])} – {micro(e['max_us'])})"
        size = f"{e['segments']:,} segments, {e['tokens']:,} tokens, {e['named']:,} parents or visible segments named"
        lines += [f"`BranchMask.{e['case']}`: {size}: {spread}.", ""]
    rows = data.get("branch_memory", [])
    if rows:
        lines += ["Growth of the peak resident set over one forward and backward, 8/2 heads of 64, float32:", ""]
        lines += head("", "tokens", "peak growth", "bytes a token")
        for e in rows:
            if "left_out" in e:
                lines.append(row(e["contender"], f"{e['tokens']:,}", e["left_out"], "–"))
            else:
                grown = f"{e['peak_growth_bytes'] / 1e6:.1f} MB"
                lines.append(row(e["contender"], f"{e['tokens']:,}", grown, f"{e['bytes_per_token']:,}"))
        lines.append("")
    return lines


def e2e_line(entry: dict[str, Any]) -> str:
    label = f"[bold]{entry['contender']}[/bold] {entry['prompt']} prompt, n = {entry['n']}, {entry['dtype']}"
    if "left_out" in entry:
        return f"{label}: [yellow]left out[/yellow], {escape(entry['left_out'])}"
    return (
        f"{label}: {entry['total_tokens_per_s']:.1f} tokens/s in all, decoding {entry['decode_tokens_per_s']:.1f}, "
        f"prefill {entry['prefill_seconds']:.2f} s"
    )


def e2e_table(data: dict[str, Any]) -> Table:
    table = Table(title="End to end: tokens a second", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("prompt, branches, dtype", no_wrap=True)
    table.add_column("contender", min_width=16, overflow="fold")
    for name in ("prefill", "decoding", "in all"):
        table.add_column(name, justify="right", no_wrap=True)
    for e in data.get("e2e", []):
        what = f"{e['prompt']} ×{e['n']} {e['dtype']}"
        if "left_out" in e:
            table.add_row(what, f"{e['title']}: {escape(e['left_out'])}", "–", "–", "–")
            continue
        table.add_row(
            what,
            e["title"],
            f"{e['prefill_seconds']:.2f} s",
            f"{e['decode_tokens_per_s']:.1f}",
            f"{e['total_tokens_per_s']:.1f}",
        )
    return table


# -- Markdown ---------------------------------------------------------------------------------------------------------
STEP_PARTS = ("linear", "attention", "other", "plan", "strategy", "sampling")


STEP_HEAD = ("rows", "dtype", "forward", "step", "× floor", *STEP_PARTS)


def _step_cells(data: dict[str, Any]) -> Iterator[list[str]]:
    for e in sorted(data.get("step", []), key=lambda e: (e["dtype"], e["rows"], e["contender"])):
        if "left_out" in e:
            continue
        how = e["contender"] if e["compiled"] == (e["contender"] == "compiled") else f"{e['contender']} (ran eagerly)"
        parts = (micro(e[f"{part}_us"]) for part in STEP_PARTS)
        yield [str(e["rows"]), e["dtype"], how, micro(e["all_us"]), f"{e['of_floor']:.2f}", *parts]


def step_table(data: dict[str, Any]) -> Table:
    """A decode step by rows: all of it, how many times the floor that is, and its parts."""
    table = Table(title="A decode step", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in STEP_HEAD:
        table.add_column(name, justify="left" if name in ("dtype", "forward") else "right")
    for cells in _step_cells(data):
        table.add_row(*cells)
    return table


def _spread(entry: dict[str, Any], name: str) -> str:
    e = entry["contenders"].get(name, {})
    if "median_us" not in e:
        return "–"
    return f"{micro(e['median_us'])} ({micro(e['min_us'])} – {micro(e['max_us'])})"


def markdown(data: dict[str, Any], full: bool = False) -> str:
    """All sections that the results have, with where and how they were measured above them."""
    out = _where(data)
    if data.get("attention"):
        out += _attention_markdown(data, full)
    if data.get("e2e"):
        out += _e2e_markdown(data)
    if data.get("step"):
        out += _step_markdown(data)
    if data.get("host"):
        out += _host_markdown(data)
    if data.get("branch"):
        out += _branch_markdown(data)
    if data.get("serve"):
        out += serve_markdown(data)
    return "\n".join(out) + "\n"


def _where(data: dict[str, Any]) -> list[str]:
    m, f = data["machine"], data.get("floor")
    versions = ", ".join(f"{k} {v}" for k, v in m["versions"].items() if v)
    entries = [e for section in SECTIONS for e in data.get(section, [])]
    commits = sorted({e["commit"] for e in entries if e.get("commit")})
    loads = [e["load"] for e in entries if e.get("load") is not None]
    threads = f"{m['threads']} thread{'s' * (m['threads'] > 1)}"
    out = [
        f"Measured on {m['cpu']} ({m['cores']} cores, {', '.join(m['isa'])}), {threads}, {m['os']}, "
        f"{'CPU time of one thread, ' if m.get('clock') == 'cpu' else ''}"
        f"Python {m['python']}, {versions}; commit {', '.join(commits)}; {m['date']}."
    ]
    if loads:
        out[0] += f" Load average while measuring: {min(loads):.1f} – {max(loads):.1f}."
    if f:
        rates = ", ".join(f"{v / 1e9:.1f} GFLOP/s {k} matrix product" for k, v in f["gemm"].items())
        out += [
            "",
            f"The machine's ceiling, measured in the same run: copy {f['copy'] / 1e9:.1f} GB/s (read + write), "
            f"read {f['read'] / 1e9:.1f} GB/s, multiply-adds in registers {f['fma'] / 1e9:.1f} GFLOP/s, {rates}.",
        ]
    return [*out, ""]


def _attention_markdown(data: dict[str, Any], full: bool) -> list[str]:
    entries = in_order(data["attention"])
    if not full:
        entries = [e for e in entries if e["heads"] == "32/8" and e["head_dim"] == 128]
    peers = [p for p in PEERS if any(p in e.get("contenders", {}) for e in entries)]
    out = [
        "Times of one layer's attention, cold caches, medians of interleaved rounds; peers as multiples of ours "
        "(above 1: slower than ours). *Ceiling*: floor ÷ ours, where the floor is max(unique bytes ÷ bandwidth, "
        "FLOPs ÷ multiply-add rate).",
        "",
        *head(
            "case",
            "heads",
            "dtype",
            "unique / logical tokens",
            "floor",
            "ours (min – max)",
            "ceiling",
            *(PEERS[p] for p in peers),
        ),
    ]
    for e in entries:
        heads = e["heads"] if e["head_dim"] == 128 else f"{e['heads']}, D {e['head_dim']}"
        tokens = f"{e['unique_tokens']:,} / {e['logical_tokens']:,}"
        if "left_out" in e:
            out.append(
                row(
                    e["case"],
                    heads,
                    e["dtype"],
                    tokens,
                    micro(e["floor_us"]),
                    f"left out: {e['left_out']}",
                    "",
                    *("" for _ in peers),
                )
            )
            continue
        cells = [_times(ratio(e, p)) if ratio(e, p) else micro(median(e, p)) for p in peers]
        out.append(
            row(
                e["case"],
                heads,
                e["dtype"],
                tokens,
                micro(e["floor_us"]),
                _spread(e, OURS),
                _percent(of_floor(e)),
                *cells,
            )
        )
    notes = _notes(entries)
    return [*out, "", *notes, *([""] if notes else [])]


def _notes(entries: list[dict[str, Any]]) -> list[str]:
    """What was left out, one line a reason, so that no dash stays unexplained."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for e in entries:
        for name, result in e.get("contenders", {}).items():
            if "left_out" in result:
                reasons.setdefault((PEERS.get(name, name), result["left_out"]), []).append(f"{e['case']} {e['dtype']}")
    return [f"- {name}, {'; '.join(dict.fromkeys(cases))}: {reason}." for (name, reason), cases in reasons.items()]


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(math.log(v) for v in values) / len(values))


def _e2e_markdown(data: dict[str, Any]) -> list[str]:
    out = [
        "SmolLM2-135M-Instruct, every branch exactly as many tokens as in the other contenders.",
        "",
        *head("prompt", "branches", "dtype", "contender", "prefill", "decoding, tokens/s", "in all, tokens/s"),
    ]
    for e in data["e2e"]:
        first = f"{e['prompt']} ({e['prompt_tokens']} tokens)" if "prompt_tokens" in e else e["prompt"]
        if "left_out" in e:
            out.append(row(first, e["n"], e["dtype"], e["title"], f"left out: {e['left_out']}", "", ""))
            continue
        out.append(
            row(
                first,
                e["n"],
                e["dtype"],
                e["title"],
                f"{e['prefill_seconds']:.2f} s",
                f"{e['decode_tokens_per_s']:.1f}",
                f"{e['total_tokens_per_s']:.1f}",
            )
        )
    return [*out, ""]


def _step_markdown(data: dict[str, Any]) -> list[str]:
    return ["A decode step of SmolLM2 by rows.", "", *head(*STEP_HEAD), *(row(*c) for c in _step_cells(data)), ""]


def _host_markdown(data: dict[str, Any]) -> list[str]:
    out = head("bookkeeping", "median (min – max)", "more")
    for e in data["host"]:
        spread = f"{micro(e['median_us'])} ({micro(e['min_us'])} – {micro(e['max_us'])})" if "median_us" in e else ""
        out.append(row(e["title"], spread, e.get("more", "")))
    return [*out, ""]
