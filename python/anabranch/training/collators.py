"""Data collators: traces, layouts or groups of answers in, the keywords of one packed training forward out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from anabranch.training.formats import grpo
from anabranch.training.layout import Layout

__all__ = ["BranchCollator", "GRPOCollator"]


@dataclass(frozen=True)
class BranchCollator:
    """For ``Trainer`` and ``SFTTrainer``: packs a batch's items in one row, blind to each other.

    An item is a `Layout` (of a builder, or `from_trace`), its ``as_dict()`` (a row of a ``datasets.Dataset``), an
    engine's `Result`, a `Trace`, or a trace as plain data.

    discarded, forgotten, flat_loss: what of a trace is kept and learnt; see `from_trace`.
    logits: which rows get logits, see `Layout.batch`: "all" suits every trainer; "needed" saves time and memory with
        those that leave the loss to the model (``Trainer`` does, ``SFTTrainer`` does not).

    The batch holds ``input_ids``, ``position_ids``, ``labels``, ``shift_labels`` and ``branch_mask``; loss is on what
    the model itself writes. Give the trainer ``remove_unused_columns=False``; the model needs
    ``attn_implementation="anabranch"``.
    """

    discarded: bool = True
    forgotten: bool = True
    flat_loss: bool = False
    logits: str = "all"

    def __call__(self, features: Sequence[Any]) -> dict[str, Any]:
        if not features:
            raise ValueError("features: empty; a batch has at least one item")
        batch = Layout.pack([self.layout(item, i) for i, item in enumerate(features)]).batch(self.logits)
        del batch["attention_mask"]  # trainers count tokens by it
        return batch

    def layout(self, item: Any, index: int = 0) -> Layout:
        """One item as a `Layout`."""
        from anabranch.records.result import Result
        from anabranch.records.trace import SCHEMA, Trace
        from anabranch.training.traces import from_trace

        if isinstance(item, Layout):
            return item
        try:
            if isinstance(item, Mapping) and item.get("schema") == SCHEMA:
                item = Trace.from_dict(item)
            if isinstance(item, (Result, Trace)):
                return from_trace(item, discarded=self.discarded, forgotten=self.forgotten, flat_loss=self.flat_loss)
            if isinstance(item, Mapping):
                return Layout.from_dict(item)
        except ValueError as error:
            raise ValueError(f"features[{index}]: {error}") from None
        raise TypeError(
            f"features[{index}]: expected a Layout, its as_dict(), a Result or a Trace, got {type(item).__name__}"
        )


@dataclass(frozen=True)
class GRPOCollator:
    """For policy gradients over groups: each prompt once, its G answers beside each other, several prompts a row.

    An item is a mapping with ``prompt_ids`` (token ids) and ``completion_ids`` (G lists of token ids, each with its
    EOS); ``advantages`` (G numbers, one an answer) and ``old_logprobs`` (G lists, one number a token) where there are.

    The batch is what `BranchCollator` gives, and beside it, of the N tokens that are learnt, in the order of
    ``shift_labels``: ``answers`` int64 [N], which answer of the batch a token belongs to (counted over all prompts),
    and, where given, ``advantages`` and ``old_logprobs``, float32 [N]. Take these out of the batch before it goes to
    the model::

        extra = {name: batch.pop(name) for name in ("answers", "advantages", "old_logprobs")}
        logits = model(**batch, use_cache=False).logits[0]          # [N, vocabulary]
        logp = logits.log_softmax(-1).gather(-1, batch["shift_labels"].T)[:, 0]
        ratio = (logp - extra["old_logprobs"]).exp()
        loss = -torch.min(ratio * extra["advantages"], ratio.clamp(0.8, 1.2) * extra["advantages"]).mean()
    """

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if not features:
            raise ValueError("features: empty; a batch has at least one item")
        layouts = []
        for i, item in enumerate(features):
            if missing := [name for name in ("prompt_ids", "completion_ids") if name not in item]:
                raise ValueError(f"features[{i}]: {missing[0]} is missing; pass prompt_ids and completion_ids")
            try:
                layouts.append(grpo(item["prompt_ids"], item["completion_ids"]))
            except ValueError as error:
                raise ValueError(f"features[{i}]: {error}") from None
        batch = Layout.pack(layouts).batch()
        del batch["attention_mask"]
        sizes = [len(answer) for item in features for answer in item["completion_ids"]]
        batch["answers"] = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        given = [sum(name in item for item in features) for name in ("advantages", "old_logprobs")]
        for name, count in zip(("advantages", "old_logprobs"), given, strict=True):
            if count not in (0, len(features)):
                raise ValueError(f"{name}: given for {count} of {len(features)} items; give it for all or for none")
        if given[0]:
            each = _numbers(features, "advantages", [len(item["completion_ids"]) for item in features])
            batch["advantages"] = each[batch["answers"]]
        if given[1]:
            flat = [{"old_logprobs": row} for item in features for row in item["old_logprobs"]]
            if len(flat) != len(sizes):
                raise ValueError(f"old_logprobs: expected {len(sizes)} lists, one an answer, got {len(flat)}")
            batch["old_logprobs"] = _numbers(flat, "old_logprobs", sizes)
        return batch


def _numbers(items: Sequence[Mapping[str, Any]], name: str, sizes: Sequence[int]) -> torch.Tensor:
    for i, (item, size) in enumerate(zip(items, sizes, strict=True)):
        if len(item[name]) != size:
            raise ValueError(f"{name}: expected {size} numbers for item {i}, got {len(item[name])}")
    return torch.tensor([float(x) for item in items for x in item[name]], dtype=torch.float32)
