"""``Layout``: the tokens of one packed training row, with their `BranchMask` and with what is to be learnt."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anabranch.attention.mask import BranchMask
from anabranch.hf.mask import beside_branch_mask
from anabranch.records.rows import Rows

__all__ = ["IGNORE", "Layout"]

IGNORE = -100  # a label without loss, as in Transformers
_FIELDS = ("input_ids", "written", "labels", "threads", "recorded", "kv_segments", "previous")


@dataclass(frozen=True, eq=False)
class Layout:
    """One packed row: tokens, visibility, positions, labels.

    input_ids: int64 [T]. mask: over T tokens; its ``positions`` are the position ids.
    written: bool [T], True where the model itself writes the token; False for prompts, headers and all else that the
        runtime inserts.
    labels: int64 [T], the token itself where there is loss, −100 elsewhere (not shifted). Default: every written token
        that another one precedes.
    threads: int64 [T], which thread each token belongs to, 0 for the trunk (and, for a prompt's answers, 1, 2, …).
    kv_segments: int64 [T], whose vectors the model adds to each token's K and V (`anabranch.hf.SegmentVectors`), 0 by
        default.
    recorded: float32 [T], the log-probability that the engine saw when it sampled the token, NaN where none was
        recorded (``generate(logprobs=True)`` does).
    previous: int64 [T], the row whose logits predict each token, −1 where none. Default: ``mask.previous``, the last
        token that it sees. Threads that saw one another while they wrote go on from their own last token instead.

    The row that predicts a token is not always the row above: the first tokens of several threads may all be predicted
    by the last token before the fork. `batch` takes care of that.

    Raises ValueError, naming the segment, for a label on a token that the model does not write, on one that nothing
    precedes, or one that is not the token itself.
    """

    input_ids: Tensor
    mask: BranchMask
    written: Tensor
    labels: Tensor | None = None
    threads: Tensor | None = None
    recorded: Tensor | None = None
    kv_segments: Tensor | None = None
    previous: Tensor | None = None

    def __post_init__(self) -> None:
        total = self.mask.num_tokens
        kinds = {"input_ids": torch.int64, "written": torch.bool, "threads": torch.int64, "kv_segments": torch.int64}
        for name, dtype in kinds.items():
            value = getattr(self, name)
            value = torch.zeros(total) if value is None else torch.as_tensor(value)
            if value.shape != (total,):
                raise ValueError(f"{name}: expected [{total}], as the mask has, got {list(value.shape)}")
            object.__setattr__(self, name, value.to(self.mask.device, dtype))
        recorded = torch.full((total,), float("nan")) if self.recorded is None else self.recorded
        recorded = torch.as_tensor(recorded, dtype=torch.float32)  # whatever the default dtype: a list would be rounded
        if recorded.shape != (total,):
            raise ValueError(f"recorded: expected [{total}], as the mask has, got {list(recorded.shape)}")
        object.__setattr__(self, "recorded", recorded.to(self.mask.device, torch.float32))
        previous = self.mask.previous if self.previous is None else torch.as_tensor(self.previous)
        if previous.shape != (total,):
            raise ValueError(f"previous: expected [{total}], as the mask has, got {list(previous.shape)}")
        previous = previous.to(self.mask.device, torch.int64)
        object.__setattr__(self, "previous", previous)
        if self.labels is None:
            learnt = self.written & (previous >= 0)
            object.__setattr__(self, "labels", torch.where(learnt, self.input_ids, IGNORE))
            return
        labels = torch.as_tensor(self.labels)
        if labels.shape != (total,):
            raise ValueError(f"labels: expected [{total}], as the mask has, got {list(labels.shape)}")
        labels = labels.to(self.mask.device, torch.int64)
        object.__setattr__(self, "labels", labels)
        learnt = labels != IGNORE
        for wrong, why in (
            (learnt & ~self.written, "the runtime inserts it, so there is nothing to learn; set its label to -100"),
            (learnt & (previous < 0), "nothing precedes it that could predict it; set its label to -100"),
            (
                learnt & (labels != self.input_ids),
                "labels are the tokens themselves, not shifted; the shift is made in batch()",
            ),
        ):
            if bool(wrong.any()):
                i = int(wrong.nonzero()[0])
                raise ValueError(
                    f"labels: token {i} (segment {int(self.mask.segment_ids[i])}) has label {int(labels[i])}: {why}"
                )

    # ------------------------------------------------------------------------------------------------ reading it

    @property
    def num_tokens(self) -> int:
        return self.mask.num_tokens

    @property
    def position_ids(self) -> Tensor:
        """int64 [T]."""
        return self.mask.positions

    @property
    def learnt(self) -> Tensor:
        """int64 [N], indices of the tokens with loss, in order."""
        return (self.labels != IGNORE).nonzero()[:, 0]  # type: ignore[union-attr]

    def batch(self, logits: str = "needed") -> dict[str, Any]:
        """Keywords of ``model(**layout.batch())``, for Transformers' own loss.

        Always ``input_ids``, ``position_ids``, ``labels`` (not shifted), ``branch_mask``, ``shift_labels``, what each
        row predicts, which Transformers' losses take in place of shifting ``labels`` themselves, and an
        ``attention_mask`` that makes a model raise which would not use the ``branch_mask`` (collators leave it out).

        logits: "needed": logits only for the N rows that predict something (``logits_to_keep`` [N]; ``shift_labels``
            is [1, N]). Saves the head's time and memory on all others.
            "all": logits for every row, ``shift_labels`` [1, T'], as trainers expect that compute the loss themselves
            (TRL). A row that predicts the first tokens of several threads is there once for each: T' = T + copies.
        """
        learnt = self.learnt
        assert self.previous is not None
        rows, targets = self.previous[learnt], self.input_ids[learnt]
        ids, labels, mask = self.input_ids, self.labels, self.mask
        assert labels is not None
        extra: dict[str, Tensor] = {}
        if logits == "needed":
            extra = {"shift_labels": targets[None], "logits_to_keep": rows}
        elif logits == "all":
            seen: set[int] = set()
            again = [i for i, row in enumerate(rows.tolist()) if row in seen or seen.add(row)]  # type: ignore[func-returns-value]
            if again:
                copied, rows = rows[again], rows.clone()
                mask = mask.with_copies(copied)
                rows[again] = torch.arange(len(again), device=rows.device) + self.num_tokens
                ids = torch.cat([ids, ids[copied]])
                labels = torch.cat([labels, torch.full_like(copied, IGNORE)])
            shifted = torch.full_like(ids, IGNORE)
            shifted[rows] = targets
            extra = {"shift_labels": shifted[None]}
        else:
            raise ValueError(f"logits={logits!r}; pass 'needed' or 'all'")
        row = {"input_ids": ids[None], "position_ids": mask.positions[None], "labels": labels[None]}
        guard = beside_branch_mask(mask.num_tokens, mask.device)
        return {**row, "branch_mask": mask, "attention_mask": guard, **extra}

    def logprobs(self, model: Any, segment_vectors: Any = None, **kwargs: Any) -> Tensor:
        """float32 [N], the model's log-probability of each token of `learnt`, by one training forward.

        segment_vectors: `anabranch.hf.SegmentVectors` of a model that adds them to K and V, by ``kv_segments``.
        Differentiable. Further keywords go to the model (``branch_backend="reference"``). Raises what ``hf.describe``
        raises for a model that does not use ``attn_implementation="anabranch"`` or would not see the mask.
        """
        from anabranch import hf

        hf.describe(model)  # raises for a model that would leave the mask unseen
        batch = self.batch()
        target = batch.pop("shift_labels")[0]
        batch.pop("labels")
        adding = nullcontext() if segment_vectors is None else segment_vectors.added(model, self.kv_segments)
        with adding:
            logits = model(**batch, use_cache=False, **kwargs).logits[0].float()
        return logits.gather(-1, target.to(logits.device)[:, None])[:, 0] - logits.logsumexp(-1)

    # ------------------------------------------------------------------------------------------------ changing it

    @classmethod
    def pack(cls, layouts: Iterable[Layout]) -> Layout:
        """Several rows one behind another in one, blind to each other."""
        parts = list(layouts)
        if not parts:
            raise ValueError("layouts: empty; pass at least one Layout")
        mask = BranchMask.pack([p.mask for p in parts])
        joined = {n: torch.cat([getattr(p, n) for p in parts]) for n in _FIELDS}
        begins = torch.tensor([0, *itertools.accumulate(p.num_tokens for p in parts)][:-1], device=mask.device)
        shift = torch.repeat_interleave(begins, torch.tensor([p.num_tokens for p in parts], device=mask.device))
        joined["previous"] = torch.where(joined["previous"] < 0, -1, joined["previous"] + shift)
        return cls(mask=mask, **joined)

    def to(self, device: torch.device | str | int) -> Layout:
        moved = {n: getattr(self, n).to(device) for n in _FIELDS}
        return Layout(mask=self.mask.to(device), **moved)

    def as_dict(self) -> dict[str, Any]:
        """Plain lists, e.g. for a ``datasets.Dataset``; `from_dict` reads them."""
        fields = {name: getattr(self, name).tolist() for name in _FIELDS}
        parts = {name: getattr(self.mask, name).tolist() for name in ("starts", "row_ptr", "cols")}
        return {**fields, "position_ids": self.position_ids.tolist(), **parts}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Layout:
        """From what `as_dict` gives; ValueError names the field that does not fit."""
        parts = ("starts", "row_ptr", "cols", "position_ids")
        data = {"kv_segments": [0] * len(data.get("input_ids", ())), **data}
        # A dict of an earlier version has no `previous`, which then follows from the mask.
        if missing := [name for name in (*_FIELDS, *parts) if name not in data and name != "previous"]:
            raise ValueError(f"{missing[0]}: missing; pass a dict as Layout.as_dict() gives it")
        mask = BranchMask.from_intervals(*(data[name] for name in parts))
        return cls(mask=mask, **{name: torch.as_tensor(data[name]) for name in _FIELDS if name in data})


def layout_of(rows: Rows) -> Layout:
    """The `Layout` of a packed row: its lists as tensors, with the mask of who sees whom."""
    sizes = rows.sizes()
    flat = itertools.chain.from_iterable
    mask = BranchMask.from_context(sizes, rows.sees, torch.tensor(rows.positions(), dtype=torch.int64))
    ids = torch.tensor(list(flat(rows.ids)), dtype=torch.int64)
    previous = mask.previous
    for segment, before in rows.follows.items():
        previous[mask.starts[segment]] = mask.starts[before + 1] - 1
    learnt = torch.tensor(list(flat(rows.learnt)), dtype=torch.bool) & (previous >= 0)
    recorded = torch.full((len(ids),), float("nan"), dtype=torch.float32)
    for segment, values in rows.recorded.items():
        begin = int(mask.starts[segment])
        recorded[begin : begin + len(values)] = torch.tensor(values, dtype=torch.float32)
    return Layout(
        ids,
        mask,
        torch.tensor(list(flat(rows.written)), dtype=torch.bool),
        torch.where(learnt, ids, IGNORE),
        torch.repeat_interleave(torch.tensor(rows.threads, dtype=torch.int64), torch.tensor(sizes)),
        recorded,
        torch.repeat_interleave(torch.tensor(rows.kv_segments, dtype=torch.int64), torch.tensor(sizes)),
        previous,
    )
