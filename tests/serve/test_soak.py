"""Clients that misbehave at random, for as long as you like: ``python tests/serve/test_soak.py 3600`` (seconds).

Wrong keys, malformed JSON and UTF-8, bodies of 100 MB, garbage on the socket, clients that vanish at every moment; and
among them clients that behave, whose answers have to stay what they are. At the end every page is free, every task has
ended, no connection is open and the process is as large as it was after the first part.
"""

from __future__ import annotations

import asyncio
import json
import os
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
from test_serve import idle, make_async, serving

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


class Soak:
    """Clients of one server. expected: what the engine answers to `TEXTS`."""

    def __init__(self, address: str, expected: list[str], seed: int) -> None:
        self.address, self.expected, self.rng = address, expected, random.Random(seed)
        self.port = int(address.rsplit(":", 1)[1])
        self.done: Counter[str] = Counter()
        self.kinds = [self.good, self.streamed, self.forked, self.keyless, self.malformed, self.huge, self.vanishing,
                      self.half_a_body, self.garbage]  # fmt: skip

    async def run(self, seconds: float, at_once: int = 6) -> None:
        end = time.monotonic() + seconds

        async def client(number: int) -> None:
            async with httpx.AsyncClient(base_url=self.address, timeout=60) as http:
                while time.monotonic() < end:
                    # Of the first clients each begins with another kind, so that a short run has them all.
                    kind = self.kinds[(number + self.done.total()) % len(self.kinds)]
                    if self.done.total() > 2 * len(self.kinds):
                        kind = self.rng.choice(self.kinds)
                    self.done[kind.__name__] += 1
                    await kind(http)

        await asyncio.gather(*(client(i) for i in range(at_once)))

    def body(self, i: int, **more) -> dict:
        return {"model": "tiny", "prompt": TEXTS[i], "max_tokens": 12, "temperature": 0, **more}

    async def good(self, http: httpx.AsyncClient) -> None:
        i = self.rng.randrange(len(TEXTS))
        answer = await http.post("/v1/completions", json=self.body(i), headers=KEY)
        assert answer.status_code == 200 and answer.json()["choices"][0]["text"] == self.expected[i], answer.text

    async def streamed(self, http: httpx.AsyncClient) -> None:
        i, text = self.rng.randrange(len(TEXTS)), ""
        async with http.stream("POST", "/v1/completions", json=self.body(i, stream=True), headers=KEY) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
        assert text == self.expected[i]

    async def forked(self, http: httpx.AsyncClient) -> None:
        more = {"strategy": "self-consistency", "strategy_options": {"n": 3}, "temperature": 1.0, "seed": 1}
        answer = await http.post("/v1/completions", json=self.body(0, **more), headers=KEY)
        assert answer.status_code == 200 and answer.json()["usage"]["threads"] == 3, answer.text

    async def keyless(self, http: httpx.AsyncClient) -> None:
        bad = [
            "",
            "Bearer",
            "Bearer wrong",
            "Bearer right2",
            "Basic right",
            "right",
            "Bearer right\xff",
            "Bearer " + "x" * 9000,
        ]
        value = self.rng.choice(bad)
        headers = {} if not value else {"Authorization": value.encode("latin-1")}
        answer = await http.post(self.rng.choice(PATHS), json=self.body(0), headers=headers)
        assert answer.status_code == 401, answer.text

    async def malformed(self, http: httpx.AsyncClient) -> None:
        content, kind = (
            self.rng.choice(MALFORMED),
            self.rng.choice(["application/json", "text/plain", "a/b; charset=x"]),
        )
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

    async def vanishing(self, http: httpx.AsyncClient) -> None:
        more = {"max_tokens": 400, "temperature": 1.0, "n": 2, "stream": self.rng.random() < 0.5}
        with suppress(httpx.TimeoutException):
            await http.post("/v1/completions", json=self.body(1, **more), headers=KEY,
                            timeout=self.rng.choice([0.001, 0.02, 0.1]))  # fmt: skip

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


def resident() -> float:
    """MB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def soak(seconds: float, seed: int = 0) -> dict:
    """Run it; what happened."""
    engine = make_async()
    plain = make_engine(tokenizer=byte_tokenizer())
    expected = [plain.generate(text, max_new_tokens=12).text for text in TEXTS]
    with serving(engine, api_keys=("right",), max_body=1_000_000, max_requests=60) as (address, app):

        async def tasks() -> int:
            return len(asyncio.all_tasks())

        app.add_api_route("/tasks", tasks)
        before = httpx.get(address + "/tasks").json()
        clients = Soak(address, expected, seed)
        sizes = []
        for share in (0.4, 0.3, 0.3):
            asyncio.run(clients.run(share * seconds))
            assert idle(app)
            sizes.append(round(resident()))
        deadline = time.monotonic() + 10
        while (after := httpx.get(address + "/tasks").json()) > before and time.monotonic() < deadline:
            time.sleep(0.1)
        assert after <= before, f"{after} tasks, {before} before"
        assert httpx.get(address + "/health").json() == {"status": "ok"}
        engine.engine.clear_prefix_cache()
        usage = engine.cache.usage()
        assert usage.pages_free == usage.pages_total and usage.tokens_physical == 0
        engine.cache.check()
    return {"done": dict(clients.done), "megabytes": sizes, "threads": threading.active_count()}


def check(found: dict, most: float) -> None:
    assert found["megabytes"][-1] - found["megabytes"][0] < most, found


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_a_moment_of_it() -> None:
    found = soak(4)
    assert len(found["done"]) == 9, found
    check(found, 200)


@pytest.mark.slow
def test_two_minutes_of_it() -> None:
    check(soak(120, seed=1), 40)


if __name__ == "__main__":
    found = soak(float(sys.argv[1]) if sys.argv[1:] else 120, seed=int(time.time()))
    print(json.dumps(found, indent=1))
    check(found, 40)
