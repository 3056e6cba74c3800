"""Vectors that a model learnt for each segment of its context, added to K and V while a ``with`` block lasts.

ParaThinker (arXiv 2509.04475) tells its paths apart by them: one vector of ``head_dim`` a layer and segment, the same
for all KV heads, added to K before its rotation and to V. No model class of Transformers has them, so `SegmentVectors`
reads them from a checkpoint, and `SegmentVectors.added` puts forward hooks on a model's own projections.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anabranch._check import told
from anabranch.hf.probe import describe, is_compiled

__all__ = ["SegmentVectors", "find_vectors"]

_NAME = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn\.seg_embeddings\.weight$")  # as in the released checkpoints


class SegmentVectors:
    """One vector a layer and segment.

    Args:
        vectors: floats [layers, segments, head_dim]; may require grad.

    >>> vectors = ab.SegmentVectors.load("ParaThinker-1.5B")
    >>> engine = ab.Engine(model, tokenizer, segment_vectors=vectors)
    """

    def __init__(self, vectors: Tensor):
        if not isinstance(vectors, Tensor) or vectors.dim() != 3 or not vectors.is_floating_point():
            raise ValueError(f"vectors: expected floats of shape [layers, segments, head_dim], got {told(vectors)}")
        self.vectors = vectors

    def __repr__(self) -> str:
        layers, segments, head_dim = self.vectors.shape
        return f"SegmentVectors(layers={layers}, segments={segments}, head_dim={head_dim})"

    @property
    def num_segments(self) -> int:
        return int(self.vectors.shape[1])

    @classmethod
    def load(cls, source: Any) -> SegmentVectors:
        """Read them from a checkpoint: a folder, a .safetensors file, a state dict, or a model that holds them.

        Raises ValueError for one without the vectors (``…layers.N.self_attn.seg_embeddings.weight``) of every layer.
        """
        found = dict(_read(source))
        where = str(source) if isinstance(source, (str, os.PathLike)) else type(source).__name__
        layers = max(found, default=-1) + 1
        if not found or (missing := [n for n in range(layers) if n not in found]):
            what = f"of layer {missing[0]}" if found else "at all"
            raise ValueError(
                f"source: {where} holds no segment vectors {what} (…layers.N.self_attn.seg_embeddings.weight, "
                "[segments, head_dim]); pass the checkpoint of a model that was trained with them"
            )
        shapes = {tuple(v.shape) for v in found.values()}
        if len(shapes) > 1:
            raise ValueError(f"source: {where} holds segment vectors of different shapes, {sorted(shapes)}")
        return cls(torch.stack([found[n] for n in range(layers)]))

    def added(self, model: Any, segments: Tensor) -> AbstractContextManager[None]:
        """Add them in the forwards of `model` inside the ``with`` block; behind it, however left, nothing remains.

        segments: int64 [rows], the segment of each row of a forward; −1: no vector is added.

        Raises ValueError for a model of other sizes, one whose attention has no ``k_proj`` and ``v_proj`` of its own,
        or one compiled by torch.compile (which would not see the hooks).

        >>> with vectors.added(model, layout.kv_segments):
        ...     loss = model(**layout.batch(), use_cache=False).loss
        """
        return self.adder(model)(segments)

    def adder(self, model: Any) -> Callable[[Tensor], AbstractContextManager[None]]:
        """`added` for one model, with the model looked at once for many forwards."""
        sites, shape = self._sites(model), describe(model)
        none = self.vectors.new_zeros(self.vectors.shape[0], 1, self.vectors.shape[2])
        table = torch.cat([none, self.vectors], 1).to(shape.device, shape.dtype)  # [0]: rows without a segment

        @contextmanager
        def adding(segments: Tensor) -> Iterator[None]:
            if segments.numel() and not -1 <= int(segments.min()) <= int(segments.max()) < self.num_segments:
                raise ValueError(
                    f"segments: {int(segments.min())} to {int(segments.max())}, but there are vectors of 0 to "
                    f"{self.num_segments - 1} (−1: none)"
                )
            index = segments.to(shape.device) + 1
            handles: list[Any] = []
            try:
                for layer, modules in enumerate(sites):
                    add = _adder(table[layer][index])
                    handles += [module.register_forward_hook(add) for module in modules]
                yield
            finally:
                for handle in handles:
                    handle.remove()

        return adding

    def _sites(self, model: Any) -> list[tuple[nn.Module, nn.Module]]:
        """Of each layer: the modules that put out what K is before its rotation, and V."""
        shape = describe(model)
        have, want = (self.vectors.shape[0], self.vectors.shape[2]), (shape.num_layers, shape.head_dim)
        if have != want:
            raise ValueError(f"segment_vectors: made for (layers, head_dim) {have}, but the model has {want}")
        if shape.v_head_dim != shape.head_dim:
            raise ValueError(
                f"segment_vectors: one vector is added to K and to V, but the model's have {shape.head_dim} and "
                f"{shape.v_head_dim} numbers; use a model whose K and V are alike"
            )
        if is_compiled(model):
            raise ValueError("segment_vectors: the model is compiled by torch.compile; pass the model itself")
        found: dict[int, tuple[nn.Module, nn.Module]] = {}
        for module in model.modules():
            layer = getattr(module, "layer_idx", None)
            parts: dict[str, nn.Module] = dict(module.named_children())
            if isinstance(layer, int) and {"k_proj", "v_proj"} <= parts.keys() and "v_norm" not in parts:
                found[layer] = (parts.get("k_norm") or parts["k_proj"], parts["v_proj"])
        if missing := [n for n in range(shape.num_layers) if n not in found]:
            raise ValueError(
                f"segment_vectors: {type(model).__name__} has no k_proj and v_proj in layer {missing[0]}, so there "
                "is no place to add them; use a model that keeps K and V in projections of their own (Llama, Qwen)"
            )
        return [found[n] for n in range(shape.num_layers)]


def _adder(vectors: Tensor) -> Any:
    """A forward hook that adds to each row of a projection its vector of `vectors` [rows, head_dim], in all heads."""

    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        heads = output.unflatten(-1, (-1, vectors.shape[-1])) if output.dim() == 3 else output
        if heads.shape[:2] != (1, len(vectors)):
            raise ValueError(f"segments: {len(vectors)} rows, but the forward has {list(heads.shape[:2])}")
        return (heads + vectors[None, :, None]).view(output.shape)

    return add


def _read(source: Any) -> Iterator[tuple[int, Tensor]]:
    """(layer, vectors) of all that `source` holds."""
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            raise ValueError(f"source: {path} is no .safetensors file, nor a folder with any")
        from safetensors import safe_open

        for file in files:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():
                    if match := _NAME.search(name):
                        yield int(match[1]), tensors.get_tensor(name)
        return
    if isinstance(source, nn.Module):
        source = source.state_dict()
    if not isinstance(source, Mapping):
        raise TypeError(f"source: expected a path, a state dict or a model, got {told(source)}")
    for name, tensor in source.items():
        if match := _NAME.search(str(name)):
            yield int(match[1]), tensor


def _folder(model: Any) -> Path | None:
    """Where a model's checkpoint lies on this machine, if it does."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not name:
        return None
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(name, local_files_only=True))
        except (HFValidationError, LocalEntryNotFoundError):
            return None
    return folder if any(folder.glob("*.safetensors")) else None


def find_vectors(model: Any) -> SegmentVectors | None:
    """Those that a model holds itself, or the folder that it was loaded from; None where there are none."""
    for source in (model, _folder(model)):
        if source is None:
            continue
        if next(_read(source), None) is not None:
            return SegmentVectors.load(source)
    return None
