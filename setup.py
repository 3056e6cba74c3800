"""Build glue: hands the C++ and CUDA modules to CMake and says what was skipped and why.

Everything declarative lives in pyproject.toml. No torch is imported here: the modules take raw pointers, so one
build serves every torch version.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Builds every module of CMakeLists.txt in one CMake run."""

    def run(self) -> None:
        import pybind11

        report_cuda()
        out = Path(self.build_lib).resolve() / "anabranch"
        if self.inplace:
            out = ROOT / "python" / "anabranch"
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        cmake = shutil.which("cmake")
        if cmake is None:
            raise RuntimeError("CMake was not found; `pip install cmake` brings it")
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release",
            f"-DANABRANCH_OUTPUT={out}", f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        subprocess.run(configure, check=True)
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 2)
        subprocess.run([cmake, "--build", str(build), "--parallel", jobs], check=True)

    def get_outputs(self) -> list[str]:
        return [self.get_ext_fullpath(ext.name) for ext in self.extensions]


def report_cuda() -> None:
    """Says plainly whether GPU code is part of this build, and what works without it."""
    wanted = os.environ.get("ANABRANCH_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        raise ValueError(f"ANABRANCH_CUDA={wanted!r}: expected 0, 1 or auto")
    if wanted == "1":
        raise RuntimeError("ANABRANCH_CUDA=1: this version has no CUDA C++ sources yet; unset it, Triton serves GPUs")
    print("anabranch: CUDA C++ module skipped (no sources in this version); GPUs are served by the Triton backend")


setup(
    ext_modules=[Extension("anabranch._core", sources=[]), Extension("anabranch._cpu", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    packages=[
        "anabranch",
        "anabranch.backends",
        "anabranch.cli",
        "anabranch.engine",
        "anabranch.kernels",
        "anabranch.strategies",
        "anabranch.training",
    ],
    package_dir={"": "python", "anabranch.kernels": "kernels"},
    package_data={"anabranch": ["py.typed", "*.pyi", "data/*/*"]},
)
