"""Every kernel variant that a launch can ask for, compiled for a GPU that need not be there.

``compile_variant`` runs Triton's whole pipeline down to the cubin and reads from it what the kernel will cost:
registers, stack (that is spills: no kernel here has local arrays), shared memory, and which tensor-core instruction
the dots became. It needs NVIDIA's assembler, which Triton's x86-64 Linux wheels bring, and a process in which Triton
was imported without TRITON_INTERPRET.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import launch
from .attention import OTHERS, PLAN_ARRAYS, tree_attention_kernel
from .branch import INDEX_ARRAYS, ROW_ARRAYS, branch_dkdv_kernel, branch_dq_kernel, branch_forward_kernel
from .configs import attention_config, branch_config, column_split, max_block_m, next_power_of_two
from .merge import merge_kernel
from .pages import copy_pages_kernel, write_kv_kernel

__all__ = [
    "ARCHS",
    "SHARED_LIMIT",
    "Variant",
    "all_variants",
    "branch_variants",
    "compile_variant",
    "launched_as",
    "missing_tools",
    "representative_variants",
    "why_not",
]

ARCHS = (80, 90, 100)
HEAD_DIMS = (32, 64, 80, 96, 128, 192, 256)
BRANCH_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 192, 256)  # 112: two parts of 64, the widest of its class
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
# What the shared memory of one block may be, in bytes (CUDA C++ Programming Guide, technical specifications).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_CORES = {"mma.sync": "mma.sync", "wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma"}


@dataclass(frozen=True)
class Variant:
    """One compiled form of one kernel."""

    kernel: str  # "attention", "merge", "write_kv", "copy_pages", "branch_forward", "branch_dq" or "branch_dkdv"
    arch: int
    dtype: str
    head_dim: int
    block_m: int = 0  # attention only
    options: bool = False  # attention, branch_…: softcap, window, sinks, device counts on; merge: sinks and counts on

    def __str__(self) -> str:
        parts = [self.kernel, f"sm{self.arch}", self.dtype, f"d{self.head_dim}"]
        return "-".join(parts + [f"m{self.block_m}"] * bool(self.block_m) + ["options"] * self.options)


def missing_tools() -> str | None:
    """Which of NVIDIA's tools this Triton lacks, as a sentence; None when it has what compiling takes."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    missing = [tool for tool in ("ptxas", "cuobjdump") if not os.access(folder / tool, os.X_OK)]
    return f"this Triton ({triton.__version__}) brings no {' and no '.join(missing)}" if missing else None


def why_not() -> str | None:
    """Why nothing can be compiled here; None when it can."""
    if launch.INTERPRETED:
        return "Triton was imported with TRITON_INTERPRET set; compile in a process without it"
    return missing_tools()


def all_variants(arch: int) -> list[Variant]:
    """What a launch can ask for on one architecture, at the head dims in use."""
    found = []
    for dtype, itemsize in DTYPES.items():
        # float16 is bfloat16 with another instruction name: two head dims of it are enough to see that.
        for head_dim in (64, 128) if dtype == "fp16" else HEAD_DIMS:
            block_m = 16
            while block_m <= max_block_m(head_dim, itemsize, arch):
                found += [Variant("attention", arch, dtype, head_dim, block_m, options) for options in (False, True)]
                block_m *= 2
    for head_dim in (64, 80, 128, 256):
        found += [Variant("merge", arch, "bf16", head_dim, options=options) for options in (False, True)]
        found += [Variant("write_kv", arch, "bf16", head_dim), Variant("copy_pages", arch, "bf16", head_dim)]
    return found + branch_variants(arch)


def branch_variants(arch: int) -> list[Variant]:
    """The three kernels of branch attention, every dtype and head dim, with and without the options."""
    return [
        Variant(f"branch_{kernel}", arch, dtype, head_dim, options=options)
        for kernel in BRANCH
        for dtype in DTYPES
        for head_dim in ((64, 128) if dtype == "fp16" else BRANCH_HEAD_DIMS)
        for options in (False, True)
    ]


def representative_variants(arch: int) -> list[Variant]:
    """A dozen of them, for the tests: each tile, one and two column parts, 16 and 32 bits, each kernel."""
    return [
        Variant("attention", arch, "bf16", 128, 16, True),
        Variant("attention", arch, "fp16", 64, 32),
        Variant("attention", arch, "bf16", 80, 64, True),
        Variant("attention", arch, "bf16", 96 if arch < 90 else 128, 128),
        Variant("attention", arch, "fp32", 96, 16),
        Variant("merge", arch, "bf16", 128, options=True),
        Variant("write_kv", arch, "bf16", 128),
        Variant("copy_pages", arch, "bf16", 80),
        Variant("branch_forward", arch, "bf16", 128, options=True),
        Variant("branch_dq", arch, "bf16", 80, options=True),
        Variant("branch_dkdv", arch, "bf16", 128, options=True),
        Variant("branch_dkdv", arch, "fp32", 64),
    ]


def _attention(v: Variant) -> tuple[Any, dict[str, Any], dict[str, int]]:
    d0, d1 = column_split(v.head_dim)
    config = attention_config(v.head_dim, DTYPES[v.dtype], v.block_m, v.arch)
    constants = dict(
        GROUP=4, HEAD_DIM=v.head_dim, D0=d0, D1=d1, PAGE_SIZE=16, BLOCK_M=v.block_m, BLOCK_N=config.block_n,
        HAS_SOFTCAP=v.options, HAS_WINDOW=v.options, HAS_SINKS=v.options, HAS_COUNTS=v.options, UPCAST=False,
    )  # fmt: skip
    return tree_attention_kernel, constants, dict(num_warps=config.num_warps, num_stages=config.num_stages)


def _merge(v: Variant) -> tuple[Any, dict[str, Any], dict[str, int]]:
    constants = dict(
        HEAD_DIM=v.head_dim, BLOCK_D=next_power_of_two(v.head_dim), BLOCK_P=launch.MERGE_BLOCK,
        HAS_SINKS=v.options, HAS_COUNTS=v.options,
    )  # fmt: skip
    return merge_kernel, constants, dict(num_warps=4, num_stages=2)


def _write_kv(v: Variant) -> tuple[Any, dict[str, Any], dict[str, int]]:
    block_d = next_power_of_two(v.head_dim)
    block_h = min(8, max(1, 1024 // block_d))
    return write_kv_kernel, dict(PAGE_SIZE=16, HEAD_DIM=v.head_dim, BLOCK_D=block_d, BLOCK_H=block_h), dict(num_warps=4)


def _copy_pages(v: Variant) -> tuple[Any, dict[str, Any], dict[str, int]]:
    block_d = next_power_of_two(v.head_dim)
    block_t = min(16, max(1, 2048 // block_d))
    return copy_pages_kernel, dict(HEAD_DIM=v.head_dim, BLOCK_T=block_t, BLOCK_D=block_d), dict(num_warps=4)


BRANCH = {"forward": branch_forward_kernel, "dq": branch_dq_kernel, "dkdv": branch_dkdv_kernel}


def _branch(v: Variant) -> tuple[Any, dict[str, Any], dict[str, int]]:
    name = v.kernel.removeprefix("branch_")
    d0, d1 = column_split(v.head_dim)
    config = branch_config(name, v.head_dim, DTYPES[v.dtype], v.arch)
    constants = dict(
        HEAD_DIM=v.head_dim, D0=d0, D1=d1, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        HAS_SOFTCAP=v.options, HAS_WINDOW=v.options, UPCAST=False,
    )  # fmt: skip
    if name == "forward":
        constants["HAS_SINKS"] = v.options
    return BRANCH[name], constants, config.options


BUILDERS = {
    "attention": _attention,
    "merge": _merge,
    "write_kv": _write_kv,
    "copy_pages": _copy_pages,
    **{f"branch_{name}": _branch for name in BRANCH},
}
# Index arrays are int32, partials and LSE float32, all else is of the variant's dtype.
INT_POINTERS = {*PLAN_ARRAYS, *INDEX_ARRAYS, "counts_ptr", "merge_rows_ptr", "merge_ptr_ptr", "slots_ptr", "copies_ptr"}
FLOAT_POINTERS = {"lse_ptr", "delta_ptr", "part_acc_ptr", "part_ml_ptr"}


def _signature(kernel: Any, constants: dict[str, Any], dtype: str) -> tuple[dict[str, str], dict[tuple[int], Any]]:
    """Argument types, and which arguments a launch finds divisible by 16 (data pointers and strides)."""
    signature, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            element = "i32" if name in INT_POINTERS else "fp32" if name in FLOAT_POINTERS else dtype
            signature[name] = "*" + element
            if name not in {
                *PLAN_ARRAYS,
                *OTHERS,
                *INDEX_ARRAYS,
                *ROW_ARRAYS,
                "merge_rows_ptr",
                "merge_ptr_ptr",
                "slots_ptr",
            }:
                aligned[(i,)] = [["tt.divisibility", 16]]
        elif name in ("scale", "softcap"):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if name.startswith("stride_"):
                aligned[(i,)] = [["tt.divisibility", 16]]
    return signature, aligned


def launched_as(variant: Variant) -> dict[str, int]:
    """The configuration that a launch of this variant takes from the table: nothing is compiled.

    Returns:
        ``tile_m`` rows and ``block_n`` columns of a block (0: a kernel without), ``num_warps``, ``num_stages`` and
        ``max_registers`` (0: the assembler's choice).
    """
    _, constants, options = BUILDERS[variant.kernel](variant)
    return {
        **_chosen(constants, options),
        "num_warps": options["num_warps"],
        "num_stages": options.get("num_stages", 0),
    }


def compile_variant(variant: Variant) -> dict[str, Any]:
    """Compiles one variant to a cubin and returns what it takes.

    Returns:
        the variant's fields and: ``registers`` a thread, ``spill_bytes`` a thread, ``shared_bytes`` a block,
        ``num_warps``, ``num_stages``, ``max_registers`` (0: the assembler's choice),
        ``tile_m`` and ``block_n`` (attention and branch kernels; else 0),
        ``tensor_cores`` (instruction kinds in the PTX, sorted) and ``cubin_bytes``.

    Raises:
        RuntimeError: nothing can be compiled here (``why_not`` tells why).
    """
    reason = why_not()
    if reason is not None:
        raise RuntimeError(reason)
    kernel, constants, options = BUILDERS[variant.kernel](variant)
    signature, aligned = _signature(kernel, constants, variant.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Triton 3.9 announces a default of 3.10
        compiled = triton.compile(
            ASTSource(kernel, signature, constants, aligned),
            target=GPUTarget("cuda", variant.arch, 32),
            options=options,
        )
    ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
    return {
        **asdict(variant),
        **_resources(cubin),
        "shared_bytes": compiled.metadata.shared,
        "num_warps": compiled.metadata.num_warps,
        "num_stages": compiled.metadata.num_stages,
        **_chosen(constants, options),
        "tensor_cores": sorted(name for name, instruction in TENSOR_CORES.items() if instruction in ptx),
        "cubin_bytes": len(cubin),
    }


def _chosen(constants: dict[str, Any], options: dict[str, int]) -> dict[str, int]:
    return {
        "max_registers": options.get("maxnreg", 0),
        "tile_m": constants.get("BLOCK_M", 0),
        "block_n": constants.get("BLOCK_N", 0),
    }


def _resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run([tool, "-res-usage", path], check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage printed nothing to read: {text!r}")
    registers, stack, local = map(int, found.groups())
    return {"registers": registers, "spill_bytes": stack + local}
