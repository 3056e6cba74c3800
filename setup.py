"""Build glue: hands the C++ and CUDA modules to CMake and says what was skipped and why.

Everything declarative lives in pyproject.toml. No torch is imported here: the modules take raw pointers, so one
build serves every torch version.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Builds every module of CMakeLists.txt in one CMake run."""

    def run(self) -> None:
        import pybind11

        cuda = cuda_options(CUDA_COMPILER)
        out = Path(self.build_lib).resolve() / "anabranch"
        if self.inplace:
            out = ROOT / "python" / "anabranch"
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        cmake = shutil.which("cmake")
        if cmake is None:
            raise RuntimeError("CMake was not found; `pip install cmake` brings it")
        configure = [
            cmake, "--fresh", "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release",
            f"-DANABRANCH_OUTPUT={out}", f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *cuda,
        ]  # fmt: skip
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        subprocess.run(configure, check=True)
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 2)
        subprocess.run([cmake, "--build", str(build), "--parallel", jobs, "--target", "_core", "_cpu"], check=True)
        if CUDA_COMPILER is not None:
            done = subprocess.run([cmake, "--build", str(build), "--parallel", jobs, "--target", "_cuda"])
            if done.returncode and os.environ.get("ANABRANCH_CUDA") == "1":
                raise RuntimeError("the CUDA kernels did not compile (see above); ANABRANCH_CUDA=0 leaves them out")
            if done.returncode:  # an nvcc that is there but does not work must not cost the rest of the package
                print(
                    "anabranch: CUDA C++ kernels skipped (they did not compile); GPUs are served by the Triton backend"
                )
                self.extensions = [ext for ext in self.extensions if not ext.name.endswith("_cuda")]

    def get_outputs(self) -> list[str]:
        return [self.get_ext_fullpath(ext.name) for ext in self.extensions]


def cuda_compiler() -> str | None:
    """nvcc, when GPU code is to be part of this build; says plainly what was decided and what works without it."""
    wanted = os.environ.get("ANABRANCH_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        raise ValueError(f"ANABRANCH_CUDA={wanted!r}: expected 0, 1 or auto")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    places = [os.environ.get("CUDACXX"), "nvcc", str(Path(home) / "bin" / "nvcc") if home else None]
    found = next((path for place in places if place and (path := shutil.which(place))), None)
    if found is None and wanted == "1":
        raise RuntimeError(
            "ANABRANCH_CUDA=1, but no nvcc was found: put it on PATH, name it in CUDACXX, or set CUDA_HOME; "
            "with ANABRANCH_CUDA=auto the Triton backend serves GPUs without it"
        )
    return found


def cuda_options(compiler: str | None) -> list[str]:
    """CMake's part of that decision."""
    if compiler is None:
        why = "ANABRANCH_CUDA=0" if os.environ.get("ANABRANCH_CUDA") == "0" else "no nvcc was found"
        print(f"anabranch: CUDA C++ kernels skipped ({why}); GPUs are served by the Triton backend")
        return ["-DANABRANCH_CUDA=0"]
    archs = os.environ.get("ANABRANCH_CUDA_ARCHS", "").replace(",", ";").replace(" ", ";").strip(";")
    if not all(re.fullmatch(r"\d{2,3}[af]?", arch) for arch in archs.split(";") if arch):
        raise ValueError(f'ANABRANCH_CUDA_ARCHS={archs!r}: expected architectures as in "80;90a;100"')
    print(f"anabranch: CUDA C++ kernels with {compiler}, architectures: {archs or 'all that it knows of 80 to 100'}")
    return ["-DANABRANCH_CUDA=1", f"-DANABRANCH_CUDA_ARCHS={archs}", f"-DCMAKE_CUDA_COMPILER={compiler}"]


CUDA_COMPILER = cuda_compiler()
MODULES = ["_core", "_cpu", *(["_cuda"] if CUDA_COMPILER else [])]

setup(
    ext_modules=[Extension(f"anabranch.{module}", sources=[]) for module in MODULES],
    cmdclass={"build_ext": CMakeBuild},
    # Namespace packages too: the folders of anabranch/data hold no Python.
    packages=[*find_namespace_packages("python", include=["anabranch*"]), "anabranch.kernels"],
    package_dir={"": "python", "anabranch.kernels": "kernels"},
    package_data={
        "": ["*.json", "*.safetensors"],
        "anabranch": ["py.typed", "*.pyi"],
        "anabranch.viz.page": ["*.js", "*.css", "*.html"],
        "anabranch.serve": ["*.html"],
    },
    include_package_data=False,
)
