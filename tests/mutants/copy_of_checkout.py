"""A copy of the checkout that mistakes are put into: it stays from run to run, and so do its built modules."""

from __future__ import annotations

import compileall
import filecmp
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from py_compile import PycInvalidationMode

ROOT = Path(__file__).resolve().parents[2]
COPY = ROOT / "build" / "mutants" / "checkout"
LEFT_OUT = {".git", "build", "dist", "__pycache__", ".hypothesis", ".venv"}


def renew(built: bool) -> None:
    """Make the copy what the checkout is, touching only what differs; `built`: with C++ modules of its own."""
    wanted = set(_files(ROOT))
    for name in wanted:
        source, target = ROOT / name, COPY / name
        if not target.exists() or not filecmp.cmp(source, target, shallow=False):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            shutil.copymode(source, target)
    for name in set(_files(COPY)) - wanted:
        (COPY / name).unlink()
    # Compiled once, and valid for as long as a source is the same to the byte: a mistake is undone within a second.
    for folder in ("python", "tests/kits"):
        compileall.compile_dir(COPY / folder, quiet=2, invalidation_mode=PycInvalidationMode.CHECKED_HASH)
    if built:
        build()
        return
    for module in _modules():
        shutil.copy2(module, COPY / "python" / "anabranch" / module.name)


def build() -> None:
    """Build the C++ modules in the copy; what did not change is not compiled again."""
    done = subprocess.run(["make", "build"], cwd=COPY, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"make build:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def _files(root: Path) -> Iterator[Path]:
    for folder, inner, names in os.walk(root):
        inner[:] = [d for d in inner if d not in LEFT_OUT and not d.endswith(("_cache", ".egg-info"))]
        yield from (
            Path(folder, name).relative_to(root) for name in names if name != ".git" and not name.endswith(".so")
        )


def _modules() -> list[Path]:
    """The C++ modules: of the checkout, or of the package that is installed."""
    spec = find_spec("anabranch")
    places = [ROOT / "python" / "anabranch", *map(Path, (spec and spec.submodule_search_locations) or ())]
    for place in places:
        if found := [*place.glob("_core*.so"), *place.glob("_cpu*.so")]:
            return found
    sys.exit("mutants: the C++ modules are neither in the checkout nor installed; run `make build` first")
