"""``anabranch doctor``: what works on this machine, what does not, and the remedy."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import time
from typing import Any

from anabranch import __version__
from anabranch.cli.common import FAILED
from anabranch.viz.console import consoles, cpu

# Every variable that our code reads, or that decides what it can do here (a test looks for any that is missing).
VARIABLES = {
    "ANABRANCH_CPU_ISA": "instruction set of the CPU kernels, one of those under Backends",
    "ANABRANCH_NUM_THREADS": "threads of the CPU kernels; as under Hardware where not set",
    "ANABRANCH_OWN_LINEAR": "0 or 1: linear layers on a CPU by our kernel; automatic where not set",
    "ANABRANCH_API_KEY": "key of serve, and of generate and compare with --url",
    "ANABRANCH_CACHE": "folder of converted models and compiled forwards",
    "XDG_CACHE_HOME": "its parent, where ANABRANCH_CACHE is not set",
    "ANABRANCH_CUDA": "when building: 0, 1 or auto",
    "ANABRANCH_CUDA_ARCHS": "when building: GPU architectures, as in 80;90a;100",
    "CUDACXX": "when building: nvcc, where it is not on PATH",
    "CUDA_HOME": "when building: the folder above bin/nvcc, where neither says",
    "CMAKE_BUILD_PARALLEL_LEVEL": "when building: compilers at once",
    "CXX": "C++ compiler of Engine(compile=…), and when building",
    "TORCHINDUCTOR_CACHE_DIR": "folder of what torch.compile made, instead of one in ANABRANCH_CACHE",
    "TRITON_INTERPRET": "1: Triton kernels run in its interpreter, on the CPU, slowly",
    "OMP_NUM_THREADS": "threads of torch, which the CPU kernels then follow whatever the cores and quotas",
    "CUDA_VISIBLE_DEVICES": "GPUs that torch may see",
    "WORLD_SIZE": "of torchrun: processes of serve --tp",
    "LOCAL_WORLD_SIZE": "of torchrun: processes on this machine, which share its memory",
    "RANK": "of torchrun: which of the processes this one is",
}
FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
NEVER_ON_A_GPU = (
    "The GPU kernels of this version have never run on a GPU. The Triton ones were run in Triton's interpreter, the "
    "CUDA C++ ones on a host-side device of the tests, both against the reference, and both were compiled for GPUs. "
    "`python tests/gpu/run.py` in a checkout tests them on yours."
)
ALLOWED = 1e-5  # relative error of float32


def run(as_json: bool) -> None:
    """Look, test, print; exit code 1 when something that should work does not."""
    import typer

    report = examine()
    if as_json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        _show(report)
    if report["problems"]:
        raise typer.Exit(FAILED)


def examine() -> dict[str, Any]:
    """Everything, as plain data."""
    problems: list[str] = []
    report: dict[str, Any] = {"schema": "anabranch.doctor", "version": 1, "versions": _versions()}
    report["cpu"] = _cpu_facts()
    try:
        import torch
    except ImportError as error:
        return {**report, "problems": [f"torch cannot be imported ({error}); `pip install torch`"]}
    report["cpu"]["torch_threads"] = torch.get_num_threads()
    report["gpus"] = _gpus()
    try:
        from anabranch import backends
    except ImportError as error:
        remedy = "reinstall with `pip install .`, or build in place with `make build`"
        return {**report, "problems": [f"anabranch's C++ core cannot be imported ({error}); {remedy}"]}
    report["cpu"]["threads"] = _threads()
    report["backends"] = {name: _backend(name) for name in backends.NAMES}
    for name, entry in report["backends"].items():
        if entry["expected"] and not entry["works"]:
            problems.append(f"{name}: {entry['reason']}")
        elif entry.get("selftest") and not entry["selftest"]["passed"]:
            problems.append(f"{name}: the self-test failed ({entry['selftest']['detail']})")
    report["auto"] = _auto()
    report["compile"] = _compile()
    from anabranch.cli.common import choose_dtype

    dtype, why = choose_dtype()
    report["dtype"] = {"auto": str(dtype).removeprefix("torch."), "why": why}
    report["cuda_extension"] = {"built": importlib.util.find_spec("anabranch._cuda") is not None}
    report["never_on_a_gpu"] = NEVER_ON_A_GPU
    report["models"] = _models()
    report["environment"] = {n: {"value": os.environ.get(n), "meaning": m} for n, m in VARIABLES.items()}
    return {**report, "problems": problems}


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"anabranch": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "triton", "numpy", "gguf"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {**versions, "system": platform.platform()}


def _cpu_facts() -> dict[str, Any]:
    name, flags = cpu()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    features = [f for f in FEATURES if f in flags]
    return {"model": name, "cores": os.cpu_count(), "usable_cores": usable, "features": features}


def _threads() -> dict[str, Any]:
    """What bounds the threads of the CPU kernels, and how many they take."""
    from anabranch.backends import threads

    try:
        return threads.explain()
    except ValueError as error:  # also told as the reason why the cpu backend does not run
        return {"threads": None, "why": str(error)}


def _gpus() -> list[dict[str, Any]]:
    import torch

    found = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        p = torch.cuda.get_device_properties(i)
        memory, capability = round(p.total_memory / 2**30, 1), f"{p.major}.{p.minor}"
        found.append({"name": p.name, "memory_gib": memory, "capability": capability})
    return found


def _backend(name: str) -> dict[str, Any]:
    import torch

    from anabranch import backends

    gpu = torch.cuda.is_available()
    backend = backends.get(name)
    entry: dict[str, Any] = {"expected": backend.expected(gpu)}
    reason = backends.unavailable(name)
    entry["works"], entry["reason"] = reason is None, reason
    if reason is None:
        entry["selftest"] = selftest(name, backend.device_type if gpu else "cpu")
        entry.update(backend.info())
    return entry


def selftest(backend: str, device: str) -> dict[str, Any]:
    """A fork, a copy-on-write, a join and a decode step through `backend`, against dense float64 attention."""
    import torch

    from anabranch import TreeCache, tree_attention

    begin = time.perf_counter()
    try:
        rng = torch.Generator().manual_seed(0)
        heads, kv_heads, dim = 4, 2, 32

        def values(*shape: int) -> Any:
            return torch.randn(*shape, generator=rng).to(device)

        cache = TreeCache(1, kv_heads, dim, num_pages=16, page_size=8, device=device)
        worst = 0.0

        def advance(rows: dict[Any, int]) -> None:
            nonlocal worst
            step = cache.step(rows)
            n = sum(rows.values())
            cache.write(0, values(n, kv_heads, dim), values(n, kv_heads, dim), step, backend=backend)
            q = values(n, heads, dim)
            out = tree_attention(q, cache, 0, step, backend=backend).cpu().double()
            want = torch.cat([_dense(q[step.rows[b]], cache.read(b, 0), heads // kv_heads) for b in rows])
            error = float((out - want).norm() / want.norm())
            worst = max(worst, error if error == error else float("inf"))  # NaN would lose every comparison

        trunk = cache.branch()
        advance({trunk: 11})
        kids = cache.fork(trunk, 3)
        for length in (1, 2):
            advance({kid: length for kid in kids})
        cache.join(trunk, kids)
        advance({trunk: 1})
        cache.check()
        passed, detail = worst <= ALLOWED, f"relative error {worst:.1e}, at most {ALLOWED:.0e} allowed"
    except Exception as error:  # whatever breaks here is the finding
        passed, detail = False, f"{type(error).__name__}: {error}"
    return {"passed": passed, "detail": detail, "seconds": round(time.perf_counter() - begin, 3), "device": device}


def _dense(q: Any, kv: tuple[Any, Any], group: int) -> Any:
    """Causal attention of a branch's last rows over its whole context, in float64 on the CPU."""
    import torch

    q, k, v = (x.cpu().double() for x in (q, *kv))
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    ahead = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool).triu(k.shape[0] - q.shape[0] + 1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(ahead, float("-inf")).softmax(-1), v)


def _auto() -> dict[str, Any]:
    import torch

    from anabranch import backends

    chosen: dict[str, Any] = {}
    for device in ("cpu", "cuda"):
        if device == "cuda" and not torch.cuda.is_available():
            chosen[device] = {"backend": None, "why": "torch sees no GPU"}
            continue
        try:
            name = backends.choose("auto", torch.device(device), torch.float32, 64).name
        except ValueError as error:
            chosen[device] = {"backend": None, "why": str(error)}
            continue
        better = backends.PREFERRED[device]
        passed_over = [f"{b}: {backends.unavailable(b)}" for b in better[: better.index(name)]]
        chosen[device] = {"backend": name, "why": "; ".join(passed_over) or "the fastest for this device, and it works"}
    return chosen


def _compile() -> dict[str, Any]:
    """Whether ``Engine(compile=True)`` finds its compiler."""
    from anabranch.runner.tracing import compiler_problem, cxx

    problem = compiler_problem()
    return {"compiler": None if problem else cxx(), "reason": problem}


def _models() -> dict[str, Any]:
    from anabranch import models

    folder = models.cache_folder()
    entries = {name: dict(zip(("state", "detail"), models.state(name), strict=True)) for name in models.names()}
    return {"cache_folder": str(folder), "available": entries}


# ------------------------------------------------------------------------------------------------ on paper


def _told_threads(c: dict[str, Any]) -> str:
    from rich.markup import escape

    found = c.get("threads", {})
    if found.get("threads") is None:
        return escape(f"{c['torch_threads']} of torch; {found.get('why', 'CPU kernels: none')}")
    quota = "no CPU quota" if found["quota"] is None else f"a CPU quota of {found['quota']:g} cores"
    bounds = f"{found['affinity']} of {found['cores']} cores, {quota}, {found['torch_threads']} threads of torch"
    return escape(f"{found['threads']} in the CPU kernels: {found['why']} ({bounds})")


def _show(report: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    out, _ = consoles()

    def section(title: str, rows: list[tuple[str, str]]) -> None:
        table = Table.grid(padding=(0, 2))
        table.add_column(min_width=14, no_wrap=True)
        table.add_column(ratio=1)
        for left, right in rows:
            table.add_row(left, right)
        out.print(f"\n[bold]{title}[/bold]")
        out.print(table)

    good, bad, off = "[green]works[/green]", "[red]broken[/red]", "[dim]not here[/dim]"
    versions = report["versions"]
    section("Versions", [(n, escape(v) if v else "[dim]not installed[/dim]") for n, v in versions.items()])
    c = report["cpu"]
    cores = f"{c['usable_cores']} of {c['cores']} cores usable"
    hardware = [("CPU", f"{escape(c['model'])}, {cores}, {' '.join(c['features'])}")]
    if "torch_threads" in c:
        hardware.append(("threads", _told_threads(c)))
        gpus = [f"{g['name']}, {g['memory_gib']} GiB, compute capability {g['capability']}" for g in report["gpus"]]
        hardware.append(("GPU", escape("; ".join(gpus)) if gpus else "none that torch sees"))
    section("Hardware", hardware)
    if "backends" in report:
        rows = []
        for name, b in report["backends"].items():
            if not b["works"]:
                rows.append((name, f"{bad if b['expected'] else off}  {escape(b['reason'])}"))
                continue
            test = b["selftest"]
            text = f"{good if test['passed'] else bad}  self-test: {escape(test['detail'])}, {test['seconds']:.2f} s"
            if "summary" in b:
                text += escape(f"\n{b['summary']}")
            rows.append((name, text))
        section("Backends", rows)
        auto = [(d, f"{a['backend'] or '–'}  [dim]{escape(a['why'])}[/dim]") for d, a in report["auto"].items()]
        found_compiler = report["compile"]
        told = found_compiler["compiler"] or "–"
        why = found_compiler["reason"] or "Engine(compile=True) compiles with it"
        auto.append(("compiler", f"{escape(told)}  [dim]{escape(why)}[/dim]"))
        auto.append(("dtype", f"{report['dtype']['auto']}  [dim]{escape(report['dtype']['why'])}[/dim]"))
        section("What auto takes", auto)
        section("Not run on a GPU", [("", escape(report["never_on_a_gpu"]))])
        available = report["models"]["available"].items()
        found = [(n, f"{m['state']}  [dim]{escape(m['detail'])}[/dim]") for n, m in available]
        section("Models", [*found, ("cache folder", escape(report["models"]["cache_folder"]))])
        rows = []
        for name, e in report["environment"].items():
            value = "[dim]–[/dim]" if e["value"] is None else escape(e["value"])
            rows.append((name, f"{value}  [dim]{e['meaning']}[/dim]"))
        section("Environment variables", rows)
    out.print()
    if report["problems"]:
        out.print("[bold red]Something that should work here does not:[/bold red]")
        for problem in report["problems"]:
            out.print(f"  {problem}", markup=False)
    else:
        out.print("[green]All that should work on this machine works.[/green]")
