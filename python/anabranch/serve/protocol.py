"""Requests as clients send them: OpenAI's fields, and those of ours. What is not honoured is refused, never ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Tokens = list[Annotated[int, Field(ge=0, lt=2**31)]]
Finite = Field(allow_inf_nan=False)


class StreamOptions(BaseModel):
    """``threads``: deltas of all threads, not of the trunk alone (ours)."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    threads: bool = False


class Options(BaseModel):
    """What completions and chats have in common."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    temperature: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100, allow_inf_nan=False)
    n: int = Field(1, ge=1, le=1024)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None  # told in the log
    # Ours: which strategy, with what; how long and how important; whether token ids come back.
    strategy: str | None = None
    strategy_options: dict[str, Any] = Field(default_factory=dict)
    priority: int = Field(0, ge=-100, le=100)
    timeout: float | None = Field(None, gt=0, le=86400)
    return_token_ids: bool = False
    # Of OpenAI's, in the only value that is honoured.
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: dict[str, float] | None = None

    @field_validator("presence_penalty", "frequency_penalty", mode="before")
    @classmethod
    def _zero(cls, value: Any) -> Any:
        return 0 if isinstance(value, float) and value == 0 else value

    @field_validator("logit_bias")
    @classmethod
    def _no_bias(cls, value: Any) -> Any:
        if value:
            raise ValueError("is not honoured; leave it out")
        return None

    @field_validator("stop")
    @classmethod
    def _stops(cls, value: Any) -> Any:
        strings = [value] if isinstance(value, str) else value or []
        if len(strings) > 16 or not all(strings):
            raise ValueError("pass up to 16 strings, none of them empty")
        return strings

    @model_validator(mode="after")
    def _streamed(self) -> Options:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: has no effect without stream=true; leave it out")
        return self


class Completion(Options):
    """``POST /v1/completions``."""

    prompt: str | Tokens | list[str] | list[Tokens]
    max_tokens: int | None = Field(16, ge=1, le=2**31)
    logprobs: int | None = Field(None, ge=0, le=1)
    echo: bool = False
    best_of: Literal[1] | None = None
    suffix: None = None

    @field_validator("prompt")
    @classmethod
    def _some(cls, value: Any) -> Any:
        if not value:
            raise ValueError("is empty; pass a text or token ids, or a list of them")
        return value

    def prompts(self) -> list[Any]:
        many = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return list(self.prompt) if many else [self.prompt]


class Message(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)  # tool calls, names: for the chat template

    role: str
    content: str | list[dict[str, Any]] | None = None

    @model_validator(mode="after")
    def _something(self) -> Message:
        if self.content is None and not (self.model_extra or {}).get("tool_calls"):
            raise ValueError("content: is missing; pass a text")
        return self

    def plain(self) -> dict[str, Any]:
        """As a chat template takes it."""
        message = self.model_dump(exclude_none=True)
        parts = message.get("content")
        if isinstance(parts, list):
            if any(part.get("type") != "text" or not isinstance(part.get("text"), str) for part in parts):
                raise ValueError("messages: only parts of type 'text' are honoured; leave the others out")
            message["content"] = "".join(part["text"] for part in parts)
        message.setdefault("content", "")
        return message


class Chat(Options):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, le=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31)
    logprobs: bool | None = False
    top_logprobs: Literal[0, 1] | None = None
    tools: list[dict[str, Any]] | None = None  # passed through the chat template
    tool_choice: Literal["none", "auto"] | None = None
    response_format: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @field_validator("response_format")
    @classmethod
    def _text(cls, value: Any) -> Any:
        if value is not None and value.get("type") != "text":
            raise ValueError("only {'type': 'text'} is honoured; leave it out")
        return value


class Tokenize(BaseModel):
    """``POST /tokenize``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _one(self) -> Tokenize:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("pass either prompt or messages")
        return self
