"""The reading of machine code, and the committed table of what the CUDA kernels promise: no change makes it worse.

``python -m benchmarks cuda-sass --save`` compiles every variant for every architecture and writes that table.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import cuda_resources as resources  # noqa: E402
from benchmarks import cuda_sass, sass  # noqa: E402


def assembled(*lines: str) -> str:
    """A dump as cuobjdump prints it, of ``stall text`` lines, one instruction each."""
    out = ["\t\tFunction : kernel", '\t.headerflags\t@"EF_CUDA_SM90"']
    for n, line in enumerate(lines):
        stall, text = line.split(" ", 1)
        control = int(stall) << 41 | 7 << 46 | 7 << 49 | 1 << 52
        out.append(f"        /*{16 * n:04x}*/                   {text} ;   /* 0x000000ff00177b82 */")
        out.append(f"                                               /* 0x{control:016x} */")
    return "\n".join(out) + "\n"


LOOP = assembled(
    "1 S2R R0, SR_TID.X",  # 0x00
    "2 BAR.SYNC.DEFER_BLOCKING 0x0",  # 0x10: the head of the loop
    "5 @P0 BRA 0x60",  # 0x20
    "4 LDGSTS.E.BYPASS.LTC128B.128 [R1], desc[UR4][R2.64], P1",  # 0x30
    "3 LDGSTS.E.BYPASS.LTC128B.128 [R1+0x80], desc[UR4][R2.64+0x80], P1",  # 0x40
    "1 NOP",  # 0x50
    "2 @P2 BRA 0x90",  # 0x60
    *["6 HMMA.16816.F32.BF16 R4, R8, R12, R4"] * 2,  # 0x70
    "1 @P3 BRA 0x10",  # 0x90
    "5 EXIT",
)


def test_control_words_are_read():
    (code,) = sass.functions(LOOP).values()
    assert [i.stall for i in code[:5]] == [1, 2, 5, 4, 3]
    assert code[3].kind == "LDGSTS" and code[3].waits == 1 and code[2].predicate == "@P0" and code[2].target == 0x60


def test_blocks_loops_and_the_path_of_most_work():
    (code,) = sass.functions(LOOP).values()
    blocks = sass.blocks_of(code)
    assert [b.code[0].address for b in blocks] == [0, 0x10, 0x30, 0x60, 0x70, 0x90, 0xA0]
    assert [b.to for b in blocks] == [[1], [3, 2], [3], [5, 4], [5], [1, 6], []]
    (loop,) = sass.loops_of(blocks)
    assert loop.head == 1 and loop.blocks == {1, 2, 3, 4, 5} and loop.back == {5}
    path = sass.best_path(blocks, loop, [loop], lambda b: b.count("HMMA", "LDGSTS"))
    assert [b.index for b, _ in path] == [1, 2, 3, 4, 5]
    assert sum(b.stalls for b, _ in path) == 7 + 8 + 2 + 12 + 1
    cheapest = sass.best_path(blocks, loop, [loop], lambda b: 0)
    assert [b.index for b, _ in cheapest] == [1, 3, 5]


def test_a_jump_through_a_table_reaches_what_nothing_else_does():
    dump = assembled("1 BRX R2 -0x20", "1 NOP", "1 BRA 0x40", "1 BRA 0x40", "1 EXIT")
    blocks = sass.blocks_of(next(iter(sass.functions(dump).values())))
    assert [b.to for b in blocks] == [[1, 2], [3], [3], []]


def row(**changed):
    known = dict(kernel="attention", dtype="bf16", head_dim=64, arch=90, part="64 HMMA", registers=160, spill_bytes=0)
    figures = dict(path_cycles=1000, copy_cycles=100, instructions_a_copy=5.0, products=64, largest_block=32, blocks=3)
    return known | figures | changed


@pytest.mark.parametrize(
    "changed,said",
    [
        (dict(path_cycles=1001), "path_cycles 1001, 1000 before"),
        (dict(instructions_a_copy=5.2), "instructions_a_copy"),
        (dict(largest_block=16), "largest_block 16, 32 before"),
        (dict(blocks=2), "blocks 2, 3 before"),
        (dict(spill_bytes=8), "spills 8 bytes"),
        (dict(part="32 HMMA"), "no such loop any more"),
    ],
)
def test_what_is_worse_is_named(changed, said):
    assert any(said in line for line in cuda_sass.worse([row(**changed)], [row()]))


def test_what_is_no_worse_is_not():
    assert cuda_sass.worse([row()], [row()]) == []
    assert cuda_sass.worse([row(path_cycles=900, largest_block=64, registers=200)], [row()]) == []
    assert cuda_sass.worse([row(path_cycles=1090)], [row()], same_compiler=False) == []
    assert cuda_sass.worse([row(path_cycles=1110)], [row()], same_compiler=False) != []
    assert cuda_sass.worse([row()], [row(arch=80)]) == []  # not compiled now: nothing to say


@pytest.fixture(scope="module")
def committed():
    return json.loads(cuda_sass.TABLE.read_text())


def test_the_committed_table_is_complete_and_reaches_its_goals(committed):
    rows = {tuple(r[name] for name in cuda_sass.KEY): r for r in committed["kernels"]}
    assert len(rows) == len(committed["kernels"])
    covered = {(r["dtype"], r["arch"]) for r in committed["kernels"]}
    assert ("bf16", 90) in covered
    for dtype, arch in covered:
        assert rows["merge", dtype, 0, arch, ""]["loads_in_flight"] >= 8
        assert rows["merge_wide", dtype, 0, arch, ""]["loads_in_flight"] >= 32
        for dim in cuda_sass.HEAD_DIMS:
            found = [r for key, r in rows.items() if key[:4] == ("attention", dtype, dim, arch)]
            assert found, (dtype, dim, arch)
            assert all(r["spill_bytes"] == 0 for r in found if dim <= 128)
            # A thread has 2 copies of a tile at head_dim 32, 4 at 64, and what is done once a tile beside them; before
            # sm_90 other work stands in the same block.
            most = (13, 8) if arch == 90 else (16, 11) if arch > 90 else (28, 15)
            most = most[0] if dim == 32 else most[1]
            assert all(r["instructions_a_copy"] <= most and r["copy_cycles"] <= 300 for r in found), (dtype, dim, arch)
            if dtype != "fp32":  # as many products in one basic block as Q·K or P·V has
                assert all(2 * r["largest_block"] >= r["products"] for r in found), (dtype, dim, arch)
    for dtype in {dtype for dtype, arch in covered if arch == 90} & {"bf16", "fp16"}:
        wide = rows["attention", dtype, 128, 90, "128 HMMA"]
        assert wide["largest_block"] == 64 and wide["path_cycles"] <= 2500
        for part in ("128 HMMA", "64 HMMA", "32 HMMA"):
            assert rows["attention", dtype, 128, 90, part]["copy_cycles"] <= 300
            assert rows["attention", dtype, 128, 90, part]["instructions_a_copy"] <= 6
        assert wide["shared_held"] >= 0.9


def test_no_tile_more_would_fit(committed):
    """The ring takes what the blocks that registers allow leave of shared memory; at its longest it is long enough."""
    for row in committed["kernels"]:
        if row["kernel"] != "attention" or row["shared_held"] > 0.9:
            continue
        granules = row["head_dim"] // (4 if row["dtype"] == "fp32" else 8)
        tile = (32 if row["dtype"] == "fp32" else 64) * (granules | 1) * 16
        shared = resources.LIMITS[row["arch"]][1]
        fits = row["blocks"] * (row["shared_bytes"] + tile + resources.RESERVED) <= shared
        if row["ring"] == 8:
            assert row["blocks"] * 7 * tile >= 80 * 1024, row  # on their way
        else:
            assert not fits or row["shared_bytes"] + tile > resources.LIMITS[row["arch"]][0], row


@pytest.mark.skipif(
    resources.nvcc() is None or resources.disassembler() is None, reason="nvcc or cuobjdump is not installed"
)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_no_change_makes_it_worse(committed, head_dim):
    rows = cuda_sass.table([cuda_sass.compile_unit("bf16", 90, head_dim=head_dim)], layouts=False)
    assert len(rows) >= 5, rows  # three inner loops, two merges
    same = committed["made_with"] == resources.version()
    assert cuda_sass.worse(rows, committed["kernels"], same_compiler=same) == []
