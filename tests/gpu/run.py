"""One command for a machine with a GPU: ``python tests/gpu/run.py [--out DIR]`` (no network, no installation).

Builds the C++ modules in place if they are missing, runs the kernel tests and tests/gpu on the GPU, runs the small
benchmark, and reports what every Triton variant takes with this machine's compiler (bf16, its own architecture).
Nothing stops at the first failure. Writes gpu_check.json and gpu_check.md (default: benchmarks/results) and exits with
1 when anything failed. A few minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from importlib import metadata, util
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def call(command: list[str], timeout: int) -> dict[str, Any]:
    """Runs a command from the repository's root: its output as it comes, its exit code and its time."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "python"), *filter(None, [env.get("PYTHONPATH")])])
    print("+", " ".join(command), flush=True)
    begin = time.perf_counter()
    try:
        code: int | str = subprocess.run(command, cwd=ROOT, env=env, timeout=timeout).returncode
    except subprocess.TimeoutExpired:
        code = f"stopped after {timeout} s"
    except OSError as error:
        code = str(error)
    return dict(command=" ".join(command[1:]), code=code, seconds=round(time.perf_counter() - begin, 1))


def build() -> dict[str, Any]:
    """The C++ modules, in place, with cmake and pybind11 as they are on this machine."""
    sys.path.insert(0, str(ROOT / "python"))
    if util.find_spec("anabranch._core") is not None:
        return dict(command="build: already there", code=0, seconds=0.0)
    where = subprocess.run(
        [sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True
    ).stdout.strip()
    configure = [
        "cmake",
        "-S",
        ".",
        "-B",
        "build/gpu",
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    first = call([*configure, f"-Dpybind11_DIR={where}"], timeout=120)
    if first["code"] != 0:
        return first
    return call(["cmake", "--build", "build/gpu", "--parallel", str(os.cpu_count() or 2)], timeout=400)


def junit(path: Path) -> dict[str, Any]:
    """Counts, and each failure's name and last line, from pytest's XML."""
    if not path.exists():
        return dict(error="pytest wrote no report")
    suite = ElementTree.parse(path).getroot().find("testsuite")
    assert suite is not None
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = []
    for case in suite.iter("testcase"):
        for kind in ("failure", "error"):
            node = case.find(kind)
            if node is not None:
                message = (node.get("message") or "").strip().splitlines() or [""]
                failed.append(dict(name=f"{case.get('classname')}::{case.get('name')}", message=message[0][:300]))
    return dict(**counts, failed=failed)


def device() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {name: metadata.version(name) for name in ("torch", "triton", "numpy")}
    found["python"] = platform.python_version()
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        found |= dict(gpu=p.name, arch=p.major * 10 + p.minor, memory_GB=round(p.total_memory / 1e9, 1))
    return found


def markdown(result: dict[str, Any]) -> str:
    tests = result["tests"]
    lines = ["# GPU check", "", ", ".join(f"{name} {value}" for name, value in result["device"].items()), ""]
    lines += ["| step | exit code | seconds |", "|---|---|---|"]
    lines += [f"| {name} | {step['code']} | {step['seconds']} |" for name, step in result["steps"].items()]
    if "error" in tests:
        lines += ["", f"Tests: {tests['error']}"]
    else:
        lines += ["", "Tests: {tests}, failed {failures}, errors {errors}, skipped {skipped}.".format(**tests)]
        lines += [f"- {failure['name']}: {failure['message']}" for failure in tests["failed"]]
    return "\n".join([*lines, "", result["benchmark_table"]])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="where the two files go")
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device: nothing to check here")
        return 2
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    python, work = sys.executable, ROOT / "build" / "gpu_check"
    work.mkdir(parents=True, exist_ok=True)
    for stale in work.glob("*.*"):
        stale.unlink()

    result: dict[str, Any] = dict(device=device(), steps={})
    steps = result["steps"]
    steps["build"] = build()
    parallel = ["-n", "4"] if util.find_spec("xdist") else []  # most of the time goes to compiling the variants
    steps["tests"] = call(
        [python, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *parallel,
         f"--junitxml={work / 'tests.xml'}", "tests/test_triton_kernels.py", "tests/test_branch_triton.py",
         "tests/gpu"],
        timeout=420,
    )  # fmt: skip
    result["tests"] = junit(work / "tests.xml")
    steps["benchmark"] = call([python, "tests/gpu/bench.py", "--json", str(work / "bench.json")], timeout=240)
    bench = work / "bench.json"
    result["benchmark"] = json.loads(bench.read_text()) if bench.exists() else None
    sys.path.insert(0, str(Path(__file__).parent))
    from bench import markdown as table

    result["benchmark_table"] = table(result["benchmark"]) if result["benchmark"] else "The benchmark wrote no result."
    arch = result["device"]["arch"]
    if arch in (80, 90, 100):
        report = ["-m", "anabranch.kernels.report", "--dtype", "bf16", "--arch", str(arch), "--out", str(work)]
        steps["resources"] = call([python, *report, "--processes", str(min(8, os.cpu_count() or 2))], timeout=300)
        resources = work / "triton_resources.json"
        result["resources"] = json.loads(resources.read_text()) if resources.exists() else None

    (out / "gpu_check.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "gpu_check.md").write_text(markdown(result))
    print(markdown(result))
    cases = (result["benchmark"] or {}).get("cases", [])
    bad = any(step["code"] != 0 for step in steps.values()) or any("error" in case for case in cases)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
