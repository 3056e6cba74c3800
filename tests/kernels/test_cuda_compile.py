"""The CUDA kernels compiled by nvcc for GPUs that need not be there, against the committed table of what they take.

``python -m benchmarks cuda-sass --save`` compiles every variant for every architecture and writes that table (and the
one of test_cuda_sass.py); ``python -m benchmarks.cuda_resources`` that table alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import cuda_resources as resources  # noqa: E402

TABLE = ROOT / "benchmarks" / "results" / "cuda_resources.json"
SLACK = 16  # registers: another release of the assembler may take a few more


@pytest.fixture(scope="module")
def committed():
    return json.loads(TABLE.read_text())["kernels"]


def key(row):
    return row["kernel"], row["dtype"], row["head_dim"], row["arch"]


def test_the_table_is_complete_and_nothing_spills(committed):
    found = {key(row): row for row in committed}
    assert len(found) == len(committed)
    for arch in resources.ARCHS:
        for dtype in resources.TYPES:
            for dim in (32, 64, 80, 96, 128, 192, 256):
                row = found["attention", dtype, dim, arch]
                assert row["spill_bytes"] == 0 == row["stack_bytes"] and row["registers"] <= 255
                assert row["shared_bytes"] <= resources.LIMITS[arch][0]
                # Two blocks a multiprocessor wherever its shared memory holds three tiles for each.
                assert row["blocks"] >= (2 if dim <= {86: 80, 89: 80, 120: 80, 80: 128}.get(arch, 192) else 1), row
                if "mma" in row:
                    assert (row["mma"] > 0) == (dtype != "fp32") and row["cp_async"] > 0
                    assert (row["ldmatrix"] > 0) == (dtype != "fp32")


@pytest.mark.skipif(resources.nvcc() is None, reason="nvcc is not installed")
@pytest.mark.parametrize("source,arch", [("attention_bf16.cu", 90), ("launch.cu", 80)])
def test_what_is_compiled_now_takes_no_more(committed, source, arch):
    found = {key(row): row for row in committed}
    rows = resources.compile_unit(source, arch, ("ANABRANCH_FEW_HEAD_DIMS",))
    assert rows
    for row in rows:
        assert row["spill_bytes"] == 0, row
        assert row["registers"] <= found[key(row)]["registers"] + SLACK, row
        if row["kernel"] == "attention" and "mma" in row:
            assert row["mma"] > 0 and row["ldmatrix"] > 0 and row["cp_async"] > 0


@pytest.mark.parametrize(
    "registers,shared,arch,blocks",
    [(128, 0, 80, 4), (129, 0, 80, 3), (255, 0, 90, 2), (32, 0, 86, 12), (168, 70_000, 80, 2), (100, 90_000, 86, 1)],
)
def test_occupancy(registers, shared, arch, blocks):
    assert resources.occupancy(registers, shared, arch) == blocks


def test_names():
    name = "_ZN9anabranch4cuda16attention_kernelINS0_4bf16ELi128EEEvNS0_9AttentionE"
    assert resources.kernel_of(name) == dict(kernel="attention", dtype="bf16", head_dim=128)
    assert resources.kernel_of(name.replace("NS0_4bf16E", "f"))["dtype"] == "fp32"
    merge = resources.kernel_of("_ZN9anabranch4cuda12merge_kernelINS0_3f16ELi1EEEvNS0_9AttentionE")
    assert merge == dict(kernel="merge", dtype="fp16", head_dim=0)
    wide = resources.kernel_of("_ZN9anabranch4cuda12merge_kernelIfLi4EEEvNS0_9AttentionE")
    assert wide == dict(kernel="merge_wide", dtype="fp32", head_dim=0)
    wide = "_ZN9anabranch4cuda15write_kv_kernelINS0_52_GLOBAL__N__8Vector16EEEvNS0_7WriteKvE"
    assert resources.kernel_of(wide)["dtype"] == "16 bytes"
    assert resources.kernel_of("_ZN9anabranch4cuda17copy_pages_kernelItEEvNS0_9CopyPagesE")["dtype"] == "2 bytes"
