"""Consoles, what may be printed on them, and the line that says where something was measured."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def consoles() -> tuple[Console, Console]:
    """(stdout, stderr)."""
    from rich.console import Console

    return Console(highlight=False), Console(stderr=True, highlight=False)


def plain_terminal(console: Console) -> bool:
    """Whether output is read by a program, a log or a terminal without cursor movement: lines only, no live display."""
    return not console.is_terminal or console.is_dumb_terminal


# A model may write any byte, escape sequences that a terminal obeys among them.
_CONTROL = {c: "\ufffd" for c in (*range(32), *range(127, 160)) if chr(c) not in "\n\t"}


def printable(text: str) -> str:
    """`text` with control characters replaced: safe to show in a terminal."""
    return text.translate(_CONTROL)


# ------------------------------------------------------------------------------------------------ models


def cpu() -> tuple[str, list[str]]:
    """(model name, feature flags) of the CPU; flags are empty where the system does not tell."""
    import platform

    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), []
    block = text.split("\n\n")[0].splitlines()
    fields = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in block)}
    return fields.get("model name", platform.machine()), (fields.get("flags") or fields.get("Features") or "").split()


def machine_note() -> str:
    """One line that says where something was measured."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}; torch {torch.__version__}"
    name, flags = cpu()
    count = torch.get_num_threads()
    threads = "1 thread" if count == 1 else f"{count} threads"
    best = next((f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "asimd") if f in flags), "")
    busy = ""
    if hasattr(os, "getloadavg"):
        load, cores = os.getloadavg()[0], os.cpu_count() or 1
        if load > 1.5 * cores:
            busy = f"; busy: load {load:.1f} on {cores} cores, so wall times are too long"
    return f"{name} ({best}), {threads}; torch {torch.__version__}{busy}".replace(" ()", "")
