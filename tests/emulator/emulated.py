"""Compiles the CUDA sources for the emulator with g++ (no nvcc, no CUDA headers) and imports the result.

Objects are kept in ``build/emulator`` under a hash of all sources, the compiler and its flags: a test session compiles
once, parallel workers wait for each other.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
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
def load(*defines: str) -> ModuleType:
    """The emulator as a module with the interface of ``anabranch._cuda`` and more; compiled when its sources changed.

    ``ANABRANCH_FEW_HEAD_DIMS`` compiles a quarter of the variants, for those who work on the kernels.
    """
    import pybind11

    includes = [f"-I{d}" for d in (ROOT / "csrc", HERE, pybind11.get_include(), sysconfig.get_path("include"))]
    command = [compiler() or "g++", *FLAGS, "-DANABRANCH_EMULATOR", *(f"-D{d}" for d in defines)]
    headers = sorted([*CUDA.glob("*.?pp"), *CUDA.glob("*.cuh"), *HERE.glob("*.hpp")])
    common = (command, sys.version, pybind11.__version__, *headers)
    name = f"emulated_{_digest(*common, *UNITS)}"
    FOLDER.mkdir(parents=True, exist_ok=True)
    module = FOLDER / f"{name}.so"
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not module.exists():

            def compile_unit(unit: Path) -> Path:
                # Bindings run once a call; kernels and fibers run hot, but compile in half the time without -O2.
                named = ["-O0" if unit.name in ("bindings.cpp", "module.cpp") else "-O1"]
                named += [f"-DANABRANCH_CUDA_MODULE={name}"] if unit.name == "bindings.cpp" else []
                target = FOLDER / f"{unit.stem}_{_digest(*common, unit, named)}.o"
                if not target.exists():
                    scratch = target.with_suffix(".compiling")
                    subprocess.run([*command, *named, *includes, "-c", "-x", "c++", unit, "-o", scratch], check=True)
                    scratch.rename(target)
                return target

            with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
                objects = list(pool.map(compile_unit, UNITS))
            scratch = module.with_suffix(".linking")
            subprocess.run([command[0], "-shared", *objects, "-o", scratch], check=True)
            scratch.rename(module)
    spec = importlib.util.spec_from_file_location(name, module)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


if __name__ == "__main__":
    reason = why_not()
    if reason is not None:
        sys.exit(f"emulator: {reason}")
    print(load(*sys.argv[1:]).__file__)
