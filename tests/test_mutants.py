"""The lists of `make mutants` fit the code, and ten of them, others each day, are noticed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "mutants"
CODE = """
import run
seen = set()
for mutant, area in run.listed().items():
    text = (run.ROOT / mutant.file).read_text(encoding="utf-8")
    count = text.count(mutant.old)
    assert count == 1, f"{area}: {mutant.name}: {mutant.old!r} stands {count} times in {mutant.file}"
    assert mutant.old != mutant.new, mutant.name
    assert run.key_of(mutant, area) not in seen, f"{area}: {mutant.name}: twice"
    seen.add(run.key_of(mutant, area))
    for test in mutant.tests.split():
        file, _, name = test.partition("::")
        assert (run.ROOT / file).exists(), test
        assert not name or f"def {name.partition('[')[0]}(" in (run.ROOT / file).read_text(encoding="utf-8"), test
print(len(seen))
"""


def test_every_mutant_has_its_place() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], cwd=FOLDER, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 150


def test_the_summary_is_of_these_lists() -> None:
    """Nineteen in twenty of those that change anything were noticed when they were last run."""
    found = json.loads((FOLDER / "outcome.json").read_text(encoding="utf-8"))
    killed, survived = found["all"]["killed"], found["all"]["survived"]
    assert killed == len(found["killed"]) >= 60 and killed >= 0.95 * (killed + survived)


SAMPLES = """
import datetime
import json
import pathlib
import sys
import types
import run

found = json.loads(run.OUTCOME.read_text(encoding="utf-8"))
killed, mutants = found["killed"], run.listed()
# The outcome of the day may hold none that hangs or takes long, so two of the brief ones are entered as such.
brief = {run.key_of(m, a) for m, a in mutants.items() if m.file.startswith("python/")}
hangs, long = [name for name in killed if name in brief and killed[name] <= 60][:2]
killed |= {hangs: run.LIMIT, long: 61.0}
run.OUTCOME = pathlib.Path(sys.argv[1])
run.OUTCOME.write_text(json.dumps(found), encoding="utf-8")
slow = {name for name, seconds in killed.items() if seconds > 60}
seen = set()
for day in range(200):
    date = datetime.date(2026, 1, 1) + datetime.timedelta(day)
    run.datetime = types.SimpleNamespace(date=types.SimpleNamespace(today=lambda: date))
    sample = {run.key_of(m, a) for m, a in run.sample_of(mutants, 10).items()}
    assert len(sample) == 10 and sample <= killed.keys() and not sample & slow, sample
    seen |= sample
assert len(seen) > 60, len(seen)
"""


def test_a_sample_holds_nothing_slow_and_is_another_each_day(tmp_path: Path) -> None:
    """Neither what hangs, which is noticed after a quarter of an hour, nor what takes more than a minute."""
    command = [sys.executable, "-c", SAMPLES, str(tmp_path / "outcome.json")]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(os.name != "posix", reason="mutants run in forks of one process")
def test_a_sample_of_the_day_is_noticed() -> None:
    command = [sys.executable, "run.py", "--sample", "10"]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
