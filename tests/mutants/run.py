"""Small mistakes put into the code one at a time: is each noticed by the tests nearest to it?

python tests/mutants/run.py                        # all of them (hours); exit status 1 when one survives
python tests/mutants/run.py --area plan --resume   # what is left of one list; --only WORD: whose name or file holds it
python tests/mutants/run.py --sample 10            # ten of the day that need no build and were noticed before; CI
python tests/mutants/run.py --summary              # write outcome.json from the results so far

A mutant is one replacement in one file; the lists are in `areas`. Each is made in a copy of the checkout
(`build/mutants`), never in the checkout itself, and the modules are built again where C++ was changed. Tests that fail
without any mutant would prove nothing: what noticed the mutants of an area runs once more, on the unchanged copy, and
has to pass.
Each outcome is written to `build/mutants/results.json` as it comes, so that a run that was cut short can be resumed.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import copy_of_checkout
import typer
from copy_of_checkout import COPY, ROOT
from entry import Mutant
from outcome import summary_of
from rich.console import Console

HERE = Path(__file__).parent
AREAS = sorted(p.stem for p in (HERE / "areas").glob("[a-z]*.py"))
RESULTS, OUTCOME = COPY.parent / "results.json", HERE / "outcome.json"
BRIEF = 60  # seconds that one of a sample may have taken
LIMIT = 900  # seconds of one selection of tests; a mutant that hangs is noticed
ENVIRONMENT = {
    "PYTHONPATH": str(COPY / "python"),
    "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_NUM_THREADS": "1",
    "ANABRANCH_EMULATOR_DEFINES": "ANABRANCH_FEW_HEAD_DIMS",  # a quarter of the variants of the CUDA kernels
    "ANABRANCH_FEW_CPU_VARIANTS": "1",  # one with 64-byte vectors and pairs, one without
}


class Stale(Exception):
    """An entry that no longer fits the code, or tests that fail by themselves."""


def listed(area: str = "") -> dict[Mutant, str]:
    """Mutants and their areas, those of one file beside one another: it is built again once for each."""
    found = {m: name for name in AREAS if area in ("", name) for m in import_module(f"areas.{name}").MUTANTS}
    return dict(sorted(found.items(), key=lambda pair: (needs_build(pair[0]), pair[1], pair[0].file)))


def needs_build(mutant: Mutant) -> bool:
    return mutant.file.startswith("csrc/") and not mutant.file.startswith("csrc/cuda/")  # (the emulator builds its own)


def spoiled(mutant: Mutant) -> str:
    """The text of a file with the mistake in it."""
    text = (ROOT / mutant.file).read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        raise Stale(f"{mutant.name}: {mutant.old!r} stands {text.count(mutant.old)} times in {mutant.file}")
    return text.replace(mutant.old, mutant.new)


def warm() -> None:
    """Import what most tests import, nothing of ours, so that a fork need not."""
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # as tests/conftest.py has it, before anything imports triton
    for name in ("hypothesis.strategies", "pytest", "torch._dynamo", "tokenizers", "transformers.generation.utils"):
        import_module(name)
    for name in ("AutoModelForCausalLM", "LlamaForCausalLM", "Qwen3ForCausalLM", "PreTrainedTokenizerFast"):
        getattr(import_module("transformers"), name)


def pytest_in_copy(tests: list[str], log: Path) -> None:
    os.setsid()  # a test's own processes end with it
    with log.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.chdir(COPY)
    sys.path[:] = [str(COPY / "python"), *(p for p in sys.path if Path(p or ".").resolve() != HERE)]
    import pytest

    os._exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:randomly", *tests]))


def failed(tests: list[str]) -> str:
    """What failed first; empty: nothing. In a fork of this process, which has imported what is slow to import."""
    log = COPY.parent / "pytest.log"
    child = multiprocessing.get_context("fork").Process(target=pytest_in_copy, args=(tests, log))
    child.start()
    try:
        child.join(LIMIT)
        if child.exitcode is None:
            return f"nothing within {LIMIT} seconds"
    finally:
        try:
            os.killpg(child.pid or 0, signal.SIGKILL)
        except ProcessLookupError:
            pass
        child.join()
    text = log.read_text(errors="replace")
    if child.exitcode == 5:
        raise Stale(f"pytest {' '.join(tests)}: no such tests\n{text[-2000:]}")
    found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", text, re.MULTILINE)
    return "" if child.exitcode == 0 else found[1] if found else f"exit status {child.exitcode}"


def write(path: Path, data: Any) -> None:
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(data, indent=1, ensure_ascii=False), encoding="utf-8")
    scratch.replace(path)


def key_of(mutant: Mutant, area: str) -> str:
    return f"{area}: {mutant.name}"


def run(mutants: dict[Mutant, str], results: dict[str, Any], limit: int, check: bool, console: Console) -> None:
    """Run these, or the first `limit` of them, and put their outcomes into `results`."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    todo = []
    for mutant, area in mutants.items():
        entry = {"area": area, "file": mutant.file, "commit": commit.strip(), "entry": list(mutant)}
        if mutant.equivalent:
            results[key_of(mutant, area)] = entry | {"outcome": "equivalent"}
        else:
            todo.append((mutant, entry))
    todo = todo[: limit or None]
    if not todo:
        write(RESULTS, results)
        return
    copy_of_checkout.renew(built=any(needs_build(m) for m, _ in todo))
    warm()
    for number, (mutant, entry) in enumerate(todo, 1):
        begun, path = time.monotonic(), COPY / mutant.file
        path.write_text(spoiled(mutant), encoding="utf-8")
        try:
            if needs_build(mutant):
                copy_of_checkout.build()
            noticed = failed(mutant.tests.split())
        finally:
            path.write_text((ROOT / mutant.file).read_text(encoding="utf-8"), encoding="utf-8")
        entry |= {"outcome": "killed" if noticed else "SURVIVED", "by": noticed}
        results[key_of(mutant, entry["area"])] = entry | {"seconds": round(time.monotonic() - begun, 1)}
        write(RESULTS, results)
        console.print(f"{number}/{len(todo)} {entry['area']}: {mutant.name}: {entry['outcome']}", highlight=False)
        if number == len(todo) or todo[number][1]["area"] != entry["area"]:
            if needs_build(mutant):  # between two of them the next one's build sees to the last one's file
                copy_of_checkout.build()
            if check:
                check_sound([(m, e) for m, e in todo[:number] if e["area"] == entry["area"]], results)


def check_sound(done: list[tuple[Mutant, dict[str, Any]]], results: dict[str, Any]) -> None:
    """What noticed these mutants passes on the unchanged copy; else they were not noticed by it."""
    tests: dict[str, set[str]] = {}  # by the mutant that they noticed
    for mutant, entry in done:
        if entry["outcome"] == "killed":
            by = entry["by"]
            tests[key_of(mutant, entry["area"])] = {by} if by.startswith("tests/") else set(mutant.tests.split())
    if tests and (failure := failed(sorted(set().union(*tests.values())))):
        for key, noticed_by in tests.items():
            if failure in noticed_by or not failure.startswith("tests/"):
                del results[key]
        write(RESULTS, results)
        raise Stale(f"fails without any mutant: {failure} (see {COPY.parent / 'pytest.log'})")


def main(
    only: Annotated[str, typer.Option(help="Only those whose name or file holds this.")] = "",
    area: Annotated[str, typer.Option(help="Only one list: " + ", ".join(AREAS))] = "",
    resume: Annotated[bool, typer.Option(help="Leave out those that were noticed before.")] = False,
    limit: Annotated[int, typer.Option(help="Run at most so many.")] = 0,
    sample: Annotated[int, typer.Option(help="So many of the day, of those that are cheap and were noticed.")] = 0,
    summary: Annotated[bool, typer.Option(help="Run nothing; write outcome.json.")] = False,
) -> None:
    """Put small mistakes into a copy of the code, and say which the tests do not notice."""
    console = Console()
    mutants = {m: a for m, a in listed(area).items() if only in m.file or only in m.name}
    if not mutants:
        sys.exit(f"mutants: none in area {area or 'any'} whose name or file holds {only!r}; areas: {', '.join(AREAS)}")
    COPY.parent.mkdir(parents=True, exist_ok=True)
    with (COPY.parent / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit("mutants: another run is at work in build/mutants; wait for its end")
        results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        if summary:
            write(OUTCOME, summary_of({key_of(m, a): m for m, a in mutants.items()}, results))
        elif sample:
            mutants = sample_of(mutants, sample)
            run(mutants, results, 0, False, console)
        else:
            left = {m: a for m, a in mutants.items() if not (resume and is_settled(m, a, results))}
            run(left, results, limit, True, console)
    fates = [results[key]["outcome"] if (key := key_of(m, a)) in results else "not run" for m, a in mutants.items()]
    for mutant, fate in zip(mutants, fates, strict=True):
        if fate == "SURVIVED":
            console.print(f"SURVIVED {mutant.name} ({mutant.file}); run were {mutant.tests}", highlight=False)
    console.print(", ".join(f"{fates.count(f)} {f}" for f in sorted(set(fates))))
    sys.exit(int("SURVIVED" in fates))


def is_settled(mutant: Mutant, area: str, results: dict[str, Any]) -> bool:
    found = results.get(key_of(mutant, area), {})
    return found.get("entry") == list(mutant) and found["outcome"] != "SURVIVED"


def sample_of(mutants: dict[Mutant, str], count: int) -> dict[Mutant, str]:
    """Some of those that were noticed within a minute when outcome.json was written, by the date.

    So none that hangs, which is noticed by the limit alone, and none whose tests take long.
    """
    seconds = json.loads(OUTCOME.read_text(encoding="utf-8"))["killed"]
    cheap = [m for m, a in mutants.items() if seconds.get(key_of(m, a), LIMIT) <= BRIEF]
    cheap = [m for m in cheap if m.file.startswith("python/")]
    day = random.Random(datetime.date.today().isoformat()).sample(cheap, min(count, len(cheap)))
    return {m: mutants[m] for m in day}


if __name__ == "__main__":
    sys.dont_write_bytecode = True
    os.environ |= ENVIRONMENT
    try:
        typer.run(main)
    except Stale as error:
        sys.exit(f"mutants: {error}")
