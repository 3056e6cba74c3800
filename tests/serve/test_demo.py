"""``anabranch demo --web``: a page that shows the demo's problems as they are worked, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from engine_kit import byte_tokenizer, make_model
from typer.testing import CliRunner

import anabranch as ab
from anabranch.cli.app import app as commands

pytest.importorskip("fastapi", reason="needs the extra 'serve'")
uvicorn = pytest.importorskip("uvicorn", reason="needs the extra 'serve'")

from anabranch.serve.demo import Shown, create_demo  # noqa: E402
from anabranch.serve.run import Running  # noqa: E402

CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
SHOWN = (
    Shown("three samples", "abc", {"strategy": ab.SelfConsistency(n=3), "max_new_tokens": 12, "seed": 1}),
    Shown("<b>plain</b>", "xyz", {"max_new_tokens": 6}),
)


@contextmanager
def served(shown=SHOWN):
    """(URL, what failed) of a demo on a free port."""
    failed: list[str] = []
    engine = ab.AsyncEngine(make_model("llama"), byte_tokenizer(), num_pages=100)
    config = uvicorn.Config(create_demo(engine, shown, failed.append), log_level="warning", timeout_graceful_shutdown=1)
    server = Running(config)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(128)  # who comes before the server does waits
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", failed
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
    assert engine.cache.usage().pages_free == 100


def follow(url: str, finished: int) -> list[dict]:
    """What the feed tells until so many problems are done."""
    told: list[dict] = []
    with httpx.stream("GET", f"{url}/live", timeout=60) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                told.append(json.loads(line[6:]))
                if sum(event["do"] == "finish" for event in told) == finished:
                    return told
    raise AssertionError("the feed ended")


def test_whoever_comes_sees_it_from_the_beginning():
    with served() as (url, failed):
        first = follow(url, 2)
        assert list(dict.fromkeys(event["request"] for event in first)) == ["three samples", "<b>plain</b>"]
        assert [e["children"] for e in first if e["do"] == "fork"] == [["0.0", "0.1", "0.2"]]
        want = ab.Engine(make_model("llama"), byte_tokenizer()).generate("xyz", max_new_tokens=6).text
        assert "".join(e["text"] for e in first if e["request"] == "<b>plain</b>" and e["do"] == "token") == want
        again = follow(url, 2)
        assert {event["request"] for event in again} == {"three samples · run 2", "<b>plain</b> · run 2"}
        assert [e["do"] for e in again] == [e["do"] for e in first] and not failed
        assert "What runs now" in httpx.get(url).text
        assert httpx.post(f"{url}/v1/completions", json={}).status_code == 404


def test_a_problem_that_fails_is_told_and_the_others_go_on():
    broken = Shown("too long", "a" * 5000, {"max_new_tokens": 4})
    with served((broken, SHOWN[1])) as (url, failed):
        told = follow(url, 1)
        assert {event["request"] for event in told} == {"<b>plain</b>"}
        assert len(failed) == 1 and failed[0].startswith("too long: ") and "num_pages" in failed[0]


def test_the_tree_is_drawn_in_a_browser_as_it_grows():
    sync = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
    with sync.sync_playwright() as playwright, served() as (url, _):
        try:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        except sync.Error as error:
            pytest.skip(f"no Chromium to start: {str(error).splitlines()[0]}")
        page = browser.new_page()
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(url)
        page.wait_for_selector("article.done:has-text('three samples')")
        page.wait_for_selector("article.done:has-text('<b>plain</b>')")  # text, never markup
        box = page.locator("article", has_text="three samples")
        heads = box.locator(".thread > b").all_inner_texts()
        assert heads == ["trunk", "thread 0.0", "thread 0.1", "thread 0.2"]
        trunk = box.locator("xpath=./div")
        assert trunk.locator(".thread").count() == 3  # the tree: children inside their parent
        assert all("tokens" in text for text in box.locator(".thread .thread > i").all_inner_texts())
        assert page.inner_text("#state") == "watching" and said == []
        browser.close()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--json"], "--web with --json or --save"),
        (["--save", "x.json"], "--web with --json or --save"),
        (["--model", "multiplication", "what is this"], "reads a product of two numbers"),
        (["--model", "smollm2", " "], "PROMPT is empty"),
    ],
)
def test_mistakes(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(commands, ["demo", "--web", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 2 and said in result.stderr


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setattr("anabranch.cli.web.load_model", lambda *_: pytest.fail("loaded"))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        result = CliRunner().invoke(commands, ["demo", "--web", "--port", port])
    assert result.exit_code == 2 and "pass another --port" in result.stderr


def test_the_command_from_its_first_line_to_ctrl_c():
    env = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    env |= {"PYTHONPATH": str(Path(ab.__file__).parents[1]), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-u", "-m", "anabranch", "demo", "--web", "12 * 34"]
    child = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        url = next(word for line in child.stdout for word in line.split() if word.startswith("http://")).rstrip("/")
        told = follow(url, 1)
        text = "".join(event["text"] for event in told if event["do"] == "token")
        assert "408" in text and [len(e["children"]) for e in told if e["do"] == "fork"] == [2]
        child.send_signal(signal.SIGINT)
        begin = time.monotonic()
        assert child.wait(60) in (0, 130) and time.monotonic() - begin < 60
        assert "Traceback" not in child.stderr.read()
    finally:
        child.kill()
        child.wait()
