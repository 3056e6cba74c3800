"""What every CUDA kernel takes, on GPUs that need not be there: ``python -m benchmarks.cuda_resources``.

Compiles ``csrc/cuda`` with nvcc to machine code for each architecture, and reads from the assembler's report the
registers, stack and spills of every kernel; from the launcher's own tables (through the emulator) the shared memory;
from the disassembly, where cuobjdump is at hand, how many tensor-core and asynchronous-copy instructions there are.
Writes benchmarks/results/cuda_resources.json and .md. Nothing is run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {"bf16": "attention_bf16.cu", "fp16": "attention_f16.cu", "fp32": "attention_f32.cu", "": "launch.cu"}
ARCHS = (80, 86, 89, 90, 100, 120)
THREADS = 128
RESERVED = 1024  # bytes of shared memory that the system takes of every block
# Bytes of shared memory (a block at most, a multiprocessor) and threads a multiprocessor: CUDA C++ Programming Guide,
# technical specifications per compute capability. All have 65,536 registers.
LIMITS = {
    80: (163 * 1024, 164 * 1024, 2048),
    86: (99 * 1024, 100 * 1024, 1536),
    89: (99 * 1024, 100 * 1024, 1536),
    90: (227 * 1024, 228 * 1024, 2048),
    100: (227 * 1024, 228 * 1024, 2048),
    120: (99 * 1024, 100 * 1024, 1536),
}
TYPES = {"fp32": 0, "bf16": 1, "fp16": 2}
INSTRUCTIONS = {"mma": r"\bHMMA", "ldmatrix": r"\bLDSM", "cp_async": r"\bLDGSTS"}


def nvcc() -> str | None:
    """The compiler, or None."""
    return shutil.which(os.environ.get("CUDACXX", "nvcc"))


def disassembler() -> str | None:
    """cuobjdump: NVIDIA's own, or the one in Triton's wheel."""
    found = shutil.which("cuobjdump")
    if found is None:
        try:
            import triton
        except ImportError:
            return None
        found = shutil.which(str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"))
    return found


def kernel_of(symbol: str) -> dict[str, Any]:
    """A mangled name's kernel, element type and head_dim."""
    if "advance_kernel" in symbol:
        return dict(kernel="advance", dtype="", head_dim=0)
    found = re.search(r"(attention|merge|write_kv|copy_pages)_kernelI(.*?)E?Ev", symbol)
    assert found is not None, symbol
    name, arguments = found.groups()
    if name in ("write_kv", "copy_pages"):
        width = 16 if "Vector16" in arguments else {"j": 4, "t": 2}[arguments.rstrip("E")[-1]]
        return dict(kernel=name, dtype=f"{width} bytes", head_dim=0)
    dtype = "bf16" if "bf16" in arguments else "fp16" if "f16" in arguments else "fp32"
    number = re.search(r"Li(\d+)", arguments)
    if name == "merge":  # by one warp for each row and head, or by a block's
        return dict(
            kernel="merge" if number is None or number.group(1) == "1" else "merge_wide", dtype=dtype, head_dim=0
        )
    return dict(kernel=name, dtype=dtype, head_dim=int(number.group(1)) if number else 0)


@contextmanager
def compiled(
    source: str, arch: int, defines: Sequence[str] = (), root: Path = ROOT
) -> Iterator[tuple[list[dict[str, Any]], str]]:
    """One source file on one architecture: a row for each kernel (see `compile_unit`, with its symbol), and the machine code as
    text, empty where there is no disassembler.

    Raises:
        RuntimeError: there is no nvcc, or it refuses the source.
    """
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError("nvcc was not found; put it on PATH or name it in CUDACXX")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        done = subprocess.run(
            [compiler, "-std=c++17", "-O3", f"-arch=sm_{arch}", "-Xptxas", "-v", "-I", str(root / "csrc"), "-cubin",
             *(f"-D{d}" for d in defines), "-o", str(cubin), str(root / "csrc" / "cuda" / source)],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(f"{source} for sm_{arch}: {done.stderr[-2000:]}")
        rows = []
        for block in re.split(r"Compiling entry function '", done.stderr)[1:]:
            symbol = block.split("'")[0]
            stack, stores, loads = map(
                int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", block).groups()
            )  # type: ignore[union-attr]
            registers = int(re.search(r"Used (\d+) registers", block).group(1))  # type: ignore[union-attr]
            rows.append(
                kernel_of(symbol)
                | dict(arch=arch, registers=registers, stack_bytes=stack, spill_bytes=stores + loads, symbol=symbol)
            )
        tool = disassembler()
        text = ""
        if tool is not None:
            text = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
        yield rows, text


def compile_unit(source: str, arch: int, defines: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Every kernel of one source file on one architecture.

    Returns:
        rows of kernel, dtype, head_dim, arch, registers, stack_bytes, spill_bytes, and counts of INSTRUCTIONS.
    """
    with compiled(source, arch, defines) as (rows, text):
        for part in re.split(r"Function : ", text)[1:]:
            counts = {name: len(re.findall(pattern, part)) for name, pattern in INSTRUCTIONS.items()}
            for row in rows:
                if row["symbol"] == part.split()[0]:
                    row.update(counts)
    for row in rows:
        del row["symbol"]
    return rows


def occupancy(registers: int, shared: int, arch: int) -> int:
    """Blocks of one multiprocessor at once."""
    _, per_multiprocessor, threads = LIMITS[arch]
    warps = THREADS // 32
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * warps)
    by_shared = per_multiprocessor // (shared + RESERVED)
    return min(by_registers, by_shared, threads // THREADS, 32)


def with_layouts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds ring, shared_bytes and blocks (a multiprocessor) to the attention kernels."""
    sys.path.insert(0, str(ROOT / "tests" / "emulator"))
    import emulated

    module = emulated.load()
    for row in rows:
        if row["kernel"] != "attention":
            row["blocks"] = occupancy(row["registers"], 0, row["arch"])
            continue
        ring, shared = module.layout(
            TYPES[row["dtype"]], row["head_dim"], *LIMITS[row["arch"]][:2], occupancy(row["registers"], 0, row["arch"])
        )
        row.update(ring=ring, shared_bytes=shared, blocks=occupancy(row["registers"], shared, row["arch"]))
    return rows


def markdown(rows: list[dict[str, Any]], made_with: str) -> str:
    """One line a kernel, one column an architecture."""
    spills = [row for row in rows if row["spill_bytes"]]
    archs = sorted({row["arch"] for row in rows})
    lines = [
        "# CUDA kernels: what every variant takes", "",
        f"Made by `python -m benchmarks.cuda_resources` with {made_with}; compiled, not run: no GPU is needed for it.",
        f"{len(rows)} kernels, {len(spills)} spill registers.",
        "A cell: registers a thread, shared memory a block (tiles in its ring), blocks a multiprocessor; HMMA count.",
        "", "| kernel | dtype | head_dim | " + " | ".join(f"sm_{a}" for a in archs) + " |",
        "|---|---|---|" + "---|" * len(archs),
    ]  # fmt: skip
    keys = sorted({(row["kernel"], row["dtype"], row["head_dim"]) for row in rows})
    for key in keys:
        cells = []
        for arch in archs:
            found = [r for r in rows if (r["kernel"], r["dtype"], r["head_dim"], r["arch"]) == (*key, arch)]
            if not found:
                cells.append("")
                continue
            row = found[0]
            text = f"{row['registers']} r"
            if "ring" in row:
                text += f", {row['shared_bytes'] / 1024:.0f} KB (ring {row['ring']})"
            text += f", {row['blocks']} blocks"
            if row.get("mma"):
                text += f"; {row['mma']} HMMA"
            if row["spill_bytes"]:
                text += f", **spills {row['spill_bytes']} B**"
            cells.append(text)
        lines.append(f"| {key[0]} | {key[1]} | {key[2] or ''} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def version() -> str:
    """nvcc's release, as it says it."""
    text = subprocess.run([nvcc() or "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\S+), (\S+)", text)
    return f"nvcc {found.group(2).lstrip('V')}" if found else "nvcc"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, nargs="*", default=list(ARCHS))
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    if nvcc() is None:
        print("nothing compiled: nvcc was not found; put it on PATH or name it in CUDACXX")
        return 2
    jobs = [(source, arch) for arch in args.arch for source in SOURCES.values()]
    with ThreadPoolExecutor(args.processes) as pool:
        rows = [row for found in pool.map(lambda job: compile_unit(*job), jobs) for row in found]
    rows = with_layouts(rows)
    (args.out / "cuda_resources.json").write_text(
        json.dumps({"made_with": version(), "kernels": rows}, indent=1) + "\n"
    )
    (args.out / "cuda_resources.md").write_text(markdown(rows, version()))
    print(markdown(rows, version()))
    return int(any(row["spill_bytes"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
