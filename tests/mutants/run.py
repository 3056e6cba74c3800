"""Small mistakes put into the code one at a time: is each noticed by the tests nearest to it?

python tests/mutants/run.py [WORD]     # those whose file or name holds WORD; exit status 1 when one survives

A mutant is one replacement in one file (engine.py and its neighbours list them). Each is made in a scratch copy of the
checkout, never in the checkout itself; modules are built again where C++ was changed. Tests that fail without any
mutant would prove nothing, so each selection of tests first runs on the unchanged copy.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
LISTS = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem != "run")
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*_cache", "__pycache__", ".hypothesis")
LIMIT = 900  # seconds of one selection of tests; a mutant that hangs is noticed


class Mutant(NamedTuple):
    """`old` stands exactly once in `file`; `tests` are arguments of pytest. equivalent: why nothing can be noticed."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    equivalent: str = ""


class Stale(Exception):
    """An entry that no longer fits the code, or tests that fail by themselves."""


def listed(word: str) -> list[Mutant]:
    sys.path.insert(0, str(Path(__file__).parent))
    found = [m for name in LISTS for m in import_module(name).MUTANTS]
    return [m for m in found if word in m.file or word in m.name]


@contextmanager
def changed(copy: Path, mutant: Mutant) -> Iterator[None]:
    path = copy / mutant.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        raise Stale(f"{mutant.name}: {mutant.old!r} stands {text.count(mutant.old)} times in {mutant.file}")
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        build(copy, mutant)
        yield
    finally:
        path.write_text(text, encoding="utf-8")
        build(copy, mutant)


def build(copy: Path, mutant: Mutant) -> None:
    if mutant.file.startswith("csrc/"):
        subprocess.run(["make", "build"], cwd=copy, check=True, capture_output=True)


def passes(copy: Path, tests: str) -> bool:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests.split()]
    environment = os.environ | {"PYTHONPATH": str(copy / "python"), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return False
    if done.returncode not in (0, 1, 2):  # 2: the mutant cannot even be imported
        raise Stale(f"pytest {tests}: exit status {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 0


def main(word: str = "") -> int:
    mutants, console = listed(word), Console()
    if not list((ROOT / "python/anabranch").glob("_cpu*")):
        raise Stale("the C++ modules are not in place; run `make build` first")
    table = Table("mutant", "file", "outcome", title=f"{len(mutants)} mutants")
    fates: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "checkout"
        shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
        sound: set[str] = set()
        for mutant in mutants:
            if mutant.equivalent:
                fate = f"equivalent: {mutant.equivalent}"
            else:
                if mutant.tests not in sound and not passes(copy, mutant.tests):
                    raise Stale(f"pytest {mutant.tests}: fails without any mutant")
                sound.add(mutant.tests)
                with changed(copy, mutant):
                    fate = "SURVIVED" if passes(copy, mutant.tests) else "killed"
            fates.append(fate.split(":")[0])
            table.add_row(mutant.name, mutant.file, fate)
            console.print(f"{len(fates)}/{len(mutants)} {mutant.name}: {fate}", highlight=False)
    console.print(table)
    console.print(", ".join(f"{fates.count(f)} {f}" for f in sorted(set(fates))) or "no mutant of that name")
    return int("SURVIVED" in fates or not fates)


if __name__ == "__main__":
    sys.modules["run"] = sys.modules["__main__"]  # the lists import Mutant from here
    sys.exit(main(*sys.argv[1:2]))
