"""What a `TreeCache` made for a model is held to, so that a wrong forward is noticed before its numbers are used.

`TreeCache.for_model` gives its cache a `ModelWatch`, which the cache tells of every change of its tree. It raises,
before anything changes, when

* the model no longer uses ``attn_implementation="anabranch"`` (its layers would not see the tree),
* a branch goes on from rows whose keys and values no layer wrote (the forward did not reach the cache, or not in every
  layer),
* a step would rotate a branch's rows, or its cached keys, as its own sequence alone would not be (hf/rope.py).

Caches made by hand (``TreeCache(num_layers=…)``) have none: their owner writes what and when it likes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from anabranch.kv.step import Branch, Step, StepPlan
from anabranch.kv.watch import Watch

if TYPE_CHECKING:
    from anabranch.hf.probe import ModelShape


class _Unwritten:
    """A step that some layer has not written: where its rows begin in each branch that still holds them."""

    def __init__(self, plan: StepPlan, starts: dict[Branch, int]) -> None:
        self.plan, self.starts = plan, starts


class ModelWatch(Watch):
    """Checks each change of a cache's tree against the model that the cache was made for.

    config: the decoder's configuration, where its attention layers read which implementation they use.
    """

    def __init__(self, name: str, config: Any, shape: ModelShape) -> None:
        self.shape = shape
        self._name, self._config, self._rules = name, config, shape.rope_rules
        self._last: Step | None = None
        self._unwritten: list[_Unwritten] = []
        # Of each branch that holds tokens, a rule each: whether its keys were rotated as those of a long sequence.
        self._rotated: dict[Branch, tuple[bool, ...]] = {}

    def check_step(self, rows: Mapping[Branch, int], positions: Mapping[Branch, Any]) -> None:
        """Raises ValueError if these rows could not be computed as they should; ``positions``: NumPy arrays."""
        used = self._config._attn_implementation
        if used != "anabranch":
            raise ValueError(
                f"model: {self._name} uses attn_implementation={used!r} now, which does not see the tree of this "
                "cache; call anabranch.hf.enable(model) (from_pretrained and set_attn_implementation change it)"
            )
        self._require_written(rows)
        if self._rules:
            self._require_same_rotation(rows, positions)

    def check_join(self, trunk: Branch, kids: Sequence[Branch]) -> None:
        """Raises ValueError if the joined context could not be used."""
        branches = [trunk, *kids]
        self._require_written(branches)
        if len({self._rotated[b] for b in branches if b in self._rotated}) > 1:
            raise ValueError(
                f"kids: their keys and the trunk's were rotated with different {self._rules[0].rope_type} factors, so "
                f"no one context can hold them; {self._rules[0].remedy}"
            )

    # ------------------------------------------------------------------------------------------------ changes

    def stepped(self, step: Step) -> None:
        self._last = step
        if self._rules:
            longest = int(step.plan.host_rows()[0].max()) + 1
            self._rotated.update(dict.fromkeys(step.branches, tuple(rule.is_long(longest) for rule in self._rules)))

    def forked(self, branch: Branch, kids: Sequence[Branch]) -> None:
        for open_step in self._open_steps():
            if branch in open_step.starts:
                open_step.starts.update(dict.fromkeys(kids, open_step.starts[branch]))
        if branch in self._rotated:
            self._rotated.update(dict.fromkeys(kids, self._rotated[branch]))

    def joined(self, trunk: Branch, kids: Sequence[Branch]) -> None:
        for kid in kids:
            rotated = self._rotated.pop(kid, None)
            if rotated is not None:
                self._rotated[trunk] = rotated

    def shared(self, branch: Branch, sibling: Branch) -> None:
        if sibling in self._rotated:
            self._rotated[branch] = self._rotated[sibling]

    def truncating(self, branch: Branch, length: int) -> None:
        for open_step in self._open_steps():
            if 0 <= length <= open_step.starts.get(branch, -1):
                del open_step.starts[branch]
        if length == 0:
            self._rotated.pop(branch, None)

    def ending(self, branch: Branch) -> None:
        for open_step in self._open_steps():
            open_step.starts.pop(branch, None)
        self._rotated.pop(branch, None)

    # ------------------------------------------------------------------------------------------------ inside

    def _open_steps(self) -> list[_Unwritten]:
        """The steps that some layer has still to write."""
        if self._last is not None:
            step, self._last = self._last, None
            if step.plan.unwritten():
                # Nothing has changed in the tree since this step: a branch's last rows are its rows.
                starts = {b: b.length - (part.stop - part.start) for b, part in step.rows.items() if b.alive}
                self._unwritten.append(_Unwritten(step.plan, starts))
        if self._unwritten:
            self._unwritten = [s for s in self._unwritten if s.starts and s.plan.unwritten()]
        return self._unwritten

    def _require_written(self, branches: Iterable[Branch]) -> None:
        steps = self._open_steps()
        if not steps:
            return
        for branch in branches:
            for open_step in steps:
                if branch in open_step.starts:
                    start, missing = open_step.starts[branch], open_step.plan.unwritten()
                    where = "all layers"
                    if len(missing) < self.shape.num_layers:
                        where = f"layer {missing[0]} ({len(missing)} of {self.shape.num_layers} layers)"
                    raise ValueError(
                        f"step: {branch!r} has tokens from index {start} on whose keys and values are missing in "
                        f"{where}; run the model with the tree_step that reserved them (all its attention layers must "
                        f'use "anabranch": hf.enable(model)), or give them up: cache.truncate(branch, {start})'
                    )

    def _require_same_rotation(self, rows: Mapping[Branch, int], positions: Mapping[Branch, Any]) -> None:
        ends = _ends(rows, positions)
        longest = max(ends.values(), default=0)
        for i, rule in enumerate(self._rules):
            long = rule.is_long(longest)
            if long and not rule.beyond:
                raise ValueError(
                    f"rows: a branch would reach {longest} tokens, but the model's {rule.rope_type} rotary embeddings "
                    f"depend on the longest sequence of the forward beyond {rule.limit}; {rule.remedy}"
                )
            for branch, end in ends.items():
                own = max(end, branch.position)
                if rule.is_long(own) != long:
                    raise ValueError(
                        f"rows: {branch!r} reaches {own} tokens, another branch of this step {longest}; the model's "
                        f"{rule.rope_type} rotary embeddings would take the factors of the long one for both (they "
                        f"change beyond {rule.limit}). Run them in separate steps; {rule.remedy}"
                    )
                if branch in self._rotated and self._rotated[branch][i] != long:
                    before, now = ("short", "long") if long else ("long", "short")
                    raise ValueError(
                        f"rows: {branch!r} reaches {own} tokens, so the model's {rule.rope_type} rotary embeddings "
                        f"take the {now} factors (they change beyond {rule.limit}), but its cached keys were rotated "
                        f"with the {before} ones; {rule.remedy}"
                    )


def _ends(rows: Mapping[Branch, int], positions: Mapping[Branch, Any]) -> dict[Branch, int]:
    """One past the largest position of each branch's new rows."""
    return {
        branch: int(positions[branch].max()) + 1 if branch in positions else branch.position + count
        for branch, count in rows.items()
    }
