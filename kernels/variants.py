"""Every kernel variant that a launch can ask for, compiled for a GPU that need not be there.

``compile_variant`` runs Triton's whole pipeline down to the cubin and reads from it what the kernel will cost:
registers, stack (that is spills: no kernel here has local arrays), shared memory, which tensor-core instruction the
dots became and how many bytes an asynchronous copy moves. It needs NVIDIA's assembler, which Triton's x86-64 Linux
wheels bring (AMD's is part of Triton), and a process in which Triton was imported without TRITON_INTERPRET.
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

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import launch
from .attention import OTHERS, PLAN_ARRAYS, tree_attention_kernel
from .branch import INDEX_ARRAYS, ROW_ARRAYS, branch_forward_kernel
from .branch_backward import branch_dkdv_kernel, branch_dq_kernel
from .configs import AMD, attention_config, branch_config, column_split, next_power_of_two
from .merge import merge_kernel
from .pages import copy_pages_kernel, write_kv_kernel
from .quantise import quantise_kv_kernel

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

# Every variant is in the table for the first three, a sample for the others (``sampled_variants``): consumer GPUs run
# the code of sm_80 in less shared memory, and AMD's, compiled here, are for nobody to time here.
COMPLETE = (80, 90, 100)
ARCHS = (*COMPLETE, 86, 89, 120, "gfx942", "gfx950")
HEAD_DIMS = (32, 40, 64, 72, 80, 96, 128, 192, 256)  # 40 and 72: no multiples of 16
SPLIT_HEAD_DIMS = ((192, 128), (576, 512))  # of K and V: DeepSeek's models, expanded and as latents
BRANCH_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 192, 256)  # 112: two parts of 64, the widest of its class
FP32_HEAD_DIMS = (64, 96, 128, 192, 256)  # one of each class (configs.py)
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
# What the shared memory of one block may be, in bytes (CUDA C++ Programming Guide, technical specifications; AMD's
# CDNA3 and CDNA4 ISA references: LDS).
SHARED_LIMIT = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
    "gfx942": 64 * 1024,
    "gfx950": 160 * 1024,
}
TENSOR_CORES = {
    "mma.sync": "mma.sync",
    "wgmma": "wgmma.mma_async",
    "tcgen05": "tcgen05.mma",
    "mfma": "v_mfma_f32",
    "tf32": ".tf32",
}
# What an asynchronous copy and a load of global memory look like in PTX.
COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global[^;]*\], (0x[0-9a-f]+|\d+)")
LOAD = re.compile(r"ld\.global(?:\.\w+)*?(?:\.v(\d))?\.[bfsu](\d+) ")


@dataclass(frozen=True)
class Variant:
    """One compiled form of one kernel."""

    kernel: str  # "attention", "merge", "write_kv", "copy_pages", "branch_forward", "branch_dq" or "branch_dkdv"
    arch: int | str  # 90 = sm_90; "gfx942"
    dtype: str
    head_dim: int
    options: bool = False  # attention, branch_…: softcap, window, sinks, device counts on; merge: sinks and counts on
    kept: str = ""  # attention, write_kv, copy_pages: "int8" or "fp8" pages; else K and V as they are
    v_head_dim: int = 0  # of V, where it is another; beside a head_dim above 256 V is a part of K (latents of MLA)

    def __str__(self) -> str:
        arch = self.arch if isinstance(self.arch, str) else f"sm{self.arch}"
        return "-".join(
            [self.kernel, arch, self.dtype, f"d{self.head_dim}" + f".{self.v_head_dim}" * bool(self.v_head_dim)]
            + ["options"] * self.options
            + [self.kept] * bool(self.kept)
        )

    @property
    def v_dim(self) -> int:
        return self.v_head_dim or self.head_dim

    @property
    def widest(self) -> int:
        return max(self.head_dim, self.v_dim)

    @property
    def latent(self) -> bool:
        return self.head_dim > 256

    @property
    def capability(self) -> int:
        """The architecture as configs.py takes it."""
        return AMD if isinstance(self.arch, str) else self.arch


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


def all_variants(arch: int | str) -> list[Variant]:
    """What is in the table for one architecture."""
    return complete_variants(arch) if arch in COMPLETE else sampled_variants(arch)


def complete_variants(arch: int | str) -> list[Variant]:
    """Every head dim in use and every class of them in float32, with all options on: these take the most. A few plain
    ones beside them, and of float16, which is bfloat16 with another instruction name."""
    found = [Variant("attention", arch, "bf16", head_dim, True) for head_dim in HEAD_DIMS]
    found += [Variant("attention", arch, "bf16", head_dim) for head_dim in (64, 128)]
    found += [Variant("attention", arch, "fp16", 128, True)]
    found += [Variant("attention", arch, "fp32", head_dim, True) for head_dim in FP32_HEAD_DIMS]
    found += split_variants(arch)
    for head_dim in (72, 128):
        found += [Variant("merge", arch, "bf16", head_dim, True)]
        found += [Variant(name, arch, "bf16", head_dim) for name in ("write_kv", "copy_pages")]
    return found + branch_variants(arch)


def split_variants(arch: int | str) -> list[Variant]:
    """Head dims of K and V that differ."""
    return [Variant("attention", arch, "bf16", k, True, v_head_dim=v) for k, v in SPLIT_HEAD_DIMS]


def branch_variants(arch: int | str) -> list[Variant]:
    """The same choice of the three kernels of branch attention."""
    found = []
    for kernel in (f"branch_{name}" for name in BRANCH):
        found += [Variant(kernel, arch, "bf16", head_dim, True) for head_dim in BRANCH_HEAD_DIMS]
        found += [Variant(kernel, arch, "bf16", 128), Variant(kernel, arch, "fp16", 128, True)]
        found += [Variant(kernel, arch, "bf16", 192, True, v_head_dim=128)]
        found += [Variant(kernel, arch, "fp32", head_dim, True) for head_dim in FP32_HEAD_DIMS]
    return found


def sampled_variants(arch: int | str) -> list[Variant]:
    """A sample: every kernel but those without arithmetic, in bfloat16."""
    found = [Variant("attention", arch, "bf16", head_dim, True) for head_dim in (64, 72, 128, 256)]
    found += [Variant("attention", arch, "fp32", 128, True), *split_variants(arch)]
    return found + [Variant(f"branch_{kernel}", arch, "bf16", 128, True) for kernel in BRANCH]


def representative_variants(arch: int | str) -> list[Variant]:
    """A few of them, for the tests: one and two column parts, 16 and 32 bits, padded head dims, each kernel."""
    found = [
        Variant("attention", arch, "bf16", 128, True),
        Variant("branch_forward", arch, "bf16", 128, True),
    ]
    if arch in COMPLETE:
        found += [
            Variant("attention", arch, "bf16", 72, True),
            Variant("attention", arch, "fp32", 96, True),
            Variant("write_kv", arch, "bf16", 72),
            Variant("merge", arch, "bf16", 128, True),
            Variant("copy_pages", arch, "bf16", 72),
            Variant("branch_dq", arch, "bf16", 80, True),
            Variant("branch_dkdv", arch, "bf16", 128, True),
        ]
    if arch == 80:  # (the largest: one is enough)
        found += [Variant("attention", arch, "bf16", 576, True, v_head_dim=512)]
    return found


def _alignment(head_dim: int) -> int:
    """What a launch finds out of a contiguous tensor's strides."""
    return launch.stride_alignment(torch.empty((4, 4, head_dim), device="meta"))


def _attention(v: Variant) -> tuple[Any, dict[str, Any], dict[str, int]]:
    (d0, d1), (v0, v1) = column_split(v.head_dim), column_split(v.v_dim)
    plain = not v.options and KEPT[v.kept] == 0
    config = attention_config(v.widest, DTYPES[v.dtype], v.capability, plain)
    constants = dict(
        GROUP=4, HEAD_DIM=v.head_dim, D0=d0, D1=d1, V_DIM=v.v_dim, V0=v0, V1=v1, V_IN_K=v.latent and v.v_dim == d0,
        PAGE_SIZE=16, STRIP_SHIFT=4,
        Q_ALIGN=_alignment(v.head_dim), KV_ALIGN=min(_alignment(v.head_dim), _alignment(v.v_dim)),
        WIDE=config.wide, WIDE_N=config.wide_n, WIDE_STAGES=config.wide_stages,
        NARROW_N=config.narrow_n, NARROW_STAGES=config.narrow_stages,
        HAS_SOFTCAP=v.options, HAS_WINDOW=v.options, HAS_SINKS=v.options, HAS_COUNTS=v.options, UPCAST=False,
        STORED=KEPT[v.kept], PARTS=0,
    )  # fmt: skip
    return tree_attention_kernel, constants, config.options


def _merge(v: Variant) -> tuple[Any, dict[str, Any], dict[str, int]]:
    constants = dict(
        HEAD_DIM=v.v_dim, BLOCK_D=next_power_of_two(v.v_dim), BLOCK_P=launch.MERGE_BLOCK,
        HAS_SINKS=v.options, HAS_COUNTS=v.options,
    )  # fmt: skip
    return merge_kernel, constants, dict(num_warps=4, num_stages=2)


def _write_kv(v: Variant) -> tuple[Any, dict[str, Any], dict[str, int]]:
    v_dim = 0 if v.latent else v.v_dim
    block_d, block_v = next_power_of_two(v.head_dim), next_power_of_two(v_dim or v.head_dim)
    block_h = min(8, max(1, 1024 // max(block_d, block_v)))
    if v.kept:
        constants = dict(
            LARGEST=dict(launch.STORED.values())[KEPT[v.kept]], STORED=KEPT[v.kept], PAGE_SIZE=16, HEAD_DIM=v.head_dim,
            V_DIM=v_dim, BLOCK_D=block_d, BLOCK_V=block_v, BLOCK_H=block_h,
        )  # fmt: skip
        return quantise_kv_kernel, constants, dict(num_warps=4)
    constants = dict(
        PAGE_SIZE=16, HEAD_DIM=v.head_dim, V_DIM=v_dim, ALIGN=min(_alignment(v.head_dim), _alignment(v.v_dim)),
        BLOCK_D=block_d, BLOCK_V=block_v, BLOCK_H=block_h,
    )  # fmt: skip
    return write_kv_kernel, constants, dict(num_warps=4)


def _copy_pages(v: Variant) -> tuple[Any, dict[str, Any], dict[str, int]]:
    block_d = next_power_of_two(v.head_dim)
    block_t = min(16, max(1, 2048 // block_d))
    constants = dict(
        HEAD_DIM=v.head_dim, ALIGN=_alignment(v.head_dim), HAS_SCALES=bool(v.kept), BLOCK_T=block_t, BLOCK_D=block_d
    )  # fmt: skip
    return copy_pages_kernel, constants, dict(num_warps=4)


BRANCH = {"forward": branch_forward_kernel, "dq": branch_dq_kernel, "dkdv": branch_dkdv_kernel}


def _branch(v: Variant) -> tuple[Any, dict[str, Any], dict[str, int]]:
    name = v.kernel.removeprefix("branch_")
    (d0, d1), (v0, v1) = column_split(v.head_dim), column_split(v.v_dim)
    config = branch_config(name, v.widest, DTYPES[v.dtype], v.capability)
    constants = dict(
        HEAD_DIM=v.head_dim, D0=d0, D1=d1, V_DIM=v.v_dim, V0=v0, V1=v1,
        ALIGN=min(_alignment(v.head_dim), _alignment(v.v_dim)), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
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
FLOAT_POINTERS = {
    "lse_ptr", "delta_ptr", "part_acc_ptr", "part_ml_ptr", "k_scales_ptr", "v_scales_ptr", "scales_ptr",
}  # fmt: skip


# How the kernels call what is in the pages (quantise.py), and the pointers to it.
KEPT = {"": 0, "int8": 1, "fp8": 2}
PAGE_POINTERS = {"k_pages_ptr", "v_pages_ptr", "pool_ptr"}


def _signature(
    kernel: Any, constants: dict[str, Any], dtype: str, kept: str = ""
) -> tuple[dict[str, str], dict[tuple[int], Any]]:
    """Argument types, and which arguments a launch finds divisible by 16: data pointers. (Of strides and counts it is
    not asked: the kernels take none of them specialised.)"""
    signature, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            element = "i32" if name in INT_POINTERS else "fp32" if name in FLOAT_POINTERS else dtype
            if kept and (name in PAGE_POINTERS or (name in ("k_ptr", "v_ptr") and kernel is tree_attention_kernel)):
                element = {"int8": "i8", "fp8": "u8"}[kept]
            signature[name] = "*" + element
            if name not in {
                *PLAN_ARRAYS,
                *OTHERS,
                *INDEX_ARRAYS,
                *ROW_ARRAYS,
                "merge_rows_ptr",
                "merge_ptr_ptr",
                "slots_ptr",
                "scales_ptr",
            }:
                aligned[(i,)] = [["tt.divisibility", 16]]
        elif name in ("scale", "softcap"):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
    return signature, aligned


def launched_as(variant: Variant) -> dict[str, int]:
    """The configuration that a launch of this variant takes from the table: nothing is compiled.

    Returns:
        ``tile`` (rows × columns × stages of each tile, as text; empty: a kernel without), ``num_warps`` and
        ``max_registers`` (0: the assembler's choice).
    """
    _, constants, options = BUILDERS[variant.kernel](variant)
    return _chosen(constants, options)


def compile_variant(variant: Variant) -> dict[str, Any]:
    """Compiles one variant to a cubin and returns what it takes.

    Returns:
        the variant's fields, those of ``launched_as`` and: ``registers`` a thread, ``spill_bytes`` a thread,
        ``loop_spills`` (``main_loop_spills``), ``shared_bytes`` a block, ``tensor_cores`` (instruction kinds, sorted),
        ``copy_bytes`` (the most that an asynchronous copy moves, that is one of K and V; 0: there is none),
        ``load_bytes`` (the most that a load of global memory does) and ``code_bytes``. Nobody reads AMD's loops, copies
        and loads: 0.

    Raises:
        RuntimeError: nothing can be compiled here (``why_not`` tells why).
    """
    reason = why_not()
    if reason is not None:
        raise RuntimeError(reason)
    kernel, constants, options = BUILDERS[variant.kernel](variant)
    signature, aligned = _signature(kernel, constants, variant.dtype, variant.kept)
    amd = isinstance(variant.arch, str)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Triton 3.9 announces a default of 3.10
        compiled = triton.compile(
            ASTSource(kernel, signature, constants, aligned),
            target=GPUTarget("hip", variant.arch, 64) if amd else GPUTarget("cuda", variant.arch, 32),
            options=options,
        )
    text, code = (compiled.asm[name] for name in (("amdgcn", "hsaco") if amd else ("ptx", "cubin")))
    copies = [int(size, 0) for size in COPY.findall(text)]
    loads = [int(count or 1) * int(bits) // 8 for count, bits in LOAD.findall(text)]
    return {
        **asdict(variant),
        **(_amd_resources(text) if amd else _resources(code)),
        "shared_bytes": compiled.metadata.shared,
        **_chosen(constants, options),
        "tensor_cores": sorted(name for name, instruction in TENSOR_CORES.items() if instruction in text),
        "copy_bytes": max(copies, default=0),
        "load_bytes": max(loads, default=0),
        "code_bytes": len(code),
    }


def _chosen(constants: dict[str, Any], options: dict[str, int]) -> dict[str, Any]:
    tile = ""
    if "WIDE" in constants:
        tile = "16 × {NARROW_N} × {NARROW_STAGES}, {WIDE} × {WIDE_N} × {WIDE_STAGES}".format(**constants)
    elif "BLOCK_M" in constants:
        tile = "{BLOCK_M} × {BLOCK_N} × {num_stages}".format(**constants, **options)
    return {"tile": tile, "num_warps": options["num_warps"], "max_registers": options.get("maxnreg", 0)}


def _amd_resources(text: str) -> dict[str, int]:
    """From the assembly's own account; vector registers, and spills to memory."""

    def value(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        if found is None:
            raise RuntimeError(f"the assembly says nothing of {name}")
        return int(found.group(1))

    return {"registers": value("vgpr_count"), "spill_bytes": value("private_segment_fixed_size"), "loop_spills": 0}


def _resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, code = (
            subprocess.run([tool, option, path], check=True, capture_output=True, text=True).stdout
            for option in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage printed nothing to read: {usage!r}")
    registers, stack, local = map(int, found.groups())
    return {"registers": registers, "spill_bytes": stack + local, "loop_spills": main_loop_spills(code)}


def main_loop_spills(sass: str) -> int:
    """Loads and stores of spilled registers in the main loops: the innermost that copy asynchronously."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)]
    jumps = [(at, re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)) for at, text in lines]
    loops = {(int(to[1], 16), at) for at, to in jumps if to is not None and int(to[1], 16) < at}
    innermost = [x for x in loops if not any(y != x and x[0] <= y[0] and y[1] <= x[1] for y in loops)]
    bodies = [[text for at, text in lines if begin <= at <= end] for begin, end in innermost]
    main = [body for body in bodies if any("LDGSTS" in text for text in body)]
    return sum(bool(re.search(r"\b(LDL|STL)\b", text)) for body in main for text in body)
