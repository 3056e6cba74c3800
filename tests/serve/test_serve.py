"""The server over real sockets: the official client, plain HTTP, errors, clients that vanish."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from engine_kit import byte_tokenizer, make_engine, make_model

import anabranch as ab

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
openai = pytest.importorskip("openai", reason="the openai client is not installed")
httpx = pytest.importorskip("httpx")
uvicorn = pytest.importorskip("uvicorn")

from anabranch.serve import Settings, create_app  # noqa: E402


@contextmanager
def serving(engine, **settings):
    """``(address, the ASGI application)`` of a server that runs while the block lasts."""
    app = create_app(engine, Settings("tiny", **settings))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", app
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def make_async(num_pages=2000, **options):
    return ab.AsyncEngine(make_model(), byte_tokenizer(), num_pages=num_pages, page_size=4, **options)


@pytest.fixture(scope="module")
def server():
    engine = make_async()
    with serving(engine, api_keys=("right", "other"), max_body=20_000, max_requests=40) as (address, app):
        yield address, app
    usage = engine.cache.usage()
    assert usage.pages_free == usage.pages_total


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=server[0] + "/v1", api_key="right", max_retries=0)


@pytest.fixture
def post(server):
    def send(path, body, key="right", **options):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers["Content-Type"] = "application/json"
        return httpx.post(server[0] + path, content=content, headers=headers, timeout=60, **options)

    return send


def idle(app):
    deadline = time.monotonic() + 60
    while app.state.server.under_way and time.monotonic() < deadline:
        time.sleep(0.02)
    return app.state.server.under_way == 0


# ------------------------------------------------------------------------------------------------ the official client


def test_completions_are_those_of_the_engine(client):
    expected = make_engine(tokenizer=byte_tokenizer()).generate("one river", max_new_tokens=12)
    found = client.completions.create(model="tiny", prompt="one river", max_tokens=12, temperature=0)
    assert found.choices[0].text == expected.text
    assert found.usage.prompt_tokens == 9 and found.usage.completion_tokens == len(expected.token_ids)
    assert found.choices[0].finish_reason == ("length" if expected.tree.ended == "length" else "stop")
    ids = list(byte_tokenizer()("one river")["input_ids"])
    assert (
        client.completions.create(model="tiny", prompt=ids, max_tokens=12, temperature=0).choices[0].text
        == expected.text
    )


def test_streams_are_the_same_text_piece_by_piece(client):
    options = dict(model="tiny", prompt="one river", max_tokens=30, temperature=0)
    whole = client.completions.create(**options)
    pieces = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.text for p in pieces for c in p.choices) == whole.choices[0].text
    assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens and not pieces[-1].choices
    assert [c.finish_reason for p in pieces for c in p.choices][-1] == whole.choices[0].finish_reason


def test_chats_with_n_seeds_and_tools(client):
    messages = [{"role": "user", "content": "hello"}]
    options = dict(model="tiny", messages=messages, max_tokens=8, temperature=1.0, n=3, seed=5)
    once, again = (client.chat.completions.create(**options) for _ in range(2))
    texts = [c.message.content for c in once.choices]
    assert texts == [c.message.content for c in again.choices] and len(set(texts)) == 3
    other = client.chat.completions.create(**{**options, "seed": 6})
    assert [c.message.content for c in other.choices][:2] == texts[1:]  # copy i has the seed plus i
    pieces = list(client.chat.completions.create(**options, stream=True))
    told = ["", "", ""]
    for piece in pieces:
        for choice in piece.choices:
            told[choice.index] += choice.delta.content or ""
    assert told == texts
    client.chat.completions.create(**options, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])


def test_stop_strings_are_left_out_and_never_told_in_part(client):
    options = dict(model="tiny", prompt="one river", max_tokens=40, temperature=0)
    whole = client.completions.create(**options).choices[0].text
    stop = whole[7:10]
    cut = client.completions.create(**options, stop=[stop]).choices[0]
    assert cut.text == whole[: whole.index(stop)] and cut.finish_reason == "stop"
    told = "".join(c.text for p in client.completions.create(**options, stop=stop, stream=True) for c in p.choices)
    assert told == cut.text


def test_logprobs_of_the_tokens_written(client):
    found = client.completions.create(model="tiny", prompt="p", max_tokens=5, temperature=0, logprobs=1).choices[0]
    engine = make_engine(tokenizer=byte_tokenizer())
    expected = engine.generate("p", max_new_tokens=5, logprobs=True)
    values = [lp for run in expected.tree.runs if run.kind == "sampled" for lp in run.logprobs]
    assert found.logprobs.token_logprobs == pytest.approx(values, abs=1e-3)
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=3, temperature=0, logprobs=True
    )
    assert len(chat.choices[0].logprobs.content) == 3 and all(e.logprob <= 0 for e in chat.choices[0].logprobs.content)


def test_streams_have_logprobs_and_echo_too(client):
    options = dict(model="tiny", prompt="one river", max_tokens=9, temperature=1.0, seed=4, n=2, logprobs=1, echo=True)
    whole = client.completions.create(**options)
    told, logprobs = ["", ""], [[], []]
    for piece in client.completions.create(**options, stream=True):
        for choice in piece.choices:
            told[choice.index] += choice.text
            logprobs[choice.index] += choice.logprobs.token_logprobs if choice.logprobs else []
    assert told == [choice.text for choice in whole.choices] and told[0].startswith("one river")
    for choice, found in zip(whole.choices, logprobs, strict=True):
        assert found == pytest.approx(choice.logprobs.token_logprobs, abs=1e-3) and len(found) == 9
    chat = dict(model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=3, temperature=0, logprobs=True)
    pieces = list(client.chat.completions.create(**chat, stream=True))
    entries = [e for piece in pieces for c in piece.choices if c.logprobs for e in c.logprobs.content]
    assert len(entries) == 3 and all(e.logprob <= 0 for e in entries)


def test_a_piece_of_a_stream_is_one_line_for_every_client(post):
    """Clients that split at what Unicode calls ends of lines find whole JSON."""
    prompt = "a\x85b\u2028c\u2029d\x0b\x1ce"
    answer = post("/v1/completions", {"model": "tiny", "prompt": prompt, "echo": True, "stream": True, "max_tokens": 2})
    lines = [line for line in answer.text.splitlines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert json.loads(lines[0][6:])["choices"][0]["text"] == prompt


def test_strategies_by_request_with_a_thread_on_each_delta(client, post):
    extra = {"strategy": "self-consistency", "strategy_options": {"n": 3, "vote": "line"}}
    options = dict(model="tiny", prompt="one river", max_tokens=10, temperature=1.0, seed=1)
    found = client.completions.create(**options, extra_body=extra)
    assert found.usage.threads == 3 and found.usage.critical_path_tokens < found.usage.completion_tokens
    body = {**options, **extra, "stream": True, "stream_options": {"threads": True}}
    told = {}
    for line in post("/v1/completions", body).text.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line[6:])["choices"]:
                told[choice["thread"]] = told.get(choice["thread"], "") + choice["text"]
    assert told["0"] == found.choices[0].text and {"0.0", "0.1", "0.2"} <= set(told)
    plain = client.completions.create(**options, extra_body=extra, stream=True)
    assert "".join(c.text for p in plain for c in p.choices) == found.choices[0].text


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/models", "/tokenize", "/live"])
@pytest.mark.parametrize("key", [None, "wrong", "righ", "right "])
def test_nobody_gets_in_without_a_key(server, path, key):
    headers = {} if key is None else {"Authorization": f"Bearer {key}" if key != "right " else "Basic right"}
    answer = httpx.request("GET", server[0] + path, headers=headers)
    assert answer.status_code == 401 and answer.json()["error"]["type"] == "authentication_error"


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"{not json", 400, "JSON"),
        (b'{"model": "tiny", "prompt": "\xff\xfe"}', 400, ""),
        (b"[]", 400, ""),
        ({}, 400, "model"),
        ({"model": "tiny"}, 400, "prompt"),
        ({"model": "other", "prompt": "p"}, 404, "'tiny' is"),
        ({"model": "tiny", "prompt": ""}, 400, "prompt"),
        ({"model": "tiny", "prompt": []}, 400, "prompt"),
        ({"model": "tiny", "prompt": [99999]}, 400, "outside the model's vocabulary"),
        ({"model": "tiny", "prompt": "p", "max_tokens": 0}, 400, "max_tokens"),
        ({"model": "tiny", "prompt": "p", "temperature": -1}, 400, "temperature"),
        ({"model": "tiny", "prompt": "p", "tempreture": 1}, 400, "tempreture"),
        ({"model": "tiny", "prompt": "p", "n": 1000}, 400, "at most 64"),
        ({"model": "tiny", "prompt": "p", "logit_bias": {"5": 1}}, 400, "logit_bias"),
        ({"model": "tiny", "prompt": "p", "strategy": "self-consistancy"}, 400, "nearest are self-consistency"),
        ({"model": "tiny", "prompt": "p", "strategy": "os:system"}, 400, "unknown here"),
        ({"model": "tiny", "prompt": "p", "strategy": "self-consistency", "strategy_options": {"m": 1}}, 400,
         "no option"),
        ({"model": "tiny", "prompt": "p", "strategy": "self-consistency", "strategy_options": {"n": 0}}, 400, "n"),
        ({"model": "tiny", "prompt": "p", "strategy": "sequential"}, 400, "sequential needs the option strategy"),
        ({"model": "tiny", "prompt": "p", "strategy": "self-consistency", "strategy_options": {"vote": "(a+)+$"}}, 400,
         "pass one of"),
        ({"model": "tiny", "prompt": "p", "stream_options": {}}, 400, "stream_options"),
        ({"model": "tiny", "prompt": "x" * 19_000}, 400, "can never fit"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_say_what_is_wrong(post, body, status, says, stream):
    if isinstance(body, dict) and stream and "stream_options" not in body:
        body = {**body, "stream": True}
    answer = post("/v1/completions", body)
    error = answer.json()["error"]
    assert (
        answer.status_code == status and says in error["message"] and set(error) == {"message", "type", "param", "code"}
    )


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_that_the_engine_refuses_gets_its_status(post, stream):
    messages = [{"role": "user", "content": "x" * 19_000}]
    answer = post("/v1/chat/completions", {"model": "tiny", "messages": messages, "stream": stream})
    assert answer.status_code == 400 and "can never fit" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
def test_half_a_surrogate_pair_is_no_text(post, path):
    """JSON can write one, UTF-8 cannot."""
    text = {"messages": [{"role": "user", "content": "a\ud800"}]} if "chat" in path else {"prompt": "a\ud800"}
    answer = post(path, {"model": "tiny", **text})
    assert answer.status_code == 400 and "surrogate" in answer.json()["error"]["message"]
    answer = post(path, {"model": "tiny", "\udfff": 1})
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_bodies_that_are_too_large(post, server):
    assert post("/v1/completions", {"model": "tiny", "prompt": "x" * 30_000}).status_code == 413

    def forever():
        for _ in range(100):
            yield b"x" * 1000

    headers = {"Authorization": "Bearer right", "Content-Type": "application/json"}
    assert httpx.post(server[0] + "/v1/completions", content=forever(), headers=headers).status_code == 413


def test_more_than_the_server_takes(server, client, post):
    assert post("/v1/completions", {"model": "tiny", "prompt": ["p"] * 41, "max_tokens": 1}).status_code == 429
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model="tiny", prompt=["p"] * 41, max_tokens=1, stream=True)
    assert idle(server[1])


def test_a_timeout_ends_the_request(post, server):
    body = {"model": "tiny", "prompt": "p", "max_tokens": 1500, "timeout": 0.05, "temperature": 1.0, "n": 16}
    answer = post("/v1/completions", body)
    assert answer.status_code == 408 and "deadline" in answer.json()["error"]["message"] and idle(server[1])


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_vanish(server, stream):
    body = {"model": "tiny", "prompt": "p", "max_tokens": 1500, "temperature": 1.0, "n": 16, "stream": stream}
    headers = {"Authorization": "Bearer right"}
    with httpx.Client(timeout=0.1) as http, pytest.raises(httpx.TimeoutException):
        if stream:
            with http.stream("POST", server[0] + "/v1/completions", json=body, headers=headers) as answer:
                next(answer.iter_lines())
                raise httpx.ReadTimeout("left on purpose")
        http.post(server[0] + "/v1/completions", json=body, headers=headers)
    assert idle(server[1])


@pytest.mark.parametrize("stream", ["false", "true"])
def test_a_client_that_vanishes_before_its_first_token(server, stream):
    """Its request ends then, and not with its first token."""
    address, app = server
    body = b'{"model": "tiny", "prompt": "p", "stream": %b}' % stream.encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer right\r\nContent-Length: {len(body)}\r\n"
    assert idle(app)
    with app.state.server.engine.engine.loop.turns.between():  # no step begins: nobody gets a token
        with socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1]))) as client:
            client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            deadline = time.monotonic() + 60
            while not app.state.server.under_way and time.monotonic() < deadline:
                time.sleep(0.01)
            assert app.state.server.under_way == 1
        assert idle(app)


def test_an_exception_of_one_request_disturbs_no_other(server, client, monkeypatch):
    from anabranch.strategies.sampling.self_consistency import SelfConsistency

    def broken(self, trunk):
        yield trunk.decode(2)
        raise RuntimeError("on purpose")

    monkeypatch.setattr(SelfConsistency, "run", broken)
    answers = []
    other = threading.Thread(
        target=lambda: answers.append(client.completions.create(model="tiny", prompt="q", max_tokens=30, temperature=0))
    )
    other.start()
    with pytest.raises(openai.InternalServerError, match="on purpose"):
        client.completions.create(model="tiny", prompt="p", extra_body={"strategy": "self-consistency"})
    other.join()
    assert answers[0].choices[0].text == make_engine(tokenizer=byte_tokenizer()).generate("q", max_new_tokens=30).text


# ------------------------------------------------------------------------------------------------ everything else


def test_the_other_pages(server, client, post):
    get = lambda path: httpx.get(server[0] + path)  # noqa: E731
    assert get("/health").json() == {"status": "ok"}
    assert "version" in get("/version").json()
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert "<title>anabranch" in get("/").text
    client.completions.create(model="tiny", prompt="p", max_tokens=3, temperature=0)
    text = get("/metrics").text
    assert 'anabranch:request_success_total{finished_reason="length"}' in text
    assert "anabranch:num_threads_running 0.0" in text and "anabranch:num_requests_waiting 0.0" in text
    assert "anabranch:time_to_first_token_seconds_bucket" in text and "anabranch:kv_cache_usage_perc" in text
    assert post("/tokenize", {"prompt": "ab"}).json() == {"tokens": byte_tokenizer()("ab")["input_ids"], "count": 2}
    chat = post("/tokenize", {"messages": [{"role": "user", "content": "x"}]}).json()
    assert chat["count"] > 5
    assert get("/nowhere").json()["error"]["code"] == 404


def test_whoever_watches_sees_the_tree(server, client):
    headers = {"Authorization": "Bearer right"}
    with httpx.Client(timeout=30) as http, http.stream("GET", server[0] + "/live", headers=headers) as feed:
        lines = feed.iter_lines()
        assert next(lines).startswith(":")
        client.completions.create(
            model="tiny", prompt="p", max_tokens=4, temperature=1.0, extra_body={"strategy": "self-consistency"}
        )
        seen = set()
        for line in lines:
            if line.startswith("data: "):
                seen.add(json.loads(line[6:])["do"])
                if "finish" in seen:
                    break
    assert {"fork", "token", "join", "finish"} <= seen


def test_in_front_of_another_server():
    from completions_server import completions_server

    from anabranch.serve.upstream import Upstream

    tokenizer = byte_tokenizer()
    expected = make_engine(tokenizer=tokenizer).generate("one river", max_new_tokens=12)
    with completions_server(make_model(), tokenizer) as (url, state):
        with serving(Upstream(ab.RemoteEngine(url, tokenizer))) as (address, app):
            client = openai.OpenAI(base_url=address + "/v1", api_key="any", max_retries=0)
            found = client.completions.create(model="tiny", prompt="one river", max_tokens=12, temperature=0)
            assert found.choices[0].text == expected.text
            with pytest.raises(openai.BadRequestError, match="concat joins"):
                client.completions.create(model="tiny", prompt="p", extra_body={"strategy": "aspects"})
            state.faults.delay = 0.05
            pieces = client.completions.create(model="tiny", prompt="p", max_tokens=300, temperature=1.0, stream=True)
            next(iter(pieces))
            pieces.close()
            assert idle(app)
        deadline = time.monotonic() + 60
        while state.running and time.monotonic() < deadline:
            time.sleep(0.02)
        assert state.running == 0


@pytest.mark.parametrize(
    "settings", [{"model_name": ""}, {"model_name": "m", "api_keys": ("",)}, {"model_name": "m", "max_body": 0}]
)
def test_bad_settings(settings):
    with pytest.raises(ValueError):
        Settings(**settings)


# ------------------------------------------------------------------------------------------------ from beginning to end


@pytest.mark.parametrize("signals", [1, 2], ids=["Ctrl-C", "Ctrl-C twice"])
def test_the_command_from_its_first_line_to_ctrl_c(signals):
    """A stream that is open is told all of its answer, or cut off by the second one; no traceback either way."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "anabranch", "serve", "--model", "multiplication", "--port", str(port)]
    env = {**os.environ, "PYTHONPATH": str(Path(ab.__file__).parents[1]), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    server = subprocess.Popen(
        [*command, "--num-pages", "500"], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 60
        while True:
            try:
                httpx.get(f"{url}/health").raise_for_status()
                break
            except httpx.TransportError:
                assert server.poll() is None and time.monotonic() < end
                time.sleep(0.1)
        asked = {"model": "multiplication", "prompt": "1234 * 5678", "max_tokens": 400, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=asked, timeout=60) as told:
            lines = told.iter_lines()
            assert next(lines).startswith("data:")
            for _ in range(signals):
                server.send_signal(signal.SIGINT)
                time.sleep(0.3)
            try:
                rest = [line for line in lines if line]
            except httpx.TransportError:
                rest = []
        if signals == 1:
            assert rest[-1] == "data: [DONE]"
        said, _ = server.communicate(timeout=60)
        assert server.returncode in (0, 130) and "Traceback" not in said, said[-3000:]
    finally:
        server.kill()
        server.wait()
