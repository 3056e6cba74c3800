"""Rotary embeddings that look at the whole forward: which models have them, and up to which length they do not matter.

Two of Transformers' rope types choose their frequencies by the largest position of the *forward*. A forward over a tree
holds strangers of other lengths, and the keys in the cache were rotated by the forward that wrote them, so a row would
depend on its company:

* ``longrope`` (Phi-3 128k, Phi-4-mini, PhiMoE's ``long_mscale``): one set of factors up to
  ``original_max_position_embeddings``, another beyond. Exact while a sequence, its cached keys and all others in the
  forward are on the same side.
* ``dynamic`` (NTK): frequencies change with every position from ``max_position_embeddings`` on. Exact below.

`rope_rules` reads these from the configuration; hf/watch.py holds a cache to them and `check_branch_mask` a packed row.
That a model has no other such dependence is proved by the probe in hf/probe.py, not believed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from anabranch.attention.mask import BranchMask

_PAIRS = (("short_factor", "long_factor"), ("short_mscale", "long_mscale"))


@dataclass(frozen=True)
class RopeRule:
    """One way in which a forward's longest sequence decides the rotation of all its rows."""

    rope_type: str
    limit: int
    """Longest sequence, in positions, that is rotated as if it were short."""
    beyond: bool
    """Whether sequences beyond the limit can be served too, among themselves (longrope: one other set of factors)."""
    remedy: str

    def is_long(self, length: int) -> bool:
        """Whether a forward whose largest position is ``length - 1`` leaves the frequencies of short ones."""
        return length > self.limit


def rope_rules(config: Any) -> tuple[RopeRule, ...]:
    """The rules that a model of this configuration follows; () where every row is rotated by its own position alone."""
    parameters = getattr(config, "rope_parameters", None) or {}
    by_layer = bool(parameters) and all(isinstance(value, Mapping) for value in parameters.values())
    found = [_rule(config, group) for group in (parameters.values() if by_layer else [parameters])]
    return tuple(dict.fromkeys(rule for rule in found if rule is not None))


def _rule(config: Any, parameters: Mapping[str, Any]) -> RopeRule | None:
    kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
    if "dynamic" in kind:
        # At exactly max_position_embeddings an earlier, longer forward would still have its frequencies in force.
        limit = int(config.max_position_embeddings) - 1
        return RopeRule(
            kind,
            limit,
            False,
            f"keep every sequence to {limit} tokens, or load the model with a rope_type that does not look at the "
            "length (config.rope_parameters: 'yarn', 'linear', or 'default' with a larger rope_theta)",
        )
    unequal = [pair for pair in _PAIRS if parameters.get(pair[0]) != parameters.get(pair[1])]
    if kind == "default" or not unequal:
        return None
    limit = int(parameters.get("original_max_position_embeddings") or config.max_position_embeddings)
    one = ", ".join(f'p["{short}"] = p["{long}"]' for short, long in unequal)
    return RopeRule(
        kind,
        limit,
        True,
        f"keep all sequences to {limit} tokens, or each, from its first forward on, beyond (a long prompt in one "
        "forward: Engine(max_rows=…)), or load the model with one set of factors for all lengths: "
        f"p = config.rope_parameters; {one}; from_pretrained(…, config=config)",
    )


@torch.compiler.disable
def check_branch_mask(mask: BranchMask, rules: tuple[RopeRule, ...]) -> None:
    """Raise ValueError for a packed row whose sequences a model with these rules would rotate otherwise, each alone.

    A sequence is a segment that no other continues, with all that it sees.
    """
    longest = int(mask.positions.max()) + 1 if mask.num_tokens else 0
    for rule in rules:
        if not rule.is_long(longest):
            continue
        if not rule.beyond:
            raise ValueError(
                f"branch_mask: reaches position {longest - 1}, but {rule.rope_type} rotary embeddings depend on the "
                f"longest sequence of the row beyond {rule.limit} tokens; {rule.remedy}"
            )
        for segment, length in _sequences(mask):
            if not rule.is_long(length):
                raise ValueError(
                    f"branch_mask: segment {segment} ends a sequence of {length} positions beside one of {longest}; "
                    f"the model's {rule.rope_type} rotary embeddings would take the factors of the long one for both "
                    f"(they change beyond {rule.limit}). Pack them in separate rows; {rule.remedy}"
                )


def _sequences(mask: BranchMask) -> list[tuple[int, int]]:
    """(segment, positions) for each segment that no later one continues: one past the largest position it sees."""
    starts, ptr, positions = mask.starts.tolist(), mask.row_ptr.tolist(), mask.positions.cpu()
    cols, seen_by = mask.cols.tolist(), mask.col_ptr.tolist()
    found = []
    for segment in range(mask.num_segments):
        begin, end = starts[segment], starts[segment + 1]
        if end > mask.num_tokens - mask.num_copies:
            break  # copies of rows that are somewhere above
        if begin == end or seen_by[segment] < seen_by[segment + 1]:
            continue
        spans = [*cols[ptr[segment] : ptr[segment + 1]], [begin, end]]
        found.append((segment, 1 + max(int(positions[a:b].max()) for a, b in spans)))
    return found
