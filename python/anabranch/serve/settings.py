"""What a server is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass

from anabranch._check import whole


@dataclass(frozen=True)
class Settings:
    """How a server behaves.

    model_name: what clients call the model. api_keys: any of them opens ``/v1``, ``/tokenize`` and ``/live``; none: all
    are open. max_body: bytes of a request. max_requests: prompts under way or waiting; more get 429. max_tokens: most
    tokens a request may ask for along its critical path; None: as the model takes. max_prompts: prompts (times ``n``)
    of one request. strategies: names that requests may use; None: all.
    """

    model_name: str
    api_keys: tuple[str, ...] = ()
    max_body: int = 8 * 2**20
    max_requests: int = 256
    max_tokens: int | None = None
    max_prompts: int = 64
    strategies: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "api_keys", tuple(self.api_keys))
        if not self.model_name:
            raise ValueError("model_name is empty; pass what clients are to call the model")
        if not all(self.api_keys):
            raise ValueError("api_keys: holds an empty key, which would let everybody in; leave it out")
        for name in ("max_body", "max_requests", "max_prompts"):
            whole(getattr(self, name), name, 1)
        if self.max_tokens is not None:
            whole(self.max_tokens, "max_tokens", 1, hint=", or None")
