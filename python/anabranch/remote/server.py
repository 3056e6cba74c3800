"""What a server is: its kind, its model, the context it takes, and whether it has the same tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from anabranch._check import nearest
from anabranch.errors import RemoteError
from anabranch.remote.dialects import VLLM, Dialect, LlamaCpp, SGLang
from anabranch.remote.http import Connection

_PROBE = "The river forks: 12 + 30 = 42.\n\n\tÄhnlich, 漢字, naïve — done"


@dataclass(frozen=True)
class Server:
    """What probing has found."""

    dialect: Dialect
    model: str
    max_length: int | None  # tokens of prompt and answer together
    version: str | None = None


async def probe(connection: Connection, tokenizer: Any, wanted: str | None) -> Server:
    """Find out what answers at an address.

    Raises RemoteError for a server that cannot be reached, that is of no known kind, that has no model `wanted`, or
    whose tokenizer gives other token ids than `tokenizer`.
    """
    models = await connection.get(f"{connection.url}/models")
    listed = [m for m in (models or {}).get("data") or () if isinstance(m, dict) and "id" in m]
    if not listed:
        raise RemoteError(
            f"{connection.url}: no models are listed at /models; pass the address of an OpenAI-compatible server, with "
            "its version, such as http://host:8000/v1"
        )
    entry = _model(listed, wanted)
    owner = str(entry.get("owned_by", "")).lower()
    version = await connection.get(f"{connection.root}/version")
    schema = await connection.get(f"{connection.root}/openapi.json")
    dialect = _dialect(owner, schema, version)
    length = entry.get("max_model_len") or (entry.get("meta") or {}).get("n_ctx")
    if isinstance(dialect, LlamaCpp):
        props = await connection.get(f"{connection.root}/props") or {}
        length = (props.get("default_generation_settings") or {}).get("n_ctx", length)
    elif missing := [name for name in dialect.required if name not in _fields(schema)]:
        raise RemoteError(
            f"{connection.url}: this server ({dialect.name}) does not know the field {missing[0]!r} of a completion, "
            "and would ignore it; use a newer version of it"
        )
    await _compare(connection, dialect, tokenizer, str(entry["id"]))
    number = (version or {}).get("version") if isinstance(version, dict) else None
    return Server(dialect, str(entry["id"]), None if length is None else int(length), number)


def _model(listed: list[dict[str, Any]], wanted: str | None) -> dict[str, Any]:
    names = [str(m["id"]) for m in listed]
    if wanted is None:
        if len(listed) > 1:
            raise RemoteError(f"model: the server has {len(listed)} models; pass model= one of {', '.join(names)}")
        return listed[0]
    if wanted not in names:
        near = nearest(wanted, names) or names[:5]
        raise RemoteError(f"model={wanted!r}: the server has no such model; the nearest are {', '.join(near)}")
    return listed[names.index(wanted)]


def _fields(schema: Any) -> frozenset[str]:
    """Fields of a completion request, by the server's own description."""
    found = ((schema or {}).get("components") or {}).get("schemas") or {}
    return frozenset((found.get("CompletionRequest") or {}).get("properties") or ())


def _dialect(owner: str, schema: Any, version: Any) -> Dialect:
    fields = _fields(schema)
    if "llamacpp" in owner or "llama.cpp" in owner:
        return LlamaCpp()
    if owner == "sglang" or ("no_stop_trim" in fields and "prompt_logprobs" not in fields):
        return SGLang()
    if owner == "vllm" or "return_token_ids" in fields:
        return VLLM()
    raise RemoteError(
        f"the server is neither vLLM, SGLang nor llama.cpp (owned_by: {owner or 'nobody'}, no token ids among the "
        "fields of its completions); a thread goes on from token ids, so text alone will not do"
    )


async def _compare(connection: Connection, dialect: Dialect, tokenizer: Any, model: str) -> None:
    """RemoteError where the server's tokenizer, as far as it tells, gives other ids."""
    if isinstance(dialect, LlamaCpp):
        payload: dict[str, Any] = {"content": _PROBE, "add_special": False}
    else:
        payload = {"model": model, "prompt": _PROBE, "add_special_tokens": False}
    answer = await connection.post(f"{connection.root}/tokenize", payload)
    theirs = (answer or {}).get("tokens")
    if theirs is None:
        return  # it does not tell
    ours = list(tokenizer(_PROBE, add_special_tokens=False)["input_ids"])
    if list(theirs) != ours:
        at = next(
            (i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), min(len(theirs), len(ours))
        )
        raise RemoteError(
            f"tokenizer: the server's gives other token ids (from {at} on: {list(theirs)[at : at + 3]} there, "
            f"{ours[at : at + 3]} here); pass the tokenizer of the model that the server runs, {model!r}"
        )
