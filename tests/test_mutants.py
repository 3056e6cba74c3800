"""The lists of `make mutants` fit the code: each mistake has exactly one place, and its tests exist."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "mutants"
CODE = """
import run
for mutant in run.listed(""):
    text = (run.ROOT / mutant.file).read_text(encoding="utf-8")
    count = text.count(mutant.old)
    assert count == 1, f"{mutant.name}: {mutant.old!r} stands {count} times in {mutant.file}"
    assert mutant.old != mutant.new, mutant.name
    for test in mutant.tests.split():
        assert (run.ROOT / test.partition("::")[0]).exists(), test
print(len(run.listed("")))
"""


def test_every_mutant_has_its_place() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], cwd=FOLDER, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 30
