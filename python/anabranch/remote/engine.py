"""`RemoteEngine`: strategies over a completions server, behind the same generate() and stream() as a local engine."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from transformers import GenerationConfig

from anabranch._check import seeds_of, told, whole
from anabranch.records.events import Event
from anabranch.remote import options
from anabranch.remote.call import RemoteCall
from anabranch.remote.http import Connection, Loop
from anabranch.remote.request import RemoteRequest
from anabranch.remote.server import Server, probe
from anabranch.strategies import Plain, Strategy
from anabranch.text.prompts import Prompt, Text, check_template, split_prompts
from anabranch.text.tokens import Tokens


class RemoteEngine:
    """Runs strategies on a server that speaks OpenAI's completions: vLLM, SGLang or llama.cpp.

    Threads, queues and joins are kept here; each decode is one streamed request, so the server's prefix cache is what
    makes forks cheap. Strategies that need KV of their own (concat joins, live sharing, draft trees) are refused before
    the first token. With greedy decoding in float32 the tokens are those of a local `Engine`; sampled tokens follow the
    server's own generator.

    url: the API's address, with its version: ``"http://host:8000/v1"``.
    tokenizer: of the model that the server runs; compared with the server's where that tells.
    api_key: sent as a bearer token. model: its name on the server; needed where that has several.
    generation_config: what calls begin with; default: greedy, the tokenizer's EOS.
    timeout: seconds without a byte after which a request is given up. retries: how often a request is tried again
        after a connection error or a busy server (429, 503), with growing waits; a stream that breaks is continued
        behind the tokens that had come.
    max_concurrency: most requests at a time; more wait.

    Raises ValueError for a bad argument. The server is first asked when something is generated, or ``engine.server`` is
    read: `RemoteError` says what is wrong with it.

    >>> engine = ab.RemoteEngine("http://localhost:8000/v1", tokenizer)
    >>> engine.generate("Is the sea salty?", strategy=ab.SelfConsistency(8), max_new_tokens=64).text
    """

    def __init__(
        self,
        url: str,
        tokenizer: Any,
        api_key: str | None = None,
        *,
        model: str | None = None,
        generation_config: GenerationConfig | None = None,
        timeout: float = 600.0,
        retries: int = 5,
        max_concurrency: int = 256,
        transport: Any = None,
    ):
        if not isinstance(url, str) or not url.startswith(("http://", "https://")):
            raise ValueError(f"url={url!r}; pass the address of a completions server, such as http://host:8000/v1")
        if not (callable(tokenizer) and hasattr(tokenizer, "decode")):
            raise TypeError(f"tokenizer: expected the tokenizer of the server's model, got {told(tokenizer)}")
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or timeout <= 0:
            raise ValueError(f"timeout={timeout!r}; pass seconds, more than 0")
        if generation_config is not None and not isinstance(generation_config, GenerationConfig):
            raise TypeError(f"generation_config: got {told(generation_config)}; pass a transformers.GenerationConfig")
        retries = whole(retries, "retries", 0, hint=" (further attempts)")
        self._most = whole(max_concurrency, "max_concurrency", 1, hint=" (requests at a time)")
        self.tokenizer, self._wanted = tokenizer, model
        self._base = generation_config or options.default_config(tokenizer)
        self._loop = Loop()
        self.connection = Connection(url, api_key, timeout=timeout, retries=retries, transport=transport)
        self._tokens = Tokens(tokenizer)
        self._turns: asyncio.Semaphore | None = None
        self._calls: set[RemoteCall] = set()

    # ---------------------------------------------------------------------------------------- public

    @cached_property
    def server(self) -> Server:
        """What answers at the address (asked once)."""
        found: Server = self.spawn(probe(self.connection, self.tokenizer, self._wanted)).result()
        return found

    @property
    def vocab_size(self) -> int:
        return len(self.tokenizer)

    def generate(
        self,
        prompt: Prompt | list[Prompt],
        strategy: Strategy | None = None,
        generation_config: GenerationConfig | None = None,
        seed: int | list[int] = 0,
        max_new_tokens: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Answer one prompt (→ `Result`) or many (→ a list of them), as `Engine.generate` does.

        generation_config and further keywords: ``do_sample, temperature, top_k, top_p, min_p, repetition_penalty,
        stop_strings, eos_token_id``; any other is refused. ``max_total_tokens=``, ``logprobs=True`` and
        ``chat_template_kwargs=`` mean what they mean there.

        Raises ValueError for what a server cannot do, before the first token; `RemoteError` for a server that fails.
        After any exception, Ctrl-C included, all requests are ended on the server too.
        """
        call, many = self._prepare(prompt, strategy, generation_config, seed, max_new_tokens, kwargs, streaming=False)
        for _ in self._drive(call):
            pass
        return list(call.results) if many else call.results[0]

    def stream(
        self,
        prompt: Prompt | list[Prompt],
        strategy: Strategy | None = None,
        generation_config: GenerationConfig | None = None,
        seed: int | list[int] = 0,
        max_new_tokens: int | None = None,
        **kwargs: Any,
    ) -> Iterator[Event]:
        """Like `generate`, as it happens: the events of `Engine.stream`. Leaving the loop early ends everything."""
        call, _ = self._prepare(prompt, strategy, generation_config, seed, max_new_tokens, kwargs, streaming=True)
        return self._drive(call)

    def abort(self) -> None:
        """End everything that is running; generate() then returns what there was so far."""
        for call in list(self._calls):
            call.abort()

    def close(self) -> None:
        """End everything and close the connections. The engine takes nothing more."""
        self.abort()
        self.spawn(self.connection.close()).result(timeout=10)
        self._loop.close()

    def __enter__(self) -> RemoteEngine:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # ---------------------------------------------------------------------------------------- for its requests

    def spawn(self, work: Any) -> Any:
        """Begin a coroutine on the engine's own loop; its future."""
        return self._loop.spawn(work)

    def turns(self) -> asyncio.Semaphore:
        """Bounds the requests at a time; on the engine's own loop."""
        if self._turns is None:
            self._turns = asyncio.Semaphore(self._most)
        return self._turns

    @property
    def decode_url(self) -> str:
        return self.server.dialect.path(self.connection.url, self.connection.root)

    # ---------------------------------------------------------------------------------------- inside

    def _drive(self, call: RemoteCall) -> Iterator[Event]:
        self._calls.add(call)
        try:
            yield from call.drive()
        finally:
            self._calls.discard(call)

    def _prepare(
        self,
        prompt: Any,
        strategy: Any,
        config: Any,
        seed: Any,
        max_new_tokens: Any,
        kwargs: dict[str, Any],
        streaming: bool,
    ) -> tuple[RemoteCall, bool]:
        """Check everything and set up the call; no token is asked for here."""
        strategy = Plain() if strategy is None else strategy
        if not isinstance(strategy, Strategy):
            raise TypeError(
                f"strategy: got {strategy!r}; pass an instance of a Strategy, such as ab.SelfConsistency(n=8), or None"
            )
        for need in strategy.needs:
            raise ValueError(
                f"strategy: {type(strategy).__name__} needs {need}, which a server does not give; use a local Engine, "
                "or another strategy"
            )
        budget = kwargs.pop("max_total_tokens", None)
        if budget is not None:
            budget = whole(budget, "max_total_tokens", 1, hint=", or None")
        logprobs = kwargs.pop("logprobs", False)
        if not isinstance(logprobs, bool):
            raise ValueError(f"logprobs={logprobs!r}; pass True or False")
        template = check_template(kwargs.pop("chat_template_kwargs", None))
        prepared = options.prepare(self._base, config, max_new_tokens, kwargs)
        base = options.sampling(prepared, (), self.server.dialect.fields)
        text = Text(self.tokenizer, self.vocab_size, base.eos_ids, self._tokens)
        prompts, many = split_prompts(prompt)
        seeds = seeds_of(seed, len(prompts))
        ids = [text.prompt_ids(p, f"prompt[{i}]" if many else "prompt", template) for i, p in enumerate(prompts)]
        self._check_lengths(ids, many)
        buffer: deque[Event] = deque()
        requests = [
            RemoteRequest(
                i,
                tokens,
                strategy,
                s,
                engine=self,
                config=prepared,
                text=text,
                max_total_tokens=budget,
                max_new_tokens=prepared.max_new_tokens,
                logprobs=logprobs,
                position_limit=self.server.max_length,
                emit=buffer.append if streaming else None,
                prompt=prompts[i],
                template=template,
            )
            for i, (tokens, s) in enumerate(zip(ids, seeds, strict=True))
        ]
        return RemoteCall(self, requests, buffer), many

    def _check_lengths(self, ids: Sequence[Sequence[int]], many: bool) -> None:
        limit = self.server.max_length
        for i, tokens in enumerate(ids):
            if limit is not None and len(tokens) >= limit:
                raise ValueError(
                    f"prompt{f'[{i}]' if many else ''}: {len(tokens)} tokens, but the server takes {limit}, answer "
                    "included; shorten it, or start the server with a longer context"
                )
