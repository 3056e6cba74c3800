"""``python -m anabranch.kernels.report``: compile every variant, write the table of what each one takes.

No GPU is needed. Writes ``benchmarks/results/triton_resources.json`` and ``.md``; a variant that fails to compile is
reported with its error and makes the exit code 1, and the others still run. With ``--kernel``, ``--arch``, ``--dtype``,
``--head-dim`` or ``--sample`` only those are compiled, and the rows of the others stay as they are in the file, if the
same Triton made them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import variants

OUT = Path("benchmarks/results")


def compile_here(chosen: list[variants.Variant]) -> Iterator[dict[str, Any]]:
    """Each variant's resources, or its fields and an ``error``."""
    for variant in chosen:
        try:
            yield variants.compile_variant(variant)
        except Exception as error:
            first = str(error).strip().splitlines() or [""]
            yield {**vars(variant), "error": f"{type(error).__name__}: {first[0][:300]}"}


def compile_in_processes(chosen: list[variants.Variant], processes: int) -> list[dict[str, Any]]:
    """The same in several processes of their own, which import Triton without TRITON_INTERPRET."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    workers = []
    for i in range(processes):
        command = [sys.executable, "-m", "anabranch.kernels.report", "--worker"]
        output = tempfile.TemporaryFile("w+")  # a pipe could fill up while another worker is waited for
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, env=env, text=True)
        assert worker.stdin is not None
        worker.stdin.write(json.dumps([vars(variant) for variant in chosen[i::processes]]))
        worker.stdin.close()
        workers.append((worker, output, chosen[i::processes]))
    found = []
    for worker, output, share in workers:
        code = worker.wait()
        output.seek(0)
        lines = [json.loads(line) for line in output if line.startswith("{")]
        output.close()
        found += lines
        for variant in share[len(lines) :]:
            found.append({**vars(variant), "error": f"its process ended with exit code {code}"})
    order = {variant: i for i, variant in enumerate(chosen)}
    return sorted(found, key=lambda row: order[_variant_of(row)])


def kept_rows(path: Path, versions: str, compiled: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of an earlier table with those just compiled put in, in the order of ``all_variants``.

    Rows of another Triton, and of variants that no launch asks for any more, are dropped.
    """
    found = {}
    if path.exists():
        earlier = json.loads(path.read_text())
        if earlier["made_with"] == versions:
            found = {_variant_of(row): row for row in earlier["variants"]}
    found |= {_variant_of(row): row for row in compiled}
    order = [variant for arch in variants.ARCHS for variant in variants.all_variants(arch)]
    return [found[variant] for variant in order if variant in found]


def _variant_of(row: dict[str, Any]) -> variants.Variant:
    return variants.Variant(**{name: row[name] for name in variants.Variant.__dataclass_fields__ if name in row})


def markdown(rows: list[dict[str, Any]], versions: str) -> str:
    """The table, one line a variant and one column an architecture."""
    failed = [row for row in rows if "error" in row]
    good = [row for row in rows if "error" not in row]
    spilled = [row for row in good if row["spill_bytes"]]
    in_loops = [row for row in spilled if row["loop_spills"]]
    archs = [arch for arch in sorted(variants.ARCHS, key=str) if any(row["arch"] == arch for row in rows)]
    lines = [
        "# Triton kernels: what every variant takes",
        "",
        f"Made by `python -m anabranch.kernels.report` with {versions}; compiled, not run: no GPU is needed for it.",
        f"{len(good)} variants compiled, {len(failed)} failed; {len(spilled)} spill registers, {len(in_loops)} of them"
        " in their main loops (the others where hidden infinities and NaN are kept out, which hardly ever runs).",
        "A cell: registers a thread, shared memory a block, tensor-core instruction (– = none), spilled bytes if any,",
        "bytes of an asynchronous copy; then rows × columns × stages of each tile, and warps.",
        "`options`: softcap, window, sinks and device-side counts all on, as far as the kernel has them.",
        "",
        "| kernel | dtype | head_dim | options | " + " | ".join(map(name_of, archs)) + " |",
        "|---" * (4 + len(archs)) + "|",
    ]
    table: dict[tuple[Any, ...], dict[int, str]] = {}
    for row in rows:
        dims = f"{row['head_dim']} (V: {row['v_head_dim']})" if row.get("v_head_dim") else row["head_dim"]
        key = (row["kernel"], row["dtype"], dims, "yes" if row["options"] else "")
        if "error" in row:
            cell = "**failed**"
        else:
            cell = f"{row['registers']} r, {row['shared_bytes'] / 1024:.0f} KB, {'+'.join(row['tensor_cores']) or '–'}"
            cell += f", {row['spill_bytes']} B spilled" if row["spill_bytes"] else ""
            cell += f" (**{row['loop_spills']} moves in main loops**)" if row["loop_spills"] else ""
            cell += f", copies {row['copy_bytes']} B" if row["copy_bytes"] else ""
            cell += f" ({row['tile']}; {row['num_warps']} warps)" if row["tile"] else ""
        table.setdefault(key, {})[row["arch"]] = cell
    for key, cells in table.items():
        lines.append("| " + " | ".join([*map(str, key), *(cells.get(arch, "") for arch in archs)]) + " |")
    for row in failed:
        lines.append(f"\n{row['kernel']} {row['dtype']} d{row['head_dim']} {name_of(row['arch'])}: {row['error']}")
    return "\n".join(lines) + "\n"


def name_of(arch: int | str) -> str:
    return arch if isinstance(arch, str) else f"sm_{arch}"


def arch_of(name: str) -> int | str:
    return int(name) if name.isdigit() else name


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m anabranch.kernels.report", description=__doc__)
    parser.add_argument("--kernel", action="append", choices=list(variants.BUILDERS), help="only these (default: all)")
    parser.add_argument(
        "--arch", type=arch_of, action="append", choices=variants.ARCHS, help="only these (default: all)"
    )
    parser.add_argument("--dtype", action="append", choices=list(variants.DTYPES), help="only these (default: all)")
    parser.add_argument("--head-dim", type=int, action="append", help="only these (default: all)")
    parser.add_argument("--sample", action="store_true", help="only those that tests/test_triton_compile.py compiles")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder of the two files (default: {OUT})")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:  # variants come in on stdin, a line of JSON a result goes out
        for row in compile_here([variants.Variant(**fields) for fields in json.load(sys.stdin)]):
            print(json.dumps(row), flush=True)
        return 0
    reason = variants.why_not()
    if reason is not None:
        print(f"nothing compiled: {reason}")
        return 2

    listed = variants.representative_variants if args.sample else variants.all_variants
    chosen = [v for arch in args.arch or variants.ARCHS for v in listed(arch)]
    for name in ("kernel", "dtype", "head_dim"):
        chosen = [v for v in chosen if not getattr(args, name) or getattr(v, name) in getattr(args, name)]
    print(f"compiling {len(chosen)} variants in {args.processes} processes", flush=True)
    rows = compile_in_processes(chosen, args.processes)
    versions = f"Triton {variants.triton.__version__}"
    args.out.mkdir(parents=True, exist_ok=True)
    rows = kept_rows(args.out / "triton_resources.json", versions, rows)
    (args.out / "triton_resources.json").write_text(
        json.dumps({"made_with": versions, "variants": rows}, indent=1) + "\n"
    )
    (args.out / "triton_resources.md").write_text(markdown(rows, versions))
    print(markdown(rows, versions))
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
