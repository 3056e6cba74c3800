"""One command for a machine with a GPU: ``python tests/gpu/run.py [--out DIR]`` (no network, no installation).

In this order, each part with a limit of its own, all of them under nine minutes, none stopped by another's failure:

1. build: the C++ modules in place where they are missing (the CUDA kernels for this GPU alone, where nvcc is);
2. checks, some at once: the kernels' tests and each file of tests/gpu in a process of its own (a fault on the GPU ends
   one process, not all), and the CUDA kernels under compute-sanitizer's memcheck and racecheck;
3. the benchmark table (tests/gpu/bench.py);
4. in what time is left, what every Triton variant takes with this machine's compiler.

Writes gpu_check.json and gpu_check.md (default: benchmarks/results) after every part, prints the table last, and exits
with 1 when anything failed, 2 where there is no GPU. ``--dry-run`` goes the same way on a machine without one, on the
CPU and on two small cases: whether the command itself works.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata, util
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TOTAL = 520.0  # seconds; what is left to nine minutes is for starting and stopping
LIMITS = {"build": 150.0, "checks": 220.0, "benchmark": 200.0, "resources": 200.0}
KEPT = {"build": 330.0, "checks": 140.0, "benchmark": 5.0, "resources": 5.0}  # at least for what comes after
SANITIZER = 100.0  # of the checks' time, a tool at most
AT_ONCE = 4
SKIPPED = 77  # exit code of a part that had nothing to do here


@dataclass
class Run:
    """What has been found so far, and how much time is left.

    Attributes:
        dry: no GPU: the same way on the CPU.
        work: scratch folder for logs and reports.
        out: where the two files go.
    """

    dry: bool
    work: Path
    out: Path
    begin: float = field(default_factory=time.perf_counter)
    result: dict[str, Any] = field(default_factory=lambda: {"device": {}, "steps": {}, "tests": {}, "failed": []})

    def limit(self, part: str) -> float:
        if self.dry:  # tried on busy machines
            return 4 * LIMITS[part]
        left = TOTAL - (time.perf_counter() - self.begin) - KEPT[part]
        return max(1.0, min(LIMITS[part], left))

    def save(self) -> None:
        self.result["seconds"] = round(time.perf_counter() - self.begin, 1)
        for name, text in (("json", json.dumps(self.result, indent=1) + "\n"), ("md", markdown(self.result))):
            (self.out / f"gpu_check.{name}").write_text(text)

    def part(self, name: str, work: Callable[[Run], None]) -> None:
        """One part; whatever goes wrong in it is a finding, and the next one starts."""
        try:
            work(self)
        except Exception as error:
            self.result["steps"][name] = dict(
                command="", code=f"{type(error).__name__}: {str(error)[:300]}", seconds=0.0
            )
        self.save()


def built(module: str) -> bool:
    """Whether this module lies in the checkout, for this Python."""
    return any((ROOT / "python" / "anabranch" / f"{module}{end}").exists() for end in EXTENSION_SUFFIXES)


def source() -> list[str]:
    """Where Python finds the package: in the checkout, if its modules are built there; else it is installed."""
    return [str(ROOT / "python")] if built("_core") else []


def call(command: list[str], limit: float, log: Path | None = None) -> dict[str, Any]:
    """Runs a command from the repository's root, its output into ``log`` or shown: its exit code, its time.

    At the limit the whole process group is ended: compilers and test workers too.
    """
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([*source(), *filter(None, [env.get("PYTHONPATH")])])
    print("+", " ".join(command), flush=True)
    begin = time.perf_counter()
    code: int | str
    sink = log.open("wb") if log else None
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, start_new_session=True, stdout=sink, stderr=subprocess.STDOUT if sink else None
        )
        try:
            code = process.wait(limit)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            code = f"stopped after {limit:.0f} s"
    except OSError as error:
        code = str(error)
    finally:
        if sink:
            sink.close()
    step = dict(command=" ".join(command[1:]), code=code, seconds=round(time.perf_counter() - begin, 1))
    if log and code not in (0, SKIPPED):
        step["log_tail"] = log.read_text(errors="replace")[-2000:]
    return step


def pybind11_options() -> list[str]:
    """Where CMake finds pybind11: its own package, or the headers that torch carries."""
    where = subprocess.run([sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True)
    if where.returncode == 0:
        return [f"-Dpybind11_DIR={where.stdout.strip()}"]
    torch = util.find_spec("torch")
    assert torch is not None and torch.origin is not None
    return [f"-DANABRANCH_PYBIND11_INCLUDE={Path(torch.origin).parent / 'include'}"]


def build(run: Run) -> None:
    """The C++ modules, in place, with cmake and pybind11 as they are on this machine."""
    steps = run.result["steps"]
    nvcc = None if run.dry else shutil.which(os.environ.get("CUDACXX", "nvcc"))
    wanted = ("_core", "_cpu", *(["_cuda"] if nvcc else []))
    missing = [module for module in wanted if not built(module)]
    if run.dry or not missing:
        absent = f"; {', '.join(missing)} missing" if missing else ""
        steps["build"] = dict(command=f"nothing to build{absent}", code=0, seconds=0.0)
        return
    configure = [
        "cmake", "-S", ".", "-B", "build/gpu", "-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}",
        f"-DANABRANCH_CUDA={int(nvcc is not None)}", f"-DANABRANCH_CUDA_ARCHS={run.result['device']['arch']}",
        *([f"-DCMAKE_CUDA_COMPILER={nvcc}"] if nvcc else []), *pybind11_options(),
    ]  # fmt: skip
    steps["configure"] = call(configure, run.limit("build"), run.work / "configure.log")
    jobs = ["--parallel", str(os.cpu_count() or 2), "--target"]
    # In two goes: should the CUDA kernels not compile, Triton and all else are still tested.
    for name, targets in (("build", ["_core", "_cpu"]), ("build_cuda", ["_cuda"] if nvcc else [])):
        if targets:
            command = ["cmake", "--build", "build/gpu", *jobs, *targets]
            steps[name] = call(command, run.limit("build"), run.work / f"{name}.log")


def test_groups(dry: bool) -> dict[str, list[str]]:
    """Name → test files; each group is a process. The long ones first."""
    files = {file.stem.removeprefix("test_"): [f"tests/gpu/{file.name}"] for file in sorted(HERE.glob("test_*.py"))}
    if dry:  # all of them are skipped: what is looked at is that they can be collected
        return {"all": [name for group in files.values() for name in group]}
    first = {"variants": files.pop("variants"), "kernels": ["tests/kernels/test_triton_kernels.py"]}
    return first | {"branch": ["tests/kernels/test_branch_triton.py"]} | files


def checks(run: Run) -> None:
    """Tests and sanitizers, a few processes at once, under one limit."""
    end = time.perf_counter() + run.limit("checks")
    python, steps = sys.executable, run.result["steps"]
    options = ["-q", "--tb=short", "-p", "no:cacheprovider"]
    # Most of the time goes to compiling Triton's variants.
    workers = ["-n", "6"] if util.find_spec("xdist") and not run.dry else []

    def test(name: str, files: list[str]) -> None:
        report = run.work / f"{name}.xml"
        parallel = workers if name == "variants" else []
        command = [python, "-m", "pytest", *options, *parallel, f"--junitxml={report}", *files]
        steps[f"tests {name}"] = call(command, max(1.0, end - time.perf_counter()), run.work / f"{name}.log")
        run.result["tests"][name] = junit(report)

    def sanitize(tool: str) -> None:
        program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
        watched = [python, "tests/gpu/sanitize.py"]
        if program is None and not run.dry:
            steps[tool] = dict(command="compute-sanitizer was not found", code=SKIPPED, seconds=0.0)
            return
        if not run.dry:
            watched = [str(program), "--tool", tool, "--error-exitcode", "9", *watched]
        steps[tool] = call(watched, max(1.0, min(SANITIZER, end - time.perf_counter())), run.work / f"{tool}.log")

    with ThreadPoolExecutor(AT_ONCE if not run.dry else 1) as pool:
        tools = ("memcheck", "racecheck") if not run.dry else ("memcheck",)
        (longest, *groups) = test_groups(run.dry).items()
        jobs = [pool.submit(test, *longest), *(pool.submit(sanitize, tool) for tool in tools)]
        jobs += [pool.submit(test, name, files) for name, files in groups]
        for job in jobs:
            job.result()


def benchmark(run: Run) -> None:
    report, limit = run.work / "bench.json", run.limit("benchmark")
    command = [sys.executable, "tests/gpu/bench.py", "--json", str(report), "--seconds", f"{max(1.0, limit - 25):.0f}"]
    if run.dry:
        command += ["--device", "cpu", "--tiny", "--backends", "cpu"]
    run.result["steps"]["benchmark"] = call(command, limit, run.work / "bench.log")
    run.result["benchmark"] = json.loads(report.read_text()) if report.exists() else None


def resources(run: Run) -> None:
    """Registers, spills and shared memory of the Triton variants; not a check, and not missed where time is short."""
    arch = run.result["device"].get("arch")
    if run.dry or arch not in (80, 86, 89, 90, 100, 120) or run.limit("resources") < 30:
        return
    report = ["-m", "anabranch.kernels.report", "--dtype", "bf16", "--arch", str(arch), "--out", str(run.work)]
    command = [sys.executable, *report, "--processes", str(min(12, os.cpu_count() or 2))]
    found = call(command, run.limit("resources"), run.work / "resources.log")
    table = run.work / "triton_resources.json"
    run.result["resources"] = json.loads(table.read_text()) if table.exists() else found


def junit(path: Path) -> dict[str, Any]:
    """Counts, each failure's name and first line, and why tests were skipped, from pytest's XML."""
    if not path.exists():
        return dict(error="pytest wrote no report")
    suite = ElementTree.parse(path).getroot().find("testsuite")
    assert suite is not None
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed, skipped = [], set()
    for case in suite.iter("testcase"):
        for kind in ("failure", "error"):
            node = case.find(kind)
            if node is not None:
                message = (node.get("message") or "").strip().splitlines() or [""]
                failed.append(dict(name=f"{case.get('classname')}::{case.get('name')}", message=message[0][:300]))
        node = case.find("skipped")
        if node is not None:
            skipped.add((node.get("message") or "")[:200])
    return dict(**counts, failed=failed, skip_reasons=sorted(skipped))


def device(dry: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version()}
    for name in ("torch", "triton", "transformers", "numpy", "flashinfer-python"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    if dry:
        return found | {"gpu": "none: a dry run on the CPU"}
    import torch

    p = torch.cuda.get_device_properties(0)
    return found | dict(gpu=p.name, arch=p.major * 10 + p.minor, memory_GB=round(p.total_memory / 1e9, 1))


def problems(result: dict[str, Any]) -> list[str]:
    """Everything that failed, one line each."""
    found = [f"{name}: {step['code']}" for name, step in result["steps"].items() if step["code"] not in (0, SKIPPED)]
    for group, tests in result["tests"].items():
        if "error" in tests:
            found.append(f"tests {group}: {tests['error']}")
        found += [f"{failure['name']}: {failure['message']}" for failure in tests.get("failed", [])]
    if "benchmark" in result["steps"] and not result.get("benchmark"):
        found.append("the benchmark wrote no result")
    if result.get("benchmark"):
        found += load_bench().failures(result["benchmark"])
    return found


def load_bench() -> Any:
    sys.path.insert(0, str(HERE))
    import bench

    return bench


def markdown(result: dict[str, Any]) -> str:
    failed = problems(result)
    lines = ["# GPU check", "", ", ".join(f"{name} {value}" for name, value in result["device"].items()), ""]
    lines += [f"**{len(failed)} failed**, {result.get('seconds', 0)} s in all." if failed else
              f"Nothing failed, {result.get('seconds', 0)} s in all.", ""]  # fmt: skip
    lines += ["| step | result | seconds |", "|---|---|---|"]
    said = {0: "passed", SKIPPED: "skipped"}
    lines += [f"| {name} | {said.get(s['code'], s['code'])} | {s['seconds']} |" for name, s in result["steps"].items()]
    lines += ["", "| tests | run | failed | errors | skipped |", "|---|---|---|---|---|"]
    for name, tests in result["tests"].items():
        if "error" in tests:
            lines.append(f"| {name} | {tests['error']} | | | |")
        else:
            lines.append(
                f"| {name} | {tests['tests']} | {tests['failures']} | {tests['errors']} | {tests['skipped']} |"
            )
    reasons = sorted({why for tests in result["tests"].values() for why in tests.get("skip_reasons", [])})
    lines += ["", *(f"- skipped: {why}" for why in reasons), *(f"- **failed**: {what}" for what in failed), ""]
    for name, step in result["steps"].items():
        if "log_tail" in step:
            lines += [f"<details><summary>end of the log of {name}</summary>", "", "```", step["log_tail"], "```"]
            lines += ["", "</details>", ""]
    if result.get("benchmark"):
        lines += ["## Benchmark", "", load_bench().markdown(result["benchmark"])]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="where the two files go")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: does the command itself work?")
    args = parser.parse_args(arguments)
    import torch

    if not args.dry_run and not torch.cuda.is_available():
        print("no CUDA device: nothing to check here (--dry-run tries the command itself)")
        return 2
    run = Run(args.dry_run, ROOT / "build" / "gpu_check", args.out.resolve())
    for folder in (run.out, run.work):
        folder.mkdir(parents=True, exist_ok=True)
    for stale in run.work.glob("*.*"):
        stale.unlink()
    run.result["device"] = device(run.dry)
    for work in (build, checks, benchmark, resources):
        run.part(work.__name__, work)
    run.result["failed"] = problems(run.result)
    run.save()
    print(markdown(run.result))
    return int(bool(run.result["failed"]))


if __name__ == "__main__":
    sys.exit(main())
