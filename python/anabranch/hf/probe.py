"""What a Hugging Face decoder looks like to a tree cache, found by asking the model itself.

Configurations name the same thing in many ways, so `describe` reads only refusals from them. The facts (layers, heads,
windows, softcaps) come from a *probe*: a forward of a few equal rows in which every attention call is recorded and
answered with zeros. It also proves what no configuration says: that keywords reach every attention layer, and that
nothing but attention mixes rows (a convolution, a state-space layer or experts of limited capacity would). A second
forward, in which one of these rows is among strangers far away, proves that it does not depend on its company (rotary
embeddings that look at the longest sequence, statistics over the forward).
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from anabranch.hf.positions import PositionTables
from anabranch.hf.rope import RopeRule, rope_rules

_LAYER_TYPES = {"full_attention", "sliding_attention"}  # of config.layer_types: what a tree can honour


class UnsupportedModel(ValueError):
    """The model cannot run over a tree; the message names the part that stands in the way."""


@dataclass(frozen=True)
class ModelShape:
    """What a `TreeCache` and an engine need to know about a decoder."""

    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    """Of queries and keys."""
    dtype: torch.dtype
    """Type of the keys and values."""
    device: torch.device
    windows: tuple[int | None, ...]
    """Sliding window of each layer in tokens; None = full attention."""
    softcap: float | None
    """Cap of the attention scores, the same in all layers; None = none."""
    sinks: bool
    """Whether any layer has attention sinks (one learned logit a query head)."""
    max_positions: int | None
    """Longest context the configuration promises, in tokens; None where it names none."""
    position_limit: int | None = None
    """Positions the model has embeddings for, where it looks them up in a table: none can lie beyond. None = no table
    (rotary embeddings)."""
    rope_rules: tuple[RopeRule, ...] = ()
    """Where a forward's longest sequence decides the rotation of all rows (hf/rope.py); () = nowhere."""
    v_head_dim: int = 0
    """Of values; where it is not given, ``head_dim``."""

    def __post_init__(self) -> None:
        if not self.v_head_dim:
            object.__setattr__(self, "v_head_dim", self.head_dim)


@dataclass(frozen=True)
class _Call:
    """One attention call of the probe."""

    layer: int
    q_heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype
    device: torch.device
    window: int | None
    softcap: float | None
    sinks: bool


class Probe:
    """Stands in for a step in the probe's forward: every attention call reports here and gets zeros back.

    watched: layers whose queries and keys are kept.
    """

    ROWS = 8
    ROW = 3  # the one that is compared: some before it, some behind it

    def __init__(self, watched: frozenset[int]) -> None:
        self.calls: list[_Call] = []
        self.rotated: dict[int, torch.Tensor] = {}  # layer → queries and keys of row ROW, [(Hq + Hkv), D]
        self._watched = watched

    def record(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        window: int | None,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """Checks one call, remembers its shape and returns zeros ``[1, T, Hq, E]``, E of the values."""
        name, layer = type(module).__name__, getattr(module, "layer_idx", None)
        if not isinstance(layer, int):
            raise UnsupportedModel(f"{name} has no layer_idx, so its keys and values have no place in a TreeCache")
        is_causal = kwargs.get("is_causal")
        if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
            raise UnsupportedModel(f"{name} (layer {layer}) is not causal: only decoders can run over a tree")
        if key.shape[:3] != value.shape[:3]:
            raise UnsupportedModel(
                f"{name} (layer {layer}) has keys of shape {tuple(key.shape)} and values of shape "
                f"{tuple(value.shape)}; a TreeCache needs one of each for every token and KV head"
            )
        if key.shape[2] != self.ROWS or query.shape[2] != self.ROWS or query.shape[3] != key.shape[3]:
            raise UnsupportedModel(
                f"{name} (layer {layer}) attends from {tuple(query.shape)} to {tuple(key.shape)}: "
                "not self-attention of the rows given"
            )
        if query.shape[1] % key.shape[1]:
            raise UnsupportedModel(
                f"{name} (layer {layer}) has {query.shape[1]} query heads on {key.shape[1]} KV "
                "heads: not a whole number of query heads a KV head"
            )
        self.calls.append(
            _Call(
                layer,
                query.shape[1],
                key.shape[1],
                key.shape[3],
                value.shape[3],
                key.dtype,
                key.device,
                window,
                kwargs.get("softcap"),
                kwargs.get("s_aux") is not None,
            )
        )
        if layer in self._watched:
            self.rotated[layer] = torch.cat([query, key], dim=1)[0, :, self.ROW].float()
        return query.new_zeros(1, self.ROWS, query.shape[1], value.shape[3])


def is_compiled(model: Any) -> bool:
    """Whether ``torch.compile(model)`` or ``model.compile()`` made this model, or a part of it."""
    if not isinstance(model, torch.nn.Module):
        return False
    return any(
        "_orig_mod" in part._modules or getattr(part, "_compiled_call_impl", None) is not None
        for part in model.modules()
    )


def uses_anabranch(model: Any) -> bool:
    """Whether the model's decoder layers call ``attn_implementation="anabranch"``."""
    config = text_config(model)
    return getattr(config, "_attn_implementation", None) == "anabranch"


def text_config(model: Any) -> Any:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise TypeError(f"model: expected a Transformers model with a config, got {type(model).__name__}")
    return config.get_text_config(decoder=True)


def refuse_by_config(model: Any) -> None:
    """Raise `UnsupportedModel` for what the configuration alone rules out; touches nothing."""
    config, name = text_config(model), type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise UnsupportedModel(
            f"{name} is an encoder–decoder or has cross-attention layers; a TreeCache serves decoder-only models"
        )
    strange = [t for t in dict.fromkeys(getattr(config, "layer_types", None) or []) if t not in _LAYER_TYPES]
    if strange:
        raise UnsupportedModel(
            f"{name} has layers of type {', '.join(map(str, strange))} (config.layer_types); "
            "only full_attention and sliding_attention layers can fork and join"
        )
    if getattr(model, "_is_stateful", False):
        raise UnsupportedModel(
            f"{name} keeps a recurrent state (state-space or linear-attention layers), which cannot "
            "be shared between branches token by token as keys and values can"
        )
    if getattr(config, "attention_chunk_size", None):
        raise UnsupportedModel(f"{name} has chunked attention (config.attention_chunk_size); windows must slide")
    if not getattr(model, "_supports_attention_backend", False) or not hasattr(model, "set_attn_implementation"):
        raise UnsupportedModel(
            f"{name} does not call attention through Transformers' attention registry with its "
            "keywords (_supports_attention_backend is not set), so no other attention can be used"
        )
    refuse_prompt_learning(model)
    if any(p.is_meta for p in model.parameters()):
        away = sorted({str(d) for d in (getattr(model, "hf_device_map", None) or {}).values()} & {"cpu", "disk"})
        if away:
            raise UnsupportedModel(
                f"{name} is offloaded to {' and '.join(away)} (hf_device_map), layer by layer; a TreeCache lies on one "
                'device: load the model whole, e.g. with device_map={"": 0} or without device_map'
            )
        raise UnsupportedModel(f"{name} has parameters on the meta device: load its weights first")


def refuse_prompt_learning(model: Any) -> None:
    """Raise `UnsupportedModel` for a PEFT model whose active adapter is a learned prompt or prefix."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        return
    active = getattr(model, "active_adapters", None)
    active = active() if callable(active) else active
    for adapter in active or configs:
        config = configs.get(adapter)
        if config is not None and getattr(config, "is_prompt_learning", False):
            kind = getattr(config.peft_type, "value", config.peft_type)
            raise UnsupportedModel(
                f"adapter {adapter!r} is {kind}: it puts {config.num_virtual_tokens} learned virtual tokens in front "
                "of every sequence, which have no token ids and no place in a tree; use an adapter of weights (LoRA, "
                "IA3), or the base model (model.get_base_model())"
            )


def own_precision(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which a model runs in its own dtype, whatever torch.autocast is on around it."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


_known: weakref.WeakKeyDictionary[Any, tuple[Any, ModelShape]] = weakref.WeakKeyDictionary()


def describe(model: Any) -> ModelShape:
    """The model's `ModelShape`, by a probe of a few rows (kept: later calls cost nothing while dtype and device stay).

    The model must use ``attn_implementation="anabranch"``. Raises `UnsupportedModel`, naming the reason, for models
    that cannot run over a tree: encoders, cross-attention, state-space or linear-attention layers, convolutions between
    tokens, anything else by which a row depends on the other rows of its forward, layers with different KV heads or
    head_dim, layers on several devices.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    enabled, state = uses_anabranch(model), _state(model)
    known = _known.get(model)
    if known is None or known[0] != state or not enabled:
        refuse_by_config(model)
        if not enabled:
            raise ValueError(
                f"model: {type(model).__name__} uses attn_implementation={model.config._attn_implementation!r}; load "
                'it with attn_implementation="anabranch" or call anabranch.hf.enable(model)'
            )
        known = (state, _probe(model))
        _known[model] = known
    return known[1]


def described(model: Any) -> bool:
    """Whether `describe` would answer without a forward."""
    model = getattr(model, "_orig_mod", model)
    known = _known.get(model)
    return known is not None and known[0] == _state(model) and uses_anabranch(model)


def _state(model: Any) -> tuple[Any, ...]:
    first = next(model.parameters())
    return first.dtype, first.device, rope_rules(text_config(model))


@torch.no_grad()
def _probe(model: Any) -> ModelShape:
    config, name = text_config(model), type(model).__name__
    rules = rope_rules(config)
    # The last position up to which no rule has a say, and an early one that is rotated enough to show a difference.
    far = min([rule.limit for rule in rules] + [getattr(config, "max_position_embeddings", None) or 9]) - 1
    here = min(16, far // 2)
    kinds = list(getattr(config, "layer_types", None) or ["all"])
    firsts = frozenset(kinds.index(kind) for kind in kinds)  # each kind of layer may have a rotary embedding of its own
    vocabulary = model.get_input_embeddings().weight.shape[0]
    token = vocabulary // 2
    training = [part for part in model.modules() if part.training]
    tables = PositionTables(here, far)
    try:
        model.eval()
        # The same token at the same position: whatever makes the rows differ mixes rows, and is not attention.
        alike = Probe(firsts)
        logits = probe_forward(model, alike, [token] * Probe.ROWS, [here] * Probe.ROWS)
        ids, positions = [(token + 1 + i) % vocabulary for i in range(Probe.ROWS)], [far] * Probe.ROWS
        ids[Probe.ROW], positions[Probe.ROW] = token, here
        among = Probe(firsts)
        with tables:
            strangers = probe_forward(model, among, ids, positions)
        shape = _shape_of(name, config, alike.calls, logits, rules, tables.limit)
    except TypeError as error:
        raise UnsupportedModel(f"{name}.forward does not take what a forward over a tree passes: {error}") from error
    finally:
        for part in training:
            part.training = True
    for layer, want in alike.rotated.items():
        if not _close(among.rotated[layer], want, 0.2):
            raise UnsupportedModel(
                f"{name} rotates a row differently when another row of the forward is at position {far} (layer "
                f"{layer}): its rotary embeddings look at the whole forward in a way that its configuration does not "
                "tell, so a branch would depend on its company; use a model whose position embeddings are fixed"
            )
    # Loose: with other company, rounding may send a row to another expert whose score is all but the same.
    if not _close(strangers[Probe.ROW], logits[Probe.ROW], 0.25):
        raise UnsupportedModel(
            f"{name} gives a token other logits when the other tokens of the forward change, though attention is the "
            "same: some layer looks at the whole forward (statistics over its rows, experts of limited capacity)"
        )
    return shape


def probe_forward(model: Any, probe: Probe, ids: list[int], positions: list[int], **more: Any) -> torch.Tensor:
    """Logits [ROWS, vocabulary] of a probe's forward; `more`: further keywords of the model."""
    device = model.get_input_embeddings().weight.device
    devices = [device] if device.type == "cuda" else []
    # A probe is looked at by Python code, which a compiled model would trace.
    eager = torch.compiler.set_stance("force_eager") if is_compiled(model) else nullcontext()
    with torch.random.fork_rng(devices=devices), eager, own_precision(device):
        return model(
            input_ids=torch.tensor([ids], device=device),
            position_ids=torch.tensor([positions], device=device),
            tree_step=probe,
            use_cache=False,
            logits_to_keep=torch.arange(Probe.ROWS, device=device),
            **more,
        ).logits[0]


def _close(got: torch.Tensor, want: torch.Tensor, bound: float) -> bool:
    """Whether they differ by no more than `bound` of the largest value."""
    got, want = got.float(), want.float()
    return torch.allclose(got, want, rtol=0, atol=bound * float(want.abs().max().nan_to_num(0.0)), equal_nan=True)


def _shape_of(
    name: str,
    config: Any,
    calls: list[_Call],
    logits: torch.Tensor,
    rules: tuple[RopeRule, ...],
    position_limit: int | None,
) -> ModelShape:
    layers = sorted(call.layer for call in calls)
    expected = list(range(len(layers)))
    promised = getattr(config, "num_hidden_layers", len(layers))
    if layers != expected or len(layers) < promised:
        raise UnsupportedModel(
            f"{name} has {promised} layers, but its attention was reached with tree_step for layers "
            f"{layers}: each layer must call it once and pass its keywords on"
        )
    calls = sorted(calls, key=lambda call: call.layer)
    for what in ("q_heads", "kv_heads", "head_dim", "v_head_dim", "dtype", "device", "softcap"):
        found = {getattr(call, what): call.layer for call in reversed(calls)}
        if len(found) > 1:
            each = ", ".join(f"{value} (layer {layer})" for value, layer in sorted(found.items(), key=lambda x: x[1]))
            raise UnsupportedModel(f"{name} has layers that differ in {what}: {each}; a TreeCache has one shape")
    if not _close(logits, logits[:1].expand_as(logits), 0.02):
        raise UnsupportedModel(
            f"{name} mixes tokens outside of attention (convolution or recurrent layers, experts of limited capacity): "
            "equal rows at the same position gave different logits"
        )
    first = calls[0]
    return ModelShape(
        num_layers=len(calls),
        num_q_heads=first.q_heads,
        num_kv_heads=first.kv_heads,
        head_dim=first.head_dim,
        v_head_dim=first.v_head_dim,
        dtype=first.dtype,
        device=first.device,
        windows=tuple(call.window for call in calls),
        softcap=first.softcap,
        sinks=any(call.sinks for call in calls),
        max_positions=getattr(config, "max_position_embeddings", None),
        position_limit=position_limit,
        rope_rules=rules,
    )
