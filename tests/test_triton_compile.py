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


TABLE = json.loads((Path(__file__).parents[1] / report.OUT / "triton_resources.json").read_text())


@pytest.mark.parametrize("arch", variants.ARCHS)
def test_variants_compile_without_spills(compiled, arch):
    rows = [row for variant, row in compiled.items() if variant.arch == arch]
    # Another Triton brings another assembler, which may spill a few bytes: 3.7.1 does, 8 of them, in float32 for sm_80.
    most = 0 if TABLE["made_with"] == f"Triton {triton.__version__}" else 16
    assert [row["error"] for row in rows if "error" in row] == []
    for row in rows:
        assert row["cubin_bytes"] > 1000 and 0 < row["registers"] <= 255
        assert row["spill_bytes"] <= most, row
        assert row["shared_bytes"] <= variants.SHARED_LIMIT[arch], row


def test_tensor_cores(compiled):
    """16-bit dots run on tensor cores, with the instructions of the generation; float32 ones keep their precision."""
    for variant, row in compiled.items():
        found = row["tensor_cores"]
        if variant.kernel.startswith("branch_") and variant.dtype != "fp32":
            assert found, row
        elif variant.kernel != "attention" or variant.dtype == "fp32":
            assert found == [], row
        elif variant.block_m < 64 or variant.arch == 80:
            assert found == ["mma.sync"], row
        elif variant.arch == 90:
            assert "wgmma" in found, row
        else:
            assert found, row


def test_the_committed_table_is_of_the_branch_kernels_as_they_are_launched():
    """Every variant of branch attention, as it is launched now; at head_dim 128 or less none spills."""
    rows = {report._variant_of(row): row for row in TABLE["variants"]}
    for variant in (v for arch in variants.ARCHS for v in variants.branch_variants(arch)):
        row = rows[variant]
        assert "error" not in row, row
        launched = variants.launched_as(variant)
        assert {name: row[name] for name in launched} == launched, "run python -m anabranch.kernels.report"
        assert row["spill_bytes"] == 0 or variant.head_dim > 128, row


def test_a_variant_that_fails_is_reported_and_the_rest_still_compile():
    bad = variants.Variant("attention", 90, "int7", 64, 16)
    good = variants.Variant("copy_pages", 90, "bf16", 64)
    rows = report.compile_in_processes([bad, good], processes=1)
    assert "int7" in rows[0]["error"] and rows[1]["registers"] > 0
    text = report.markdown(rows, "Triton 0")
    assert "1 failed" in text and "**failed**" in text and "int7" in text
    json.dumps(rows)
