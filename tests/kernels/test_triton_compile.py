"""The Triton kernels compiled to cubins for GPUs that need not be there, in processes without the interpreter.

A representative set; ``python -m anabranch.kernels.report`` compiles every variant and writes the table.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed (it has wheels for Linux only)")

import triton
from anabranch.kernels import report, variants

if variants.missing_tools() is not None:
    pytest.skip(f"cannot compile for GPUs: {variants.missing_tools()}", allow_module_level=True)


@pytest.fixture(scope="module")
def compiled():
    chosen = [v for arch in variants.ARCHS for v in variants.representative_variants(arch)]
    rows = report.compile_in_processes(chosen, processes=2)
    assert len(rows) == len(chosen)
    return dict(zip(chosen, rows, strict=True))


TABLE = json.loads((Path(__file__).parents[2] / report.OUT / "triton_resources.json").read_text())


# Another Triton brings another compiler and assembler: everything must compile there, but it may spill.
THE_TABLES_TRITON = TABLE["made_with"] == f"Triton {triton.__version__}"


def check(variant, row):
    # Where hidden infinities are kept out, spills cost next to nothing: it hardly ever runs.
    assert "error" not in row, row
    assert row["code_bytes"] > 1000 and row["registers"] > 0
    assert not THE_TABLES_TRITON or row["loop_spills"] == 0, row
    assert row["shared_bytes"] <= variants.SHARED_LIMIT[variant.arch], row
    assert variant.capability == variants.AMD or row["registers"] <= 255


@pytest.mark.parametrize("arch", variants.ARCHS)
def test_variants_compile(compiled, arch):
    rows = {variant: row for variant, row in compiled.items() if variant.arch == arch}
    assert rows
    for variant, row in rows.items():
        check(variant, row)


def test_kernels_over_quantised_pages_compile():
    """fp8 on GPUs that have no instructions for it, too; K and V still come by asynchronous copies, half as wide."""
    chosen = [
        variants.Variant(kernel, arch, "bf16", head_dim, options, kept)
        for kernel, head_dim, options in (("attention", 128, True), ("write_kv", 72, False), ("copy_pages", 72, False))
        for arch, kept in ((80, "fp8"), (90, "int8"), (90, "fp8"), ("gfx942", "fp8"))
    ]
    for variant, row in zip(chosen, report.compile_in_processes(chosen, processes=2), strict=True):
        check(variant, row)
        if variant.kernel == "attention" and variant.capability != variants.AMD:
            assert row["copy_bytes"] == 16, row


@pytest.mark.slow
@pytest.mark.parametrize("arch", variants.ARCHS)
def test_every_variant_compiles(arch):
    chosen = variants.all_variants(arch)
    for variant, row in zip(chosen, report.compile_in_processes(chosen, processes=2), strict=True):
        assert "error" not in row, row
        if variant.head_dim <= 128:
            check(variant, row)


def test_tensor_cores(compiled):
    """16-bit dots run on tensor cores, with the instructions of the generation; float32 ones keep their precision."""
    for variant, row in compiled.items():
        found = row["tensor_cores"]
        if variant.capability == variants.AMD:
            assert found == ["mfma"], row
        elif variant.kernel not in ("attention", *(f"branch_{name}" for name in variants.BRANCH)):
            assert found == [], row
        elif variant.dtype == "fp32":
            # (In float16: counts of 0 and 1, where hidden infinities are kept out.)
            assert "tf32" not in row["tensor_cores"] and set(found) <= {"mma.sync"}, row
        elif variant.arch in (90, 100) and variant.kernel == "attention":  # the narrow tile and the wide one
            # (Before Triton 3.9 wide tiles of sm_100 are narrow enough for mma.sync: kernels/configs.py.)
            wide = "wgmma" if variant.arch == 90 else "tcgen05" if THE_TABLES_TRITON else "mma.sync"
            assert found == sorted({"mma.sync", wide}), row
        else:
            assert found, row


def test_keys_and_values_come_by_asynchronous_copies_of_16_bytes(compiled):
    """Whatever the head_dim: 40, 56 and 72 are no multiples of 16, and their strides are not either."""
    chosen = [
        variants.Variant("attention", 90, dtype, head_dim)
        for dtype, head_dim in (("bf16", 40), ("bf16", 56), ("bf16", 80), ("bf16", 96), ("fp32", 40))
    ]
    rows = report.compile_in_processes(chosen, processes=2)
    rows += [row for variant, row in compiled.items() if variant.kernel == "attention"]
    assert {72, 128} < {row["head_dim"] for row in rows}
    for row in rows:
        assert row["copy_bytes"] == (0 if isinstance(row["arch"], str) else 16), row
    for variant, row in compiled.items():
        if variant.kernel in ("write_kv", "copy_pages"):
            assert row["load_bytes"] == 16, row


@pytest.mark.skipif(not THE_TABLES_TRITON, reason=f"the table is of {TABLE['made_with']}")
def test_the_committed_table_is_of_the_kernels_as_they_are_launched():
    """Every row, as it is launched now; those that are compiled here are among them."""
    rows = {report._variant_of(row): row for row in TABLE["variants"]}
    assert set(rows) >= {v for arch in variants.ARCHS for v in variants.representative_variants(arch)}
    for variant, row in rows.items():
        assert "error" not in row, row
        launched = variants.launched_as(variant)
        assert {name: row[name] for name in launched} == launched, "run python -m anabranch.kernels.report"
        assert row["loop_spills"] == 0 or variant.head_dim > 128, row


def test_programs_share_a_multiprocessor():
    """On sm_90, in 16 bits: one that is alone there waits for memory with nothing else to do."""
    for row in TABLE["variants"]:
        if row["kernel"] != "attention" or row["arch"] != 90 or row["dtype"] == "fp32" or row["head_dim"] > 128:
            continue
        by_registers = 65536 // (-(-row["registers"] // 8) * 8 * 32 * row["num_warps"])
        by_shared = 228 * 1024 // (row["shared_bytes"] + 1024)
        least = 1 if row["num_warps"] == 8 else 3 if row["head_dim"] == 64 and not row["options"] else 2
        assert min(by_registers, by_shared) >= least, row


def test_a_variant_that_fails_is_reported_and_the_rest_still_compile():
    bad = variants.Variant("attention", 90, "int7", 64)
    good = variants.Variant("copy_pages", 90, "bf16", 64)
    rows = report.compile_in_processes([bad, good], processes=1)
    assert "int7" in rows[0]["error"] and rows[1]["registers"] > 0
    text = report.markdown(rows, "Triton 0")
    assert "1 failed" in text and "**failed**" in text and "int7" in text
    json.dumps(rows)
