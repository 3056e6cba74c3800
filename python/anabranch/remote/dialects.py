"""How each kind of server is asked, and how its answers read. Found out from the server, never configured.

Every dialect sends token ids and gets token ids back: text alone does not say which tokens were sampled, and a thread
goes on from its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from anabranch.errors import RemoteError


@dataclass
class Delta:
    """What one event adds to a decode."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # of each token; empty: not asked for
    top_logprobs: list[list[float]] = field(default_factory=list)  # the likeliest tokens', in front of each token
    finished: str | None = None
    stop: int | None = None  # the stop token id, where the server names it
    model: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None


@dataclass(frozen=True)
class Sampled:
    """What one request samples: tokens behind a prompt.

    Attributes:
        model: its name on the server.
        prompt: token ids.
        max_tokens: most tokens.
        stop_ids: token ids that end it.
        sampling: fields of the request that say how (temperature, top_p, …).
        seed: of the server's generator.
        top: log-probabilities of so many of the likeliest tokens; None: none.
    """

    model: str
    prompt: Sequence[int]
    max_tokens: int
    stop_ids: Sequence[int]
    sampling: dict[str, Any]
    seed: int
    top: int | None = None


class Dialect:
    """vLLM's and SGLang's: OpenAI's completions, with token ids both ways."""

    name = "openai"
    fields = frozenset({"temperature", "top_p", "top_k", "min_p", "repetition_penalty"})
    scores = True
    stop_ids = True  # it ends a decode at a stop id, and hands that out
    required: tuple[str, ...] = ("return_token_ids", "stop_token_ids", "ignore_eos")

    def path(self, base: str, root: str) -> str:
        return f"{base}/completions"

    def decode(self, asked: Sampled) -> dict[str, Any]:
        """The body of the request."""
        payload: dict[str, Any] = {
            "model": asked.model,
            "prompt": list(asked.prompt),
            "max_tokens": asked.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            "skip_special_tokens": False,
            # All that ends a decode is a stop id, EOS among them: so the server hands out the token that ended it.
            "ignore_eos": True,
            "stop_token_ids": sorted(asked.stop_ids),
            **asked.sampling,
        }
        if asked.sampling.get("temperature"):
            payload["seed"] = asked.seed
        if asked.top is not None:
            payload["logprobs"] = max(asked.top, 1)
        return payload

    def delta(self, event: dict[str, Any]) -> Delta:
        found = Delta(model=event.get("model"))
        usage = event.get("usage") or {}
        found.prompt_tokens = usage.get("prompt_tokens")
        found.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        for choice in event.get("choices") or ():
            found.token_ids += choice.get("token_ids") or choice.get("output_ids") or []
            logprobs = choice.get("logprobs") or {}
            found.logprobs += [float(x) for x in logprobs.get("token_logprobs") or ()]
            found.top_logprobs += [
                sorted(map(float, d.values()), reverse=True) for d in logprobs.get("top_logprobs") or ()
            ]
            found.finished = choice.get("finish_reason") or found.finished
            stop = choice.get("stop_reason", choice.get("matched_stop"))
            found.stop = stop if isinstance(stop, int) else found.stop
        return found

    def score(self, model: str, prompt: Sequence[int]) -> dict[str, Any]:
        """The request for the log-probability of each token of `prompt`."""
        return {"model": model, "prompt": list(prompt), "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}

    def scored(self, answer: dict[str, Any], prompt: Sequence[int]) -> list[float | None]:
        """Of each token of `prompt`; None for the first, which nothing stands before."""
        choice = answer["choices"][0]
        entries = choice.get("prompt_logprobs")
        if entries is None:
            raise RemoteError("score: the server sends no prompt_logprobs; use a newer server, or a local Engine")
        return [None if e is None else float(e[str(t)]["logprob"]) for e, t in zip(entries, prompt, strict=True)]


class VLLM(Dialect):
    name = "vllm"


class SGLang(Dialect):
    name = "sglang"

    def decode(self, asked: Sampled) -> dict[str, Any]:
        return {**super().decode(asked), "no_stop_trim": True}

    def score(self, model: str, prompt: Sequence[int]) -> dict[str, Any]:
        return {
            "model": model, "prompt": list(prompt), "max_tokens": 1, "temperature": 0.0, "echo": True, "logprobs": 1,
        }  # fmt: skip

    def scored(self, answer: dict[str, Any], prompt: Sequence[int]) -> list[float | None]:
        found = (answer["choices"][0].get("logprobs") or {}).get("token_logprobs")
        if found is None or len(found) < len(prompt):
            raise RemoteError("score: the server does not echo the prompt's logprobs; use a local Engine")
        return [None if i == 0 or x is None else float(x) for i, x in enumerate(found[: len(prompt)])]


class LlamaCpp(Dialect):
    """llama.cpp's own route: its OpenAI route gives no token ids. It has no stop ids: whoever reads ends the stream."""

    name = "llama.cpp"
    scores = False
    stop_ids = False
    required = ()

    def path(self, base: str, root: str) -> str:
        return f"{root}/completion"

    def decode(self, asked: Sampled) -> dict[str, Any]:
        own = dict(asked.sampling)
        if "repetition_penalty" in own:
            own |= {"repeat_penalty": own.pop("repetition_penalty"), "repeat_last_n": -1}
        payload = {
            "prompt": list(asked.prompt), "n_predict": asked.max_tokens, "stream": True, "return_tokens": True,
            "cache_prompt": True, "seed": asked.seed, "min_p": 0.0, "repeat_penalty": 1.0, "top_k": 0, "top_p": 1.0,
            **own,
        }  # fmt: skip
        if asked.top is not None:
            payload |= {"n_probs": max(asked.top, 1), "post_sampling_probs": False}
        return payload

    def delta(self, event: dict[str, Any]) -> Delta:
        found = Delta(list(event.get("tokens") or ()))
        for entry in event.get("completion_probabilities") or ():
            found.logprobs.append(float(entry["logprob"]))
            found.top_logprobs.append([float(e["logprob"]) for e in entry.get("top_logprobs", ())])
        if event.get("stop"):
            found.finished = {"limit": "length"}.get(str(event.get("stop_type")), "stop")
            found.prompt_tokens = event.get("tokens_evaluated")
            found.cached_tokens = (event.get("timings") or {}).get("cache_n")
        return found
