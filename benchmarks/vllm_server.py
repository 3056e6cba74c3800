"""A vLLM server (CPU build) out of an environment of its own, while it is needed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .programs import plain


@contextmanager
def vllm_server(
    python: Path, model: Path, dtype: str = "float32", port: int = 8123, threads: int | None = None
) -> Iterator[str]:
    """The URL of a server that runs while the block lasts; eager, with a prefix cache, telling what it found.

    Args:
        python: of an environment with vLLM.
        model: a folder with a Hugging Face model.
        threads: of the server; default: as vLLM chooses.

    Raises:
        RuntimeError: it ended, or does not answer within ten minutes.
    """
    command = [
        str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--dtype", dtype,
        "--block-size", "32", "--port", str(port), "--enable-prompt-tokens-details", "--max-model-len", "2048",
        "--enforce-eager",
    ]  # fmt: skip
    env = {**plain(), "HF_HUB_OFFLINE": "1"}
    env.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    if threads is not None:
        env |= {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    server = subprocess.Popen(command, env=env, start_new_session=True)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the server must not outlive it
    try:
        _wait(server, f"http://127.0.0.1:{port}/health")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)
        signal.signal(signal.SIGTERM, before)


def _wait(server: subprocess.Popen, url: str) -> None:
    end = time.monotonic() + 600
    while time.monotonic() < end:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with status {server.returncode}; its output says why")
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(2)
    raise RuntimeError("the server did not answer within ten minutes")
