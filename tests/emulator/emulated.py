"""Compiles the CUDA sources for the emulator with g++ (no nvcc, no CUDA headers) and imports the result.

Objects are kept in ``build/emulator`` under a hash of their sources, the compiler and its flags: a test session
compiles once, parallel workers wait for each other.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "emulator"
CUDA = ROOT / "csrc" / "cuda"
FOLDER = ROOT / "build" / "emulator"
MODULE = "_cuda_emulated"
UNITS = [
    *(CUDA / name for name in ("attention_bf16.cu", "attention_f16.cu", "attention_f32.cu", "launch.cu")),
    CUDA / "bindings.cpp",
    HERE / "module.cpp",
    HERE / "probes.cpp",
    HERE / "emulator.cpp",
]
FLAGS = "-std=c++17 -fPIC -fvisibility=hidden -fno-math-errno -Wall -Wextra -Wno-unknown-pragmas".split()


def why_not() -> str | None:
    """Why the emulator cannot be built here; None when it can."""
    if compiler() is None:
        return "no C++ compiler (CXX, g++ or c++)"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Python.h is not installed"
    return None


def compiler() -> str | None:
    return next((c for c in (os.environ.get("CXX"), "g++", "c++") if c and shutil.which(c)), None)


def _digest(*parts: object) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.read_bytes() if isinstance(part, Path) else repr(part).encode())
    return digest.hexdigest()[:16]


@functools.cache
def _included(source: Path) -> frozenset[Path]:
    """A file of ours and all of ours that it includes."""
    found = {source}
    for name in re.findall(r'^#include "([^"]+)"', source.read_text(), re.MULTILINE):
        place = next((d / name for d in (HERE, ROOT / "csrc") if (d / name).exists()), None)
        if place is not None:
            found |= _included(place)
    return frozenset(found)


@functools.cache
def load(*defines: str) -> ModuleType:
    """The emulator as a module with the interface of ``anabranch._cuda`` and more; compiled when its sources changed.

    ``ANABRANCH_FEW_HEAD_DIMS`` compiles a quarter of the variants, for those who work on the kernels.
    """
    import pybind11

    includes = [f"-I{d}" for d in (ROOT / "csrc", HERE, pybind11.get_include(), sysconfig.get_path("include"))]
    command = [compiler() or "g++", *FLAGS, "-DANABRANCH_EMULATOR", f"-DANABRANCH_CUDA_MODULE={MODULE}"]
    FOLDER.mkdir(parents=True, exist_ok=True)

    def compile_unit(unit: Path) -> Path:
        # Bindings run once a call; kernels and fibers run hot, but compile in half the time without -O2.
        options = ["-O0" if unit.name in ("bindings.cpp", "module.cpp") else "-O1"]
        options += [f"-D{d}" for d in defines] if unit.suffix == ".cu" else []
        digest = _digest(command, options, sys.version, pybind11.__version__, *sorted(_included(unit)))
        target = FOLDER / f"{unit.stem}_{digest}.o"
        if not target.exists():
            scratch = target.with_suffix(".compiling")
            subprocess.run([*command, *options, *includes, "-c", "-x", "c++", unit, "-o", scratch], check=True)
            scratch.rename(target)
        return target

    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            objects = list(pool.map(compile_unit, UNITS))
        module = FOLDER / f"{MODULE}_{_digest(*(target.name for target in objects))}.so"
        if not module.exists():
            scratch = module.with_suffix(".linking")
            subprocess.run([command[0], "-shared", *objects, "-o", scratch], check=True)
            scratch.rename(module)
    spec = importlib.util.spec_from_file_location(MODULE, module)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


if __name__ == "__main__":
    reason = why_not()
    if reason is not None:
        sys.exit(f"emulator: {reason}")
    print(load(*sys.argv[1:]).__file__)
