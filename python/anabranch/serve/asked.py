"""From a client's request to what the engine is asked: prompts, strategy, options."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from anabranch._check import nearest, plain_name
from anabranch.serve.errors import Refused
from anabranch.serve.protocol import Chat, Completion, Options
from anabranch.serve.settings import Settings
from anabranch.strategies import Strategy, registry
from anabranch.strategies.api.voting import READERS

DEFAULT_CHAT_TOKENS = 2048


@dataclass
class Asked:
    """One HTTP request for the engine; prompt i of n copies is ``prompts[i // n]``."""

    prompts: list[Any]
    n: int
    strategy: Strategy | None
    options: dict[str, Any] = field(default_factory=dict)  # keywords of Engine.stream
    stops: list[str] = field(default_factory=list)

    @property
    def copies(self) -> list[Any]:
        return [prompt for prompt in self.prompts for _ in range(self.n)]


def asked(request: Completion | Chat, settings: Settings) -> Asked:
    """What the engine is asked by a request; `Refused` for what this server does not do."""
    if request.model != settings.model_name:
        raise Refused(404, f"model {request.model!r} is not served here; {settings.model_name!r} is", "model")
    strategy = None
    if request.strategy is not None:
        strategy = strategy_of(request.strategy, request.strategy_options, settings.strategies)
    elif request.strategy_options:
        raise Refused(400, "strategy_options: given without strategy; name one", "strategy_options")
    options: dict[str, Any] = {"priority": request.priority}
    if request.timeout is not None:
        options["deadline"] = request.timeout
    options |= _sampling(request)
    if isinstance(request, Completion):
        prompts: list[Any] = request.prompts()
        limit, options["logprobs"] = request.max_tokens, request.logprobs is not None
    else:
        prompts = [_chat(request)]
        limit, options["logprobs"] = request.max_completion_tokens or request.max_tokens, bool(request.logprobs)
        options["chat_template_kwargs"] = _template(request)
    if settings.max_tokens is not None and (limit or 0) > settings.max_tokens:
        raise Refused(400, f"max_tokens={limit}: this server writes at most {settings.max_tokens}", "max_tokens")
    options["max_new_tokens"] = limit or settings.max_tokens or DEFAULT_CHAT_TOKENS
    if len(prompts) * request.n > settings.max_prompts:
        raise Refused(400, f"{len(prompts)} prompts, n={request.n}: at most {settings.max_prompts} in a request", "n")
    seed = secrets.randbits(48) if request.seed is None else request.seed
    options["seed"] = [seed + i for _ in prompts for i in range(request.n)]
    stops = list(request.stop or ())
    if stops:
        options["stop_strings"] = stops
    return Asked(prompts, request.n, strategy, options, stops)


def _sampling(request: Options) -> dict[str, Any]:
    """Fields of GenerationConfig; values that change nothing are left out."""
    found: dict[str, Any] = {}
    if request.repetition_penalty not in (None, 1.0):
        found["repetition_penalty"] = request.repetition_penalty
    if request.temperature == 0:
        return found | {"do_sample": False}  # the likeliest token is the same whatever else is cut off
    if request.temperature is not None:
        found |= {"do_sample": True, "temperature": request.temperature}
    for name, off in (("top_p", 1.0), ("top_k", -1), ("min_p", 0.0)):
        value = getattr(request, name)
        if value is not None and (value != off or request.temperature is not None):
            found[name] = value
    if found.get("top_k") == -1:
        found["top_k"] = 0
    if found.get("min_p") == 0:
        del found["min_p"]
    return found


def _chat(request: Chat) -> list[dict[str, Any]]:
    try:
        return [message.plain() for message in request.messages]
    except ValueError as error:
        raise Refused(400, str(error), "messages") from None


def _template(request: Chat) -> dict[str, Any]:
    kwargs = dict(request.chat_template_kwargs)
    if request.tools and request.tool_choice != "none":
        kwargs["tools"] = request.tools
    return kwargs


def strategy_of(name: str, options: Mapping[str, Any], allowed: Sequence[str] | None) -> Strategy:
    """A strategy by name, its options as JSON. Nothing a client sends is imported or run as a pattern."""
    names = [n for n in registry.names() if allowed is None or n in allowed]
    wanted = next((n for n in names if plain_name(n) == plain_name(name)), None)
    if wanted is None:
        near = nearest(name, names) or names
        raise Refused(400, f"strategy {name!r} is unknown here; the nearest are {', '.join(near)}", "strategy")
    make: Any = registry.find(wanted)
    known = {f.name: f for f in dataclasses.fields(make) if f.init} if dataclasses.is_dataclass(make) else {}
    values: dict[str, Any] = {}
    for key, value in options.items():
        if key not in known:
            near = nearest(key, list(known)) or sorted(known)
            raise Refused(400, f"strategy {wanted} has no option {key!r}; the nearest are {', '.join(near) or 'none'}",
                          "strategy_options")  # fmt: skip
        values[key] = _value(wanted, key, value, allowed)
    none = dataclasses.MISSING
    needed = [n for n, f in known.items() if f.default is none and f.default_factory is none and n not in values]
    if needed:
        raise Refused(400, f"strategy {wanted} needs the option {', '.join(needed)}", "strategy_options")
    try:
        made: Strategy = make(**values)
        return made
    except (ValueError, TypeError) as error:
        raise Refused(400, f"strategy_options: {error}", "strategy_options") from None


def _value(strategy: str, key: str, value: Any, allowed: Sequence[str] | None) -> Any:
    if key == "vote" and value is not None and value not in READERS:
        raise Refused(400, f"strategy_options: vote={value!r}; pass one of {', '.join(READERS)}", "strategy_options")
    if isinstance(value, Mapping) and "strategy" in value:
        return strategy_of(str(value["strategy"]), value.get("strategy_options") or {}, allowed)
    if key == "strategy" and isinstance(value, str):
        return strategy_of(value, {}, allowed)
    return tuple(value) if isinstance(value, list) else value
