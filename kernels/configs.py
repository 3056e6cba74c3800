"""Launch configurations in a plain table: read here, chosen on the host, nothing tuned at run time.

An autotuner would have to run every candidate at every new shape: it stalls the first request, cannot run inside a
CUDA graph's capture, and picks differently from run to run, so results would too.

What the numbers aim at. Decoding reads K and V once: a multiprocessor needs some 30-60 KB on its way from memory all
the time (Little: 3-5 TB/s × ~0.7 µs over ~130 multiprocessors). A stage holds ``block_n · head_dim`` of K and of V,
``num_stages − 1`` stages are in flight per program, and two or three programs share a multiprocessor. Larger tiles of
packed rows are bound by arithmetic: more warps, fewer programs. ``python -m anabranch.kernels.report`` shows what the
compiler makes of each: registers, spills, shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import triton

__all__ = [
    "AMD",
    "BranchConfig",
    "Config",
    "attention_config",
    "branch_config",
    "column_split",
    "next_power_of_two",
]

# Stands for AMD's GPUs in place of a compute capability: 64 KB of shared memory a block.
AMD = 0

_TRITON = tuple(map(int, triton.__version__.split(".")[:2]))


@dataclass(frozen=True)
class Config:
    """One way to launch the attention kernel: an item of more than 16 packed rows gets the wide tile."""

    wide: int  # packed rows of the wide tile
    wide_n: int  # tokens a step of its main loop
    wide_stages: int  # blocks of K and V in shared memory, the one in use included
    narrow_n: int
    narrow_stages: int
    num_warps: int
    max_registers: int | None = None  # None: as many as the assembler finds best

    @property
    def options(self) -> dict[str, int]:
        """What Triton compiles with."""
        return _options(self.num_warps, self.max_registers)


def _options(num_warps: int, max_registers: int | None) -> dict[str, int]:
    given = dict(num_warps=num_warps)
    return given if max_registers is None else {**given, "maxnreg": max_registers}


def _with_stages(config: Config, most: int) -> Config:
    return replace(
        config, wide_stages=min(config.wide_stages, most), narrow_stages=min(config.narrow_stages, most)
    )  # fmt: skip


def next_power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def column_split(head_dim: int) -> tuple[int, int]:
    """Cuts ``head_dim`` columns into two powers of two (d0, d1), each at least 16; d1 = 0 when one is enough.

    80 → (64, 16), 96 → (64, 32), 192 → (128, 64), 128 → (128, 0). Columns past head_dim are padding: zeros. Up to 64
    padding is cheaper than the second part's addresses.
    """
    if head_dim <= 64:
        return max(16, next_power_of_two(head_dim)), 0
    d0 = 1 << (head_dim.bit_length() - 1)
    if head_dim == d0:
        return d0, 0
    d1 = max(16, next_power_of_two(head_dim - d0))
    return d0, d1


# (head_dim class, itemsize) -> Config, for 163 KB of shared memory and more. Classes 96 and 192 are head dims of two
# column parts: every part has its own addresses, so more warps or smaller blocks keep them in registers. With four
# warps two programs share a multiprocessor, with eight one has it alone: as many warps and as much on its way. The wide
# tile is 64 rows: 128 would need eight warps for every leaf, too.
_LARGE: dict[tuple[int, int], Config] = {
    (64, 2): Config(64, 64, 4, 64, 4, 4),
    (96, 2): Config(64, 32, 4, 32, 4, 8),
    (128, 2): Config(64, 64, 3, 64, 3, 4),
    (192, 2): Config(64, 32, 3, 32, 4, 8),
    (256, 2): Config(64, 32, 3, 32, 4, 8),
    # float32 runs on plain FMAs; a wider tile spills
    (64, 4): Config(32, 32, 3, 32, 3, 8),
    (96, 4): Config(32, 16, 3, 16, 3, 8),
    (128, 4): Config(32, 16, 3, 16, 3, 8),
    (192, 4): Config(32, 16, 3, 16, 3, 8),
    (256, 4): Config(32, 16, 3, 16, 3, 8),
    # Latents of MLA, of which 512 columns are V as well: one load serves both. Tiles of 64 rows spill.
    (576, 2): Config(32, 32, 3, 32, 3, 8),
    (576, 4): Config(16, 16, 2, 16, 2, 8),
}
# sm_80 multiplies out of registers (mma.sync) where later ones do out of shared memory: wide tiles take smaller blocks.
_SM80 = _LARGE | {
    (64, 2): Config(64, 32, 4, 64, 4, 4),
    (128, 2): Config(64, 32, 4, 64, 4, 8),
    (192, 2): Config(64, 16, 3, 32, 4, 8),
    (256, 2): Config(32, 32, 4, 32, 4, 8),
    (64, 4): Config(32, 32, 3, 32, 3, 4),
}
# On sm_90 three programs of head_dim 64 share a multiprocessor if each keeps to a third of its registers, which they do
# where scores are no more than a product; windows and softcaps would spill. At head_dim 128 these take registers and
# shared memory of their own: with larger blocks a program would have a multiprocessor alone.
_SM90 = _LARGE | {(64, 2): replace(_LARGE[64, 2], max_registers=168)}
_SM90_MORE = _LARGE | {(128, 2): Config(64, 32, 4, 64, 3, 4)}
# On sm_100 blocks of 64 tokens spill under these wide tiles.
_SM100 = _LARGE | {(64, 2): Config(64, 32, 4, 64, 4, 4)}
# Triton before 3.9 fails to compile tiles of 64 rows there (its pass over tensor memory, beside a second tile); with 32
# rows it multiplies out of registers, as on sm_80.
_SM100_BEFORE_3_9 = {key: replace(config, wide=min(config.wide, 32)) for key, config in _SM80.items()}
# sm_86, sm_89, sm_120: the same tiles with fewer stages, for 99 KB of shared memory.
_SMALL: dict[tuple[int, int], Config] = {key: _with_stages(c, 2 if key[1] == 4 else 3) for key, c in _SM80.items()}
_SMALL[576, 2] = Config(32, 16, 3, 16, 3, 8)


def attention_config(head_dim: int, itemsize: int, arch: int, plain: bool = True) -> Config:
    """The configuration for one kernel variant.

    Args:
        head_dim: 1 to 576, the larger of K's and V's.
        itemsize: bytes of an element of q, k and v: 2 or 4.
        arch: compute capability as an integer, 90 for sm_90; ``AMD`` for a GPU of theirs.
        plain: no window, no softcap, K and V in the type of q.
    """
    sm90 = _SM90 if plain else _SM90_MORE
    sm100 = _SM100 if _TRITON >= (3, 9) else _SM100_BEFORE_3_9
    table = _SM80 if arch == 80 else sm90 if arch == 90 else sm100 if 100 <= arch < 120 else _SMALL
    config = table[(_head_dim_class(head_dim), itemsize)]
    return _with_stages(config, 2) if arch == AMD else config


def _head_dim_class(head_dim: int) -> int:
    """64, 128 or 256; 96 and 192 stand for two column parts; 576 for all beyond."""
    if head_dim > 256:
        return 576
    d0, d1 = column_split(head_dim)
    widest = 256 if d0 + d1 > 128 else 128 if d0 + d1 > 64 else 64
    return {256: 192, 128: 96}[widest] if d1 else widest


@dataclass(frozen=True)
class BranchConfig:
    """One way to launch a kernel of branch attention."""

    block_m: int  # rows
    block_n: int  # columns
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # None: as many as the assembler finds best

    @property
    def options(self) -> dict[str, int]:
        """What Triton compiles with."""
        return dict(num_stages=self.num_stages) | _options(self.num_warps, self.max_registers)


# (kernel, head_dim class, itemsize) -> BranchConfig. A training step is bound by arithmetic: tiles as large as the
# registers allow. What a program keeps is its tile of accumulators (dkdv: two) and the other factors of its products;
# what goes by is `block_n` columns (dkdv: `block_m` rows). Left alone, the assembler spills a few bytes where that lets
# one more block onto a multiprocessor; the last number, where there is one, is the registers it may take instead.
_BRANCH: dict[tuple[str, int, int], BranchConfig] = {
    ("forward", 64, 2): BranchConfig(128, 64, 8, 3, 168),
    ("forward", 96, 2): BranchConfig(64, 32, 8, 2),
    ("forward", 128, 2): BranchConfig(64, 64, 8, 2),
    ("forward", 192, 2): BranchConfig(64, 32, 8, 2),
    ("forward", 256, 2): BranchConfig(64, 32, 8, 2),
    ("dq", 64, 2): BranchConfig(64, 64, 8, 2),
    ("dq", 96, 2): BranchConfig(64, 32, 8, 2),
    ("dq", 128, 2): BranchConfig(64, 32, 8, 2, 168),
    ("dq", 192, 2): BranchConfig(32, 32, 8, 2),
    ("dq", 256, 2): BranchConfig(32, 32, 8, 2),
    ("dkdv", 64, 2): BranchConfig(32, 64, 8, 2),
    ("dkdv", 96, 2): BranchConfig(32, 64, 8, 2, 255),
    ("dkdv", 128, 2): BranchConfig(32, 64, 8, 2),
    ("dkdv", 192, 2): BranchConfig(32, 32, 8, 2),
    ("dkdv", 256, 2): BranchConfig(32, 32, 8, 2),
    # float32 runs on plain FMAs, whose operands are registers.
    ("forward", 64, 4): BranchConfig(32, 32, 4, 2),
    ("forward", 96, 4): BranchConfig(32, 16, 8, 2, 255),
    ("forward", 128, 4): BranchConfig(32, 16, 8, 2, 128),
    ("forward", 192, 4): BranchConfig(16, 16, 8, 2),
    ("forward", 256, 4): BranchConfig(16, 16, 8, 2),
    ("dq", 64, 4): BranchConfig(16, 32, 8, 2, 128),
    ("dq", 96, 4): BranchConfig(16, 16, 8, 1, 255),
    ("dq", 128, 4): BranchConfig(16, 16, 8, 2),
    ("dq", 192, 4): BranchConfig(16, 16, 8, 1),
    ("dq", 256, 4): BranchConfig(16, 16, 8, 1),
    ("dkdv", 64, 4): BranchConfig(16, 16, 4, 2),
    ("dkdv", 96, 4): BranchConfig(16, 16, 8, 1, 255),
    ("dkdv", 128, 4): BranchConfig(16, 16, 8, 2),
    ("dkdv", 192, 4): BranchConfig(16, 16, 8, 1),
    ("dkdv", 256, 4): BranchConfig(16, 16, 8, 1),
}
# sm_80 to sm_89 run out of registers where later ones do not.
_BRANCH_SM80 = _BRANCH | {
    ("dkdv", 96, 2): BranchConfig(32, 32, 8, 2, 255),
    ("dkdv", 64, 4): BranchConfig(16, 16, 8, 2),
}

# On sm_100 one of more columns spills in its main loop.
_BRANCH_SM100 = _BRANCH | {("dkdv", 96, 2): BranchConfig(32, 32, 8, 2, 255)}


def branch_config(kernel: str, head_dim: int, itemsize: int, arch: int) -> BranchConfig:
    """The configuration for "forward", "dq" or "dkdv"; the other arguments as for `attention_config`."""
    table = _BRANCH_SM100 if 100 <= arch < 120 else _BRANCH if arch >= 90 else _BRANCH_SM80
    config = table[(kernel, _head_dim_class(head_dim), itemsize)]
    if arch == AMD:
        return replace(config, num_stages=min(config.num_stages, 2), max_registers=None)  # NVIDIA's option
    return config
