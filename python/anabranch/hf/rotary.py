"""A model's own rotary embeddings, layer by layer: found among its buffers, and proved by a forward.

A row that reads other branches under a position offset has its query turned on by that offset (ops/rotary.py). That is
right only where the model's positions are a rotation of queries and keys and nothing else. So the model is asked: one
forward of one token at several positions, in which attention answers with zeros. Whatever is not attention or a
rotation leaves the queries of all rows alike up to the rotation; learned positions, say, do not.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor

from anabranch.hf.probe import Probe, UnsupportedModel, probe_forward, text_config
from anabranch.hf.rope import rope_rules
from anabranch.ops.rotary import Rotary, rotate

#: where the token stands, at most (models with fewer positions: what they have)
_POSITIONS = (0, 1, 2, 3, 50, 977, 8_191, 50_000)


class _Positions(Probe):
    """Keeps every layer's queries of all rows."""

    def __init__(self) -> None:
        super().__init__(frozenset())
        self.queries: dict[int, Tensor] = {}  # [ROWS, Hq, D]

    def record(self, module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = super().record(module, query, *args, **kwargs)
        self.queries[module.layer_idx] = query[0].transpose(0, 1).float()  # type: ignore[index]
        return out


@torch.no_grad()
def rotary_of(model: Any) -> list[Rotary | None]:
    """The rotary embeddings of each layer; None for a layer that is given no positions at all.

    Raises:
        UnsupportedModel: positions are something else than one rotation; the message says what.
    """
    name = type(model).__name__
    if rules := rope_rules(text_config(model)):
        raise UnsupportedModel(
            f"{name} has {rules[0].rope_type} rotary embeddings, which change with the length of a sequence, so keys "
            f"cannot be read under another position; {rules[0].remedy}"
        )
    found = {
        buffer.cpu().float().numpy().tobytes(): buffer
        for path, buffer in model.named_buffers()
        if path.endswith("inv_freq") and "original" not in path and buffer.dim() == 1
    }
    last = (getattr(text_config(model), "max_position_embeddings", None) or 1024) - 1
    positions = [min(p, last) for p in _POSITIONS]
    probe, training = _Positions(), [part for part in model.modules() if part.training]
    try:
        model.eval()
        probe_forward(model, probe, [model.get_input_embeddings().weight.shape[0] // 2] * Probe.ROWS, positions)
    finally:
        for part in training:
            part.training = True
    guesses: list[Rotary | None] = [None]
    guesses += [Rotary(*guess) for guess in product(found.values(), (False, True), (False, True))]
    rotary: list[Rotary | None] = []
    offsets = torch.tensor(positions)
    for layer in sorted(probe.queries):
        queries = probe.queries[layer].cpu()
        right = [guess for guess in guesses if _explains(guess, queries, offsets)]
        if not right:
            raise UnsupportedModel(
                f"{name} (layer {layer}): its queries at other positions are not turned by any of its {len(found)} "
                "tables of rotary frequencies (buffers named inv_freq), so its positions are something else than a "
                "rotation (learned embeddings, biases on scores); reading other branches under a position offset "
                "needs rotary embeddings"
            )
        rotary.append(right[0])
    return rotary


def _explains(guess: Rotary | None, queries: Tensor, offsets: Tensor) -> bool:
    """Whether the queries [rows, Hq, D] of one token at positions `offsets` are the first one, turned."""
    if guess is not None and 2 * len(guess.frequencies) > queries.shape[2]:
        return False
    want = queries[:1].expand_as(queries)
    if guess is not None:
        want = rotate(want, guess.table(offsets), guess.interleaved, guess.last)
    return bool((queries - want).abs().max() <= 0.02 * queries.abs().max())
