"""Multi-head latent attention over a tree of latents: DeepSeek's attention with its up-projections absorbed.

Such a model makes K and V of all heads from one vector a token, the latent, by an up-projection. Kept as K and V they
take as much memory as any model's. Kept as latents, one KV head's row of ``kv_lora_rank + qk_rope_head_dim`` numbers
serves all heads, and V is the first ``kv_lora_rank`` of them (``TreeCache(v_in_k=True)``). The up-projection then moves
to the other side of both products: queries go through the transpose of K's part before attention, outputs through V's
part behind it.

Transformers hands the latents to its own cache (``cache.update(latents, rotated keys, layer)``), before it expands
them. So nothing of the model is replaced: `Latents` stands in for that cache and keeps a forward's rows until the
attention function writes them to the tree.

A model is asked, as everywhere in `anabranch.hf`: a forward must show that its K and V are the latents through one of
the attention layer's own linear layers. That layer's weight is read anew in every call.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from anabranch.attention.tree import tree_attention
from anabranch.hf.probe import ModelShape, Probe, UnsupportedModel, describe, probe_forward
from anabranch.kv.step import Step

__all__ = ["attend_latents", "latent_dims", "latent_keywords", "latents_of"]


@functools.cache
def _kind() -> type:
    """The class of `latents_of`: an empty cache of Transformers', which answers whatever a model asks of one."""
    from transformers import DynamicCache

    class Latents(DynamicCache):
        """Takes the place of Transformers' cache in one forward over a tree of latents; see `latents_of`."""

        def __init__(self) -> None:
            super().__init__()
            self.rows: dict[int, tuple[Tensor, Tensor]] = {}

        def update(
            self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            """Keeps what a layer would cache, latents and rotated keys; the layer goes on with its own rows alone."""
            self.rows[layer_idx] = key_states, value_states
            return key_states, value_states

    return Latents


def _take(given: Any, layer: int, where: str) -> tuple[Tensor, int]:
    """A layer's rows, [T, 1, kv_lora_rank + qk_rope_head_dim], and kv_lora_rank."""
    found = given.rows.pop(layer, None)
    if found is None:
        raise UnsupportedModel(f"{where} (layer {layer}) caches no latents before its attention; leave latent out")
    latents, rotated = found
    if latents.dim() != 4 or latents.shape[:2] != (1, 1) or rotated.shape[:3] != latents.shape[:3]:
        raise UnsupportedModel(
            f"{where} (layer {layer}) caches {tuple(latents.shape)} and {tuple(rotated.shape)}, not one latent and one "
            "rotated key a token: it has no latents, or this Transformers keeps expanded keys and values; leave latent "
            "out"
        )
    return torch.cat([latents[0], rotated[0]], -1).transpose(0, 1), latents.shape[3]


_of_step: weakref.WeakKeyDictionary[Step, Any] = weakref.WeakKeyDictionary()


def latents_of(step: Step) -> Any:
    """What a model that runs over a tree of latents is given as its ``cache``::

    cache = ab.TreeCache.for_model(model, latent=True)
    step = cache.step({trunk: len(ids)})
    model(input_ids=ids[None], position_ids=step.position_ids[None], tree_step=step, cache=hf.latents_of(step),
          use_cache=False, logits_to_keep=step.last_rows)
    """
    if not isinstance(step, Step) or not step.cache.v_in_k:
        raise ValueError(
            f"step: expected a Step of a cache of latents (TreeCache.for_model(model, latent=True)), got {step!r}"
        )
    if step not in _of_step:
        _of_step[step] = _kind()()
    return _of_step[step]


def latent_keywords(model: Any, latents: Any) -> dict[str, Any]:
    """The keyword under which this model's forward takes a cache, with the latents."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # (PEFT's wrapper takes anything)
    names = inspect.signature(base.forward).parameters
    return {"cache" if "cache" in names else "past_key_values": latents}


class _UpProjection(NamedTuple):
    """Where an attention layer makes K and V of its latents."""

    name: str  # of the linear layer, a child of the attention layer
    nope: int  # of a head's key: what comes from the latent; the rest is rotated, and the same for all heads
    lora: int


_found: weakref.WeakKeyDictionary[nn.Module, _UpProjection] = weakref.WeakKeyDictionary()


class _LatentProbe(Probe):
    """Finds each attention layer's up-projection, by its numbers."""

    def __init__(self) -> None:
        super().__init__(frozenset())
        self.latents = _kind()()

    def record(self, module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any) -> Tensor:
        out = super().record(module, query, key, value, *args)
        where, layer = type(module).__name__, module.layer_idx
        rows, lora = _take(self.latents, layer, where)
        rows = rows[:, 0]
        rope = rows.shape[1] - lora
        nope = key.shape[3] - rope
        if nope < 1 or key.shape[1] != query.shape[1] or not _close(key[0, :, :, nope:], rows[None, :, lora:]):
            raise UnsupportedModel(
                f"{where} (layer {layer}) does not end its keys with the {rope} rotated numbers it caches, the same in "
                "all heads, so its products cannot be absorbed into latents; leave latent out"
            )
        wanted = torch.cat([key[0, :, :, :nope], value[0]], -1)
        shape = key.shape[1] * wanted.shape[2], lora
        for name, child in module.named_children():
            if type(child) is nn.Linear and child.bias is None and tuple(child.weight.shape) == shape:
                up = child.weight.unflatten(0, (key.shape[1], -1))
                if _close(torch.einsum("tl,hnl->htn", rows[:, :lora], up), wanted):
                    _found[module] = _UpProjection(name, nope, lora)
                    return out
        raise UnsupportedModel(
            f"{where} (layer {layer}) does not make its keys and values of its latents by one linear layer of its own "
            "without bias (torch.nn.Linear; an adapter on it has to be merged first), so its products cannot be "
            "absorbed; leave latent out"
        )


def _close(got: Tensor, want: Tensor) -> bool:
    got, want = got.float(), want.float()
    return bool((got - want).abs().max() <= 0.02 * want.abs().max())  # (in bfloat16, too)


_dims: weakref.WeakKeyDictionary[Any, tuple[Any, tuple[int, int]]] = weakref.WeakKeyDictionary()


def latent_dims(model: Any) -> tuple[int, int]:
    """(head_dim, v_head_dim) of a cache of this model's latents: ``kv_lora_rank + qk_rope_head_dim`` and
    ``kv_lora_rank``. (Kept: later calls cost nothing while the model stays as `describe` found it.)

    Raises `UnsupportedModel`, with the reason, for a model that has none.
    """
    shape = describe(model)
    known = _dims.get(model)
    if known is None or known[0] is not shape:
        known = _dims[model] = shape, _probe(model, shape)
    return known[1]


@torch.no_grad()
def _probe(model: Any, shape: ModelShape) -> tuple[int, int]:
    probe, name = _LatentProbe(), type(model).__name__
    training = [part for part in model.modules() if part.training]
    try:
        model.eval()
        token = model.get_input_embeddings().weight.shape[0] // 2
        ids = [(token + i) % (2 * token) for i in range(Probe.ROWS)]
        more = latent_keywords(model, probe.latents)
        probe_forward(model, probe, ids, list(range(Probe.ROWS)), **more)
    except TypeError as error:
        raise UnsupportedModel(f"{name}.forward takes no cache, so its latents cannot be had: {error}") from error
    finally:
        for part in training:
            part.training = True
    found = {(up.lora, up.nope) for module in model.modules() if (up := _found.get(module)) is not None}
    if len(found) != 1 or len(probe.calls) != shape.num_layers:
        raise UnsupportedModel(f"{name} has layers whose latents differ: (kv_lora_rank, qk_nope_head_dim) {found}")
    lora, nope = found.pop()
    return lora + shape.head_dim - nope, lora


def attend_latents(
    module: nn.Module, step: Step, query: Tensor, *, scale: float | None, backend: str, **options: Any
) -> Tensor:
    """Write a layer's latents to the step's cache, and attend there with absorbed products.

    Args:
        query: [1, num_q_heads, T, qk_nope_head_dim + qk_rope_head_dim], rotated, as the model made it.
        scale: the model's; default: of the query's head_dim.
        options: softcap, window and sinks of ``tree_attention``.

    Returns:
        [1, T, num_q_heads, v_head_dim] of the model.
    """
    layer: Any = module.layer_idx
    where, cache = type(module).__name__, step.cache
    given = _of_step.get(step)
    if given is None:
        raise ValueError(
            "cache: this TreeCache keeps latents, and the model was not given a place for them; pass "
            "cache=anabranch.hf.latents_of(step) beside tree_step=step"
        )
    up = _found.get(module)
    child = None if up is None else getattr(module, up.name, None)
    if up is None or type(child) is not nn.Linear:
        raise UnsupportedModel(
            f"{where} (layer {layer}) has no up-projection that is known; make the cache with "
            "TreeCache.for_model(model, latent=True), after adapters were merged"
        )
    rows, _ = _take(given, layer, where)
    q = query.detach()[0]
    weight = child.weight.detach().to(q.dtype).unflatten(0, (q.shape[0], -1))  # [Hq, nope + v, lora]
    absorbed = torch.cat([torch.bmm(q[..., : up.nope], weight[:, : up.nope]), q[..., up.nope :]], -1)
    cache.write(layer, rows.detach().contiguous(), None, step, backend=backend)
    factor = float(q.shape[-1] ** -0.5) if scale is None else scale
    out = tree_attention(
        absorbed.transpose(0, 1).contiguous(), cache, layer, step, scale=factor, backend=backend, **options,
    )  # fmt: skip
    assert isinstance(out, Tensor)  # no LSE was asked for
    return torch.bmm(out.transpose(0, 1), weight[:, up.nope :].transpose(1, 2)).transpose(0, 1)[None]
