"""Tensor parallelism over gloo: real processes, compared with one engine that has the whole model."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import torch
from engine_kit import SIZES, byte_tokenizer, make_model
from ranks_program import PROMPTS, TIGHT, busy, calls, told

import anabranch as ab

pytest.importorskip("accelerate", reason="Transformers' tensor parallelism needs accelerate")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch was built without gloo", allow_module_level=True)

PROGRAM = Path(__file__).parents[1] / "kits" / "ranks_program.py"


def saved(folder: Path, kv_heads: int):
    """A tiny model on disk, and itself."""
    model = make_model("qwen3") if kv_heads == SIZES["num_key_value_heads"] else with_heads(kv_heads)
    model.save_pretrained(folder)
    return model


def with_heads(kv_heads: int):
    config = make_model("qwen3").config
    config.num_key_value_heads = kv_heads
    torch.manual_seed(4)
    return type(make_model("qwen3"))._from_config(config, attn_implementation="eager").eval()


def run(folder: Path, out: Path, size: int, *parts: str, limit: float = 240) -> list[int]:
    """Exit codes of the processes of one run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1", "ANABRANCH_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, str(PROGRAM), str(folder), str(out), *parts]
    ranks = [
        subprocess.Popen(command, env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)}, stderr=subprocess.PIPE)
        for r in range(size)
    ]
    deadline = time.monotonic() + limit
    try:
        for rank in ranks:
            if "stops" in parts and rank is ranks[1]:
                continue
            rank.wait(max(1, deadline - time.monotonic()))
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(signal.SIGKILL)
        errors = [rank.communicate()[1].decode() for rank in ranks]
    for rank, text in zip(ranks, errors, strict=True):
        if rank.returncode:
            print(text)
    return [rank.returncode for rank in ranks]


def found(out: Path, part: str, rank: int) -> dict:
    return json.loads(Path(f"{out}.{part}.{rank}.json").read_text())


def check(model, out: Path, size: int) -> None:
    """What the processes saw is what one engine gives."""
    whole = ab.Engine(model, num_pages=256, page_size=4)
    expected, seen = calls(whole), [found(out, "alike", rank) for rank in range(size)]
    for name, tokens in expected.items():
        assert seen[0]["calls"][name] == tokens, name
    assert seen[0]["busy"][0] == busy(ab.Engine(model, num_pages=TIGHT, page_size=4))[0]
    assert seen[0]["busy"][1] > 0  # pre-emptions
    assert seen[0]["stream"][-1] == "Finish" and len(seen[0]["stream"]) > 2
    assert len(seen[0]["errors"]) == 2 and seen[0]["own"] == ["Own", "mine alone"]
    for other in seen[1:]:
        assert other["stream"] == ["Finish"]
        assert other["own"] == ["RuntimeError", "rank 0 has an error that cannot be sent: mine alone"]
        for name in ("calls", "busy", "plans", "errors", "after", "pages"):
            assert other[name] == seen[0][name], name
    plain = told([whole.generate(prompt, max_new_tokens=16) for prompt in PROMPTS])
    assert found(out, "arrivals", 0)["arrivals"] == plain
    assert "RankLost" in found(out, "arrivals", 0)["closed"]
    assert "requests come in on rank 0" in found(out, "arrivals", 1)["add"]
    for rank in range(size):
        words = ("own_linear", "batch_invariant", "compile", "cuda_graphs", "num_pages")
        assert [text.split("=")[0].split(":")[0] for text in found(out, "refused", rank)["refused"]] == list(words)


def test_two_processes(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", 2)
    out = tmp_path / "out"
    assert run(tmp_path / "model", out, 2, "alike", "arrivals", "refused", "dies") == [0, 9]
    check(model, out, 2)
    lost = found(out, "dies", 0)
    assert "rank 0 of 2" in lost["lost"] and "start all processes again" in lost["lost"]
    assert lost["again"] and lost["free"]


@pytest.mark.slow
def test_three_processes(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", 3)
    out = tmp_path / "out"
    assert run(tmp_path / "model", out, 3, "alike", "arrivals", "refused") == [0, 0, 0]  # none aborts at its end
    check(model, out, 3)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_no_thread_outlives_the_groups(tmp_path: Path) -> None:
    """Such a thread aborted one of three programs at their end."""
    saved(tmp_path / "model", 2)
    out = tmp_path / "out"
    assert run(tmp_path / "model", out, 2, "leaves") == [0, 0]
    for rank in range(2):
        seen = found(out, "leaves", rank)
        assert seen["before"] and seen["after"] == [], seen


@pytest.mark.slow
def test_heads_that_cannot_be_shared_out(tmp_path: Path) -> None:
    saved(tmp_path / "model", 2)
    assert run(tmp_path / "model", tmp_path / "out", 3, "alike") == [1, 1, 1]


@pytest.mark.slow
def test_a_process_that_stops_answering(tmp_path: Path) -> None:
    saved(tmp_path / "model", 2)
    out = tmp_path / "out"
    assert run(tmp_path / "model", out, 2, "stops", limit=120)[0] == 0
    lost = found(out, "stops", 0)
    assert "start all processes again" in lost["lost"] and lost["again"] and lost["waited"] < 30


@pytest.mark.slow
def test_rank_0_dies(tmp_path: Path) -> None:
    saved(tmp_path / "model", 3)
    out = tmp_path / "out"
    assert run(tmp_path / "model", out, 3, "leader_dies") == [9, 0, 0]
    assert all("rank 0 is gone" in found(out, "leader_dies", rank)["lost"] for rank in (1, 2))


@pytest.mark.slow
def test_the_server_shares_a_model_out(tmp_path: Path) -> None:
    """`anabranch serve --tp 2`, by torchrun: answers, and an end at which every process ends well."""
    pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
    model = saved(tmp_path / "model", 2)
    byte_tokenizer().save_pretrained(tmp_path / "model")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["serve", "--tp", "2", "--model", str(tmp_path / "model"), "--port", str(port), "--num-pages", "256"]
    log = tmp_path / "log"
    with log.open("w") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "anabranch", *command, "--name", "tiny", "--dtype", "float32"],
            env={**os.environ, "PYTHONPATH": str(Path(ab.__file__).parents[1])}, stdout=file, stderr=file,
        )  # fmt: skip
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 200
        while True:
            try:
                assert httpx.get(f"{address}/health").status_code == 200
                break
            except httpx.TransportError:
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.5)
        asked = {"model": "tiny", "prompt": PROMPTS[0], "max_tokens": 12, "temperature": 0, "return_token_ids": True}
        found = httpx.post(f"{address}/v1/completions", json=asked, timeout=60).json()
        expected = ab.Engine(model, num_pages=256).generate(PROMPTS[0], max_new_tokens=12)
        assert tuple(found["choices"][0]["token_ids"]) == expected.token_ids
        server.send_signal(signal.SIGTERM)
        server.wait(60)
        assert "terminate called" not in log.read_text() and "RankLost" not in log.read_text(), log.read_text()
    finally:
        server.kill()
