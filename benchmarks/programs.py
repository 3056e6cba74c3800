"""Programs in an environment of their own that answer each JSON line they read with another: vLLM's."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ANSWER = "ANSWER "


class Ended(RuntimeError):
    """The program ended without an answer."""


class Program:
    """A running program, which says what it is when it is ready: `about`.

    Args:
        command: a Python, a file, and what the file is told.
        env: its environment variables; default: ours, without what leads another Python to our packages.

    Raises:
        Ended: it did not come up, here or in `ask`.
    """

    def __init__(self, command: Sequence[str | Path], env: Mapping[str, str] | None = None, **more: str) -> None:
        self._name = Path(command[1]).name
        self._process = subprocess.Popen(
            [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**(plain() if env is None else env), **more},
        )  # fmt: skip
        self.about = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                found: dict[str, Any] = json.loads(line.removeprefix(ANSWER))
                return found
        raise Ended(f"{self._name} ended with status {self._process.wait()}; its error is above")

    def ask(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Its answer to a job."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise Ended(f"{self._name} ended with status {self._process.wait()}; its error is above") from None
        return self._answer()

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def plain() -> dict[str, str]:
    """Our environment variables, without those that lead another Python to our packages."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
