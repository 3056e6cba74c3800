"""How a backend wants its work cut into items."""

from __future__ import annotations

from dataclasses import dataclass

from anabranch import _core


@dataclass(frozen=True)
class TileConfig:
    """How a backend wants its work cut.

    Attributes:
        tile: packed query vectors (rows × group) an item, at most (one row when the group is larger).
        chunk: grain of token ranges, in tokens.
        parallelism: items × KV heads that a run of tokens should be split into at least.
        num_kv_heads: KV heads, which multiply the items.
        elem_size: bytes of one KV element, for the absorb rule.
        narrow: items of at most this many packed query vectors come after all wider ones (0: no such parting).
        fixed: token ranges end at multiples of `chunk` of each row's own context, so that how a row's result is summed
            up depends on that context alone, not on the rows beside it. `parallelism` has no say then.
        subtree: packed query vectors of an item that holds a whole subtree, at most; 0: there are to be no such items.
        parts: of such an item, at most; 0: any number.
    """

    tile: int
    chunk: int
    parallelism: int
    num_kv_heads: int = 8
    elem_size: int = 2
    narrow: int = 0
    fixed: bool = False
    subtree: int = 0
    parts: int = 0

    def __post_init__(self) -> None:
        # Plans are looked up by it several times a step: hashing its fields each time would cost a third of a step.
        fields = (self.tile, self.chunk, self.parallelism, self.num_kv_heads, self.elem_size, self.narrow, self.fixed,
                  self.subtree, self.parts)  # fmt: skip
        object.__setattr__(self, "_hash", hash(fields))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined, no-any-return]


def core_params(group: int, tile_config: TileConfig) -> _core.PlanParams:
    """The C++ planner's parameters for ``group`` query heads a KV head."""
    p = tile_config
    return _core.PlanParams(
        group, p.tile, p.chunk, p.parallelism, p.num_kv_heads, p.elem_size, p.narrow, p.fixed, p.subtree, p.parts
    )
