"""Clients that misbehave at random, for as long as you like: ``python tests/serve/test_soak.py 3600`` (seconds).

Wrong keys, malformed JSON and UTF-8, bodies of 100 MB, garbage on the socket, clients that vanish at every moment; and
among them clients that behave, with and without streams, strategies, n, stop, logprobs, whose answers have to be those
that the quiet server gave. There are too few pages for all of them. Every while everybody leaves: then every page is
free, every task has ended, nothing is under way, and the process is as large as it was.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

if __name__ == "__main__":
    root = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(root / "tests" / "kits"), str(root / "tests" / "serve")]

import httpx
import pytest
from engine_kit import byte_tokenizer, make_engine
from soak_kit import STATM, LongRun
from test_serve import idle, make_async, serving

from anabranch.strategies import registry

KEY = {"Authorization": "Bearer right"}
TEXTS = ["one river", "two rivers", "a delta"]
MALFORMED = [
    b"", b"{", b"[" * 100_000, b"null", b"nan", b'{"model": "tiny", "prompt": "\xff\xfe"}', b"\xff" * 50, b"\x00" * 50,
    b'{"model": "tiny", "prompt": "\\ud800"}', b'{"model": "\\ud800", "prompt": "x"}', b'{"\\udfff": 1}',
    b'{"model": "tiny", "prompt": "x", "seed": ' + b"9" * 6000 + b"}",
    b'{"model": "tiny", "prompt": "x", "temperature": NaN}', b'{"model": "tiny", "prompt": "x", "temperature": 1e999}',
    b'{"model": "tiny", "prompt": "x", "strategy": "\\u0000"}', b'{"model": "tiny", "prompt": [[], [1e9]]}',
    b'{"model": "tiny", "prompt": "x", "logit_bias": {"1": ' + b"[" * 5000 + b"]" * 5000 + b"}}",
    b'{"model": "tiny", "prompt": "x", "stop": "\\ud800"}', b'{"model": "tiny", "prompt": "x", "user": "\\ud800"}',
    b'{"model": "tiny", "messages": [{"role": "\\ud800", "content": "x"}]}',
]  # fmt: skip
PATHS = ["/v1/completions", "/v1/chat/completions", "/tokenize"]
BAD_KEYS = ["", "Bearer", "Bearer wrong", "Bearer right2", "Basic right", "right", "Bearer right\xff",
            "Bearer " + "x" * 9000]  # fmt: skip
CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 10, "temperature": 1.0, "seed": 5}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def questions() -> list[tuple[str, dict]]:
    """What clients that behave ask: ``(path, body)``; the first are greedy completions of `TEXTS`."""
    greedy = {"max_tokens": 12, "temperature": 0}
    sampled = {"prompt": "one river", "max_tokens": 16, "temperature": 1.0, "seed": 3}
    completions = [
        *({"prompt": text, **greedy} for text in TEXTS),
        {**sampled, "n": 3, "logprobs": 1},
        {**sampled, "stop": ["e", "\u0000"], "echo": True},
        {**sampled, "prompt": TEXTS, "n": 2, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
        {**sampled, "prompt": list(range(40, 80)), "return_token_ids": True, "repetition_penalty": 1.2, "logprobs": 0},
        {**greedy, "prompt": "a long answer " * 20, "max_tokens": 60, "priority": 2},
        *({**sampled, "strategy": name} for name in registry.names()),
        {**sampled, "strategy": "self-consistency", "strategy_options": {"n": 5, "vote": "line"}, "n": 2},
    ]
    chats = [CHAT, {**CHAT, "n": 3, "logprobs": True, "top_logprobs": 1}, {**CHAT, "tools": [TOOL], "stop": "a"},
             {**CHAT, "strategy": "best-of-n"}]  # fmt: skip
    paths = [("/v1/completions", body) for body in completions] + [("/v1/chat/completions", body) for body in chats]
    return [(path, {"model": "tiny", **body}) for path, body in paths]


def quietly(address: str) -> list[tuple[int, list[dict]]]:
    """``(status, choices)`` of the answers of a server that nobody else uses."""
    answers = [httpx.post(address + path, json=body, headers=KEY, timeout=600) for path, body in questions()]
    return [(answer.status_code, answer.json().get("choices", [])) for answer in answers]


class Soak:
    """Clients of one server. expected: what the quiet server answers to `questions`."""

    def __init__(self, address: str, expected: list[tuple[int, list[dict]]], seed: int, run: LongRun) -> None:
        self.address, self.expected, self.rng, self.run = address, expected, random.Random(seed), run
        self.port, self.questions = int(address.rsplit(":", 1)[1]), questions()
        self.done: Counter[str] = Counter()
        self.kinds = [self.whole, self.streamed, self.keyless, self.malformed, self.huge, self.vanishing, self.leaving,
                      self.looking, self.half_a_body, self.garbage]  # fmt: skip

    async def some(self, seconds: float, at_once: int) -> None:
        """So many clients do one thing after another for so long, each at least one."""
        end = time.monotonic() + seconds

        async def client() -> None:
            async with httpx.AsyncClient(base_url=self.address, timeout=600) as http:
                while True:
                    # The first ones in turns, so that a short run has all of them.
                    done, kinds = self.done.total(), self.kinds
                    kind = kinds[done] if done < len(kinds) else self.rng.choice([*kinds, self.whole, self.streamed])
                    self.done[kind.__name__] += 1
                    await kind(http)
                    if time.monotonic() >= end:
                        return
                    await asyncio.sleep(min(self.run.owed(), max(0.0, end - time.monotonic())))

        await asyncio.gather(*(client() for _ in range(at_once)))

    async def whole(self, http: httpx.AsyncClient) -> None:
        i = self.rng.randrange(len(self.questions))
        path, body = self.questions[i]
        answer = await http.post(path, json=body, headers=KEY)
        status, choices = self.expected[i]
        assert answer.status_code == status, (body, answer.text)
        assert answer.json().get("choices", []) == choices, str((body, choices, answer.text))

    async def streamed(self, http: httpx.AsyncClient) -> None:
        i = self.rng.randrange(len(self.questions))
        path, body = self.questions[i]
        status, choices = self.expected[i]
        body = {**body, "stream": True, "stream_options": {"threads": self.rng.random() < 0.5}, "echo": False}
        if "messages" in body:
            del body["echo"]
        texts, ends, last = [""] * len(choices), [None] * len(choices), ""
        async with http.stream("POST", path, json=body, headers=KEY) as answer:
            assert answer.status_code == status, body
            async for last in answer.aiter_lines():
                for choice in json.loads(last[6:])["choices"] if last.startswith("data: {") else ():
                    at = choice["index"]
                    if choice.get("thread", "0") == "0":
                        texts[at] += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
                    texts[at] = choice.get("rewritten", texts[at])
                    ends[at] = choice["finish_reason"] or ends[at]
                if last == "data: [DONE]":
                    break
        told = [c["text"] if "text" in c else c["message"]["content"] for c in choices]
        begin = body.get("prompt") if self.questions[i][1].get("echo") else ""
        assert status != 200 or [begin + text for text in texts] == told, str((body, texts, choices))
        assert ends == [choice["finish_reason"] for choice in choices], body

    async def keyless(self, http: httpx.AsyncClient) -> None:
        value = self.rng.choice(BAD_KEYS)
        headers = {} if not value else {"Authorization": value.encode("latin-1")}
        answer = await http.post(self.rng.choice(PATHS), json=self.questions[0][1], headers=headers)
        assert answer.status_code == 401, answer.text

    async def malformed(self, http: httpx.AsyncClient) -> None:
        content = self.rng.choice(MALFORMED)
        kind = self.rng.choice(["application/json", "text/plain", "a/b; charset=x"])
        answer = await http.post(self.rng.choice(PATHS), content=content, headers={**KEY, "Content-Type": kind})
        assert 400 <= answer.status_code < 500 or (b"ud8" in content and answer.status_code == 200), answer.text
        assert answer.json(), (content[:60], answer.text)

    async def huge(self, http: httpx.AsyncClient) -> None:
        """100 MB, declared or not; the server need not read to the end."""
        piece, declared = b"x" * 2**20, self.rng.random() < 0.5
        headers = {**KEY, **({"Content-Length": str(100 * 2**20)} if declared else {})}

        async def pieces():
            for _ in range(100):
                yield piece

        with suppress(httpx.TransportError):  # it may hang up while we still send
            answer = await http.post("/v1/completions", content=pieces(), headers=headers)
            assert answer.status_code == 413, answer.text

    def long(self, **more) -> dict:
        strategy = self.rng.choice([{}, {"strategy": "self-consistency", "strategy_options": {"n": 3}}])
        return {"model": "tiny", "prompt": TEXTS[1], "max_tokens": 250, "temperature": 1.0, "n": 2, **strategy, **more}

    async def vanishing(self, http: httpx.AsyncClient) -> None:
        with suppress(httpx.TimeoutException):
            await http.post("/v1/completions", json=self.long(stream=self.rng.random() < 0.5), headers=KEY,
                            timeout=self.rng.choice([0.001, 0.02, 0.1, 0.5]))  # fmt: skip

    async def leaving(self, http: httpx.AsyncClient) -> None:
        """Reads some lines of a stream, and is gone."""
        lines = self.rng.randrange(1, 60)
        async with http.stream("POST", "/v1/completions", json=self.long(stream=True), headers=KEY) as answer:
            async for _ in answer.aiter_lines():
                lines -= 1
                if not lines:
                    break

    async def looking(self, http: httpx.AsyncClient) -> None:
        for path in ("/health", "/metrics", "/v1/models", "/openapi.json", "/"):
            assert (await http.get(path, headers=KEY)).status_code == 200
        async with http.stream("GET", "/live", headers=KEY) as answer:
            async for _ in answer.aiter_lines():
                if self.rng.random() < 0.2:
                    break

    async def half_a_body(self, http: httpx.AsyncClient) -> None:
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer right\r\nContent-Length: 5000\r\n\r\n"
        )
        await self.sent(head + b'{"model": "tiny", "prompt": "', wait=self.rng.random() / 10)

    async def garbage(self, http: httpx.AsyncClient) -> None:
        await self.sent(self.rng.randbytes(self.rng.randrange(1, 4000)), wait=self.rng.random() / 10)

    async def sent(self, data: bytes, wait: float) -> None:
        with suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", self.port)
            writer.write(data)
            await writer.drain()
            await asyncio.sleep(wait)
            writer.close()
            await writer.wait_closed()


def soak(run: LongRun, part: float, seed: int = 0, at_once: int = 6) -> dict:
    """Run it, in parts of so many seconds; what happened."""
    # A compiler at work would hold everybody up meanwhile. Batch-invariant: else the last bits of scores depend on who
    # shares a step, and a sampled token may come out as another.
    engine = make_async(num_pages=300, compile=False, batch_invariant=True)
    plain = make_engine(tokenizer=byte_tokenizer(), batch_invariant=True)
    with serving(engine, api_keys=("right",), max_body=1_000_000, max_requests=60) as (address, app):

        async def tasks() -> int:
            return len(asyncio.all_tasks())

        app.add_api_route("/tasks", tasks)
        expected = quietly(address)
        assert [c[0]["text"] for _, c in expected[:3]] == [plain.generate(t, max_new_tokens=12).text for t in TEXTS]
        assert sum(status == 200 for status, _ in expected) > 30, [status for status, _ in expected]
        before = httpx.get(address + "/tasks").json()
        clients = Soak(address, expected, seed, run)
        run.begin()
        while not run.sizes or run.going:
            asyncio.run(clients.some(min(part, run.seconds - run.spent), at_once))
            quiet(address, app, engine, before)
            run.note()
        assert quietly(address) == expected
    return {"done": dict(clients.done), "megabytes": run.sizes, "files": run.files, "threads": threading.active_count()}


def quiet(address: str, app, engine, tasks: int) -> None:
    """Everybody has left: nothing of them is there any more."""
    assert idle(app)
    deadline = time.monotonic() + 10
    while (after := httpx.get(address + "/tasks").json()) > tasks and time.monotonic() < deadline:
        time.sleep(0.1)
    assert after <= tasks, f"{after} tasks, {tasks} before"
    assert httpx.get(address + "/health").json() == {"status": "ok"}
    assert app.state.server.threads == 0
    engine.engine.clear_prefix_cache()
    usage = engine.cache.usage()
    assert usage.pages_free == usage.pages_total and usage.tokens_physical == 0
    engine.cache.check()


@pytest.mark.skipif(not STATM.exists(), reason="reads /proc")
def test_a_moment_of_it() -> None:
    found = soak(LongRun(0, 1), 0, at_once=20)
    assert len(found["done"]) == 10 and sum(found["done"].values()) == 20, found


@pytest.mark.slow
@pytest.mark.skipif(not STATM.exists(), reason="reads /proc")
def test_an_hour_of_it() -> None:
    """soak_kit says how to make it shorter, or gentler to others."""
    run = LongRun()
    found = soak(run, 60, seed=1)
    print(json.dumps(found))
    assert run.grown() < 32 and run.files[-1] <= run.files[len(run.files) // 4] + 8, found


if __name__ == "__main__":
    run = LongRun(float(sys.argv[1]) if sys.argv[1:] else 120)
    found = soak(run, run.seconds / 4, seed=int(time.time()))
    print(json.dumps(found, indent=1))
    assert run.grown() < 40, found
