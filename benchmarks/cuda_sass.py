"""What the machine code of the CUDA kernels promises, without a GPU: ``python -m benchmarks cuda-sass``.

The cubins of nvcc carry the compiler's own schedule: how many cycles a warp waits at least after each instruction
(`benchmarks.sass`). From it, for every variant and architecture: the issue cycles of one tile's path through the inner
loop, of the copies in it and the instructions one copy costs, how many matrix instructions stand in one basic block
(only those overlap with each other's loads), how many loads the merge has on their way, and how much of a
multiprocessor's shared memory its resident blocks hold. **All of it is read or predicted; nothing is run or measured.**

``--save`` writes benchmarks/results/cuda_sass.json and .md, and from the same compilation the table of resources
(`benchmarks.cuda_resources`); ``--against`` compares with a file of this kind or with a commit, whose sources are
compiled the same way.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from . import cuda_resources as resources
from .sass import Block, Instruction, best_path, blocks_of, functions, loops_of

ROOT = resources.ROOT
TABLE = ROOT / "benchmarks" / "results" / "cuda_sass.json"
DTYPES = ("bf16", "fp16", "fp32")
HEAD_DIMS = (32, 64, 80, 96, 128, 192, 256)
KEY = ("kernel", "dtype", "head_dim", "arch", "part")
# Of each figure: whether less is better, and by how many percent another release of the assembler may be worse.
FIGURES = {
    "path_cycles": (True, 10),
    "copy_cycles": (True, 10),
    "instructions_a_copy": (True, 10),
    "products": (False, 0),
    "largest_block": (False, 0),
    "loads_in_flight": (False, 0),
    "blocks": (False, 0),
}


def attention_rows(code: list[Instruction]) -> list[dict[str, Any]]:
    """One row for each inner loop of an attention kernel, the one of most products first.

    An inner loop holds products (HMMA, or FFMA for float32) and copies. What is counted is the path of most work
    through one turn of it: one block of tokens of K and of V. ``part`` is the path's number of products.
    """
    blocks = blocks_of(code)
    loops = loops_of(blocks)
    product = "HMMA" if any(i.kind == "HMMA" for i in code) else "FFMA"

    def holds(loop: Any, kind: str, least: int = 1) -> bool:
        return sum(blocks[i].count(kind) for i in loop.blocks) >= least

    inner = [x for x in loops if holds(x, product, 8) and holds(x, "LDGSTS") and holds(x, "BAR")]
    inner = [x for x in inner if not any(y.blocks < x.blocks for y in inner)]
    rows = []
    for loop in inner:
        path = best_path(blocks, loop, loops, lambda b: b.count(product, "LDGSTS"))
        copying = [block for block, _ in path if block.count("LDGSTS")]
        copies = sum(block.count("LDGSTS") for block in copying)
        products = sum(block.count(product) for block, _ in path)
        of_copies = [i for block in copying for i in _before_last_copy(block)]
        rows.append(
            dict(
                part=f"{products} {product}", products=products,
                largest_block=max(block.count(product) for block, _ in path),
                path_cycles=sum(block.stalls for block, _ in path), copies=copies,
                copy_cycles=sum(i.stall for i in of_copies),
                instructions_a_copy=round(len(of_copies) / copies, 2) if copies else 0,
                nested_loops=len({inside.head for _, inside in path if inside is not None}),
            )
        )  # fmt: skip
    return sorted(rows, key=lambda row: -row["products"])


def _before_last_copy(block: Block) -> list[Instruction]:
    """What a block does to copy: up to its last copy, products and what feeds them left out."""
    last = max(n for n, i in enumerate(block.code) if i.kind == "LDGSTS")
    return [i for i in block.code[: last + 1] if i.kind not in ("HMMA", "LDSM")]


def merge_row(code: list[Instruction]) -> dict[str, Any]:
    """Loads that a merge kernel has on their way at once: the most in one basic block."""
    return dict(part="", loads_in_flight=max(block.count("LDG") for block in blocks_of(code)))


@dataclass
class Unit:
    """One source file compiled for one architecture: rows for the table of resources and rows for this one."""

    kernels: list[dict[str, Any]]
    loops: list[dict[str, Any]]


def compile_unit(dtype: str, arch: int, root: Path = ROOT, head_dim: int | None = None) -> Unit:
    """The kernels of one element type ("": the small ones) on one architecture, of every head_dim or of one.

    Units are kept in ``build/cuda_tables`` under a hash of their sources, compiler and flags, so that a run that was
    cut short goes on where it was.

    Raises:
        RuntimeError: nvcc or cuobjdump is missing, or the sources do not compile.
    """
    if resources.disassembler() is None:
        raise RuntimeError("cuobjdump was not found; it comes with the CUDA toolkit and in Triton's wheel")
    defines = () if head_dim is None else (f"ANABRANCH_ONE_HEAD_DIM={head_dim}",)
    digest = hashlib.sha256(repr((resources.SOURCES[dtype], arch, defines, resources.version())).encode())
    for path in sorted((root / "csrc" / "cuda").iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    kept = ROOT / "build" / "cuda_tables" / f"{digest.hexdigest()[:24]}.json"
    if kept.exists():
        return Unit(**json.loads(kept.read_text()))
    with resources.compiled(resources.SOURCES[dtype], arch, defines, root) as (kernels, dump):
        unit = Unit(resources.counted(kernels, dump), loop_rows(kernels, dump))
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(asdict(unit)))
    return unit


def loop_rows(kernels: list[dict[str, Any]], dump: str) -> list[dict[str, Any]]:
    """This table's rows of what `cuda_resources.compiled` gives."""
    code = functions(dump)
    rows: list[dict[str, Any]] = []
    for kernel in kernels:
        known = {name: kernel[name] for name in ("kernel", "dtype", "head_dim", "arch", "registers", "spill_bytes")}
        found = code[kernel["symbol"]]
        if kernel["kernel"] == "attention":
            rows += [known | row for row in attention_rows(found)]
        elif kernel["kernel"].startswith("merge"):
            rows.append(known | merge_row(found))
    return rows


def units(
    dtypes: Iterable[str] = DTYPES, archs: Iterable[int] = resources.ARCHS, head_dims: Sequence[int] | None = None,
    root: Path = ROOT, processes: int = 1,
) -> list[Unit]:  # fmt: skip
    """All of these compiled; head_dims None: every one, a source file at a time, which is less work than one by one."""
    jobs = [(dtype, arch, root, dim) for arch in archs for dtype in dtypes for dim in head_dims or (None,)]
    with ThreadPoolExecutor(processes) as pool:
        return list(pool.map(lambda job: compile_unit(*job), jobs))


def table(found: Iterable[Unit], layouts: bool = True) -> list[dict[str, Any]]:
    """Rows of units in a fixed order; ``layouts``: with the ring and blocks that this checkout would choose."""
    rows = list({tuple(row[name] for name in KEY): row for unit in found for row in unit.loops}.values())
    if layouts:
        with_shared(rows)
    return sorted(rows, key=lambda r: (r["kernel"], r["dtype"], r["head_dim"], r["arch"], -r.get("products", 0)))


def with_shared(rows: list[dict[str, Any]]) -> None:
    """Adds the ring, the blocks a multiprocessor and the share of its shared memory that they hold, as launched."""
    resources.with_layouts([row for row in rows if row["kernel"] == "attention"])
    for row in rows:
        if "shared_bytes" in row:
            held = row["blocks"] * (row["shared_bytes"] + resources.RESERVED)
            row["shared_held"] = round(held / resources.LIMITS[row["arch"]][1], 3)


def sources_of(commit: str, folder: Path) -> Path:
    """The csrc of a commit, unpacked under a folder."""
    packed = subprocess.run(["git", "archive", commit, "csrc"], cwd=ROOT, capture_output=True)
    if packed.returncode != 0:
        raise ValueError(f"against: neither a file nor a commit of this repository: {commit!r}")
    with tarfile.open(fileobj=BytesIO(packed.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def other_table(against: str, **options: Any) -> list[dict[str, Any]]:
    """What to compare with: a saved table, or a commit's sources compiled with the same options."""
    if Path(against).is_file():
        return json.loads(Path(against).read_text())["kernels"]
    with tempfile.TemporaryDirectory() as folder:
        return table(units(root=sources_of(against, Path(folder)), **options), layouts=False)


def worse(now: list[dict[str, Any]], then: list[dict[str, Any]], same_compiler: bool = True) -> list[str]:
    """What has become worse, a line each: a figure past its bound, a loop that is gone, a new spill."""
    lines = []
    old, fresh = ({tuple(row[name] for name in KEY): row for row in rows} for rows in (then, now))
    variants = {key[:-1] for key in fresh}
    for key, before in old.items():
        if key[:-1] not in variants:
            continue
        name = f"{before['kernel']} {before['dtype']} {before['head_dim'] or ''} sm_{before['arch']} {before['part']}"
        row = fresh.get(key)
        if row is None:
            lines.append(f"{name}: no such loop any more")
            continue
        if row["spill_bytes"] > before["spill_bytes"]:
            lines.append(f"{name}: spills {row['spill_bytes']} bytes, {before['spill_bytes']} before")
        for figure, (less, percent) in FIGURES.items():
            if figure not in row or figure not in before:
                continue
            slack = 1 + (0 if same_compiler else percent) / 100
            bound = before[figure] * slack if less else before[figure] / slack
            if (row[figure] > bound) if less else (row[figure] < bound):
                lines.append(f"{name}: {figure} {row[figure]}, {before[figure]} before")
    return lines


def markdown(rows: list[dict[str, Any]], made_with: str) -> str:
    """A table for documents: a line a loop and element type, a column an architecture."""
    archs = sorted({row["arch"] for row in rows})
    found = sorted({(row["arch"], row["dtype"]) for row in rows})
    some = {arch: ", ".join(dtype for other, dtype in found if other == arch) for arch in archs}
    lines = [
        "# CUDA kernels: what their machine code promises", "",
        f"Made by `python -m benchmarks cuda-sass --save` with {made_with}. **Read from compiled code, never "
        "measured:** no GPU was at hand. Issue cycles are sums of the compiler's stall counts, a floor of what a warp "
        "takes for one block of 64 tokens (32 for fp32) of K and V.", "",
        "Compiled so far: " + "; ".join(f"{dtypes} on sm_{arch}" for arch, dtypes in some.items()) + ".", "",
        "A cell: cycles of the whole path, of its copies, instructions a copy (16 bytes a thread), products in the "
        "largest basic block; registers, tiles in the ring, blocks a multiprocessor and the share of its shared memory "
        "that they hold. Loops inside the path (float32 has some) count once.", "",
        "| kernel | dtype | head_dim | products a turn | " + " | ".join(f"sm_{a}" for a in archs) + " |",
        "|---|---|---|---|" + "---|" * len(archs),
    ]  # fmt: skip
    seen: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for row in rows:
        seen.setdefault((row["kernel"], row["dtype"], row["head_dim"], row["part"]), {})[row["arch"]] = row
    for (kernel, dtype, dim, part), cells in seen.items():
        texts = [_cell(cells.get(arch)) for arch in archs]
        lines.append(f"| {kernel} | {dtype} | {dim or ''} | {part} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if row["kernel"].startswith("merge"):
        return f"{row['loads_in_flight']} loads in flight; {row['registers']} r"
    text = (
        f"{row['path_cycles']}, copies {row['copy_cycles']} ({row['instructions_a_copy']:g} a copy), "
        f"{row['largest_block']} in a block; {row['registers']} r"
    )
    if "ring" in row:
        text += f", ring {row['ring']}, {row['blocks']} blocks ({100 * row['shared_held']:.0f} %)"
    return text + (f", **spills {row['spill_bytes']} B**" if row["spill_bytes"] else "")


def save(rows: list[dict[str, Any]], path: Path = TABLE) -> None:
    """The table and its document. A table of some types and architectures says so by what is in it."""
    head, tail = json.dumps({"made_with": resources.version()})[:-1], "\n]}\n"
    path.write_text(head + ', "kernels": [\n' + ",\n".join(json.dumps(row) for row in rows) + tail)
    path.with_suffix(".md").write_text(markdown(rows, resources.version()))
