"""The one command for a machine with a GPU, tried without one: every part runs to its end, and the files come out."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
GPU = ROOT / "tests" / "gpu"
sys.path[:0] = [str(GPU), str(ROOT)]

import bench  # noqa: E402
import contenders  # noqa: E402
from benchmarks.shapes import all_cases, chunk, draft, levels  # noqa: E402
from problem import Problem, page_size_of  # noqa: E402

spec = importlib.util.spec_from_file_location("gpu_run", GPU / "run.py")
assert spec is not None and spec.loader is not None
command = importlib.util.module_from_spec(spec)
sys.modules["gpu_run"] = command
spec.loader.exec_module(command)

CASES = [
    levels("tree", [1, 2, 6], [32, 16, 5]),
    levels("forest", [2, 4], [16, 9]),
    draft("draft", 12, 7),
    chunk("prefill", 40, 6),
]


def problem(case, heads=(4, 2), **options):
    return Problem(case, *heads, 32, torch.float32, "cpu", most_layers=2, **options)


def error(p, out):
    want = p.oracle(p.sampled())
    return float((out[p.sampled()].double() - want).norm() / want.norm())


# ------------------------------------------------------------------------------------------------ what is timed


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("name", ["cpu", "reference", "flat cpu", "sdpa"])
def test_contenders_compute_attention(case, name):
    prepare = bench.quick_contenders(("cpu", "reference"))[name]
    p = problem(case)
    ready = prepare(p)
    assert error(p, ready.attend(0)) < 1e-5 and ready.plan_us >= 0
    other = ready.attend(1)  # another layer has other keys and values
    assert p.layers == 2 and not torch.allclose(other, ready.attend(0))


def test_flat_reads_every_context_whole():
    case = levels("shared", [1, 8], [64, 8])
    p = problem(case)
    assert error(p, contenders.flat("cpu")(p).attend(0)) < 1e-5
    _, tile_config = contenders._backend("cpu", p)
    import anabranch as ab

    shared = ab.Plan.from_block_tables(p.tables, p.lengths, p.page_size, p.queries).arrays(p.group, tile_config)
    alone = torch.arange(p.tables.numel(), dtype=torch.int32).view(p.tables.shape)
    flat = ab.Plan.from_block_tables(alone, p.lengths, p.page_size, p.queries).arrays(p.group, tile_config)
    assert shared.kv_tokens < flat.kv_tokens == case.logical_tokens


@pytest.mark.parametrize("case", CASES[:2], ids=lambda c: c.name)
def test_flex(case, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    p = problem(case)
    ready = contenders.flex(p)
    assert error(p, ready.attend(0)) < 1e-5 and not torch.allclose(ready.attend(1), ready.attend(0))


class FakeWrapper:
    """FlashInfer's wrappers as documented, in plain PyTorch: page tables by level, rows by indptr."""

    def __init__(self, *arguments, use_tensor_cores=False):
        *self.levels, workspace, layout = arguments
        assert layout == "HND" and workspace.dtype == torch.uint8

    def plan(self, *arguments, sm_scale, q_data_type, kv_data_type=None):
        *tables, q_heads, kv_heads, head_dim, self.page_size = arguments
        assert (q_heads, kv_heads, head_dim, q_data_type) == (4, 2, 32, torch.float32)
        if not self.levels:  # batch decode: one level, a row a request
            indptr = torch.arange(len(tables[0]), dtype=torch.int32)
            tables = [[indptr], *([t] for t in tables)]
        assert all(t.dtype == torch.int32 for part in tables for t in part)
        assert self.levels in ([], [len(tables[0])])
        self.tables, self.scale = tables, sm_scale

    def run(self, q, pools):
        k, v = (pool.transpose(1, 2) for pool in pools)  # "HND" → [pages, page_size, heads, D]
        sees = [[] for _ in range(q.shape[0])]
        for rows, pages, indices, last in zip(*self.tables, strict=True):
            for i in range(len(pages) - 1):
                own = indices[pages[i] : pages[i + 1]].tolist()
                for row in range(rows[i], rows[i + 1]):
                    for at, page in enumerate(own):
                        count = int(last[i]) if at == len(own) - 1 else self.page_size
                        sees[row] += [(page, offset) for offset in range(count)]
        out = torch.empty_like(q)
        for row, seen in enumerate(sees):
            page, offset = torch.tensor(seen).unbind(1)
            kk, vv = (x[page, offset].repeat_interleave(2, 1) for x in (k, v))
            weights = torch.softmax(torch.einsum("hd,nhd->hn", q[row], kk) * self.scale, 1)
            out[row] = torch.einsum("hn,nhd->hd", weights, vv)
        return out


@pytest.fixture
def flashinfer(monkeypatch):
    fake = SimpleNamespace(
        MultiLevelCascadeAttentionWrapper=FakeWrapper, BatchDecodeWithPagedKVCacheWrapper=FakeWrapper
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "flashinfer", fake)


@pytest.mark.parametrize("case", CASES[:2], ids=lambda c: c.name)
@pytest.mark.parametrize("prepare", [contenders.flashinfer_cascade, contenders.flashinfer_decode])
def test_flashinfer_is_given_the_same_tree(flashinfer, case, prepare):
    p = problem(case)
    ready = prepare(p)
    assert error(p, ready.attend(0)) < 1e-5 and not torch.allclose(ready.attend(1), ready.attend(0))


def test_what_does_not_fit_says_why(flashinfer, monkeypatch):
    for prepare, case in ((contenders.flashinfer_cascade, CASES[2]), (contenders.flashinfer_decode, CASES[3])):
        with pytest.raises(contenders.Unfit, match=r"one depth|one row"):
            prepare(problem(case))
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(contenders.Unfit, match="flashinfer cannot be imported"):
        contenders.flashinfer_decode(problem(CASES[0]))
    monkeypatch.setattr(contenders, "DENSE_BYTES", 10.0)
    with pytest.raises(contenders.Unfit, match="dense copies"):
        contenders.sdpa(problem(CASES[0]))


def test_pages_are_shared_whole():
    sizes = {case.name: page_size_of(case) for case in all_cases()}
    assert sizes["few-shot 1,10 / 4000,400"] == 16 and sizes["1,2,64 / 8,256,32"] == 8
    assert sizes["draft 64 on 1000"] == 1 and sizes["no sharing 256 / 4096"] == 16
    assert problem(CASES[0]).lengths == [53] * 6 and problem(CASES[3]).queries == [6]


# ------------------------------------------------------------------------------------------------ the table


def test_a_whole_table_with_graphs_and_a_wrong_contender(monkeypatch):
    """As on a GPU, with a clock that captures nothing; one is wrong, one cannot be captured, one fails."""

    class Pretend(bench.Clock):
        on_gpu = property(lambda self: True, lambda self, value: None)

        def __init__(self, device):
            self.device = device

        def run(self, work, idle=False, best=False):
            work()
            return 80.0

        def graph(self, attend, layers):
            attend(0)
            if attend is captures_not.attend:
                raise RuntimeError("operation not permitted when stream is capturing")
            return 7.0

    captures_not = contenders.Ready(lambda layer: None)

    def stubborn(p):
        captures_not.attend = contenders.sdpa(p).attend
        return captures_not

    def wrong(p):
        return contenders.Ready(lambda layer: p.q * 2)

    def broken(p):
        raise torch.cuda.OutOfMemoryError("tried to allocate 90 GB")

    monkeypatch.setattr(bench, "Clock", Pretend)
    monkeypatch.setattr(bench, "ceilings", lambda clock, dtype: {"copy_TB_s": 3.0, "bf16_TFLOP_s": 800.0})
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    saved = []
    slow = {"stubborn": stubborn, "wrong": wrong, "broken": broken}
    result = bench.run("cpu", ("cpu",), 1e3, True, lambda r: saved.append(json.dumps(r)), slow)
    assert len(saved) >= 4 and json.loads(saved[-1])["not_reached"] == [] and len(result["cases"]) == 2
    for row in result["cases"]:
        found = row["contenders"]
        layers = row["pools"]
        assert found["cpu"]["graph_us"] == 7.0 and found["cpu"]["eager_us"] == 80.0 / layers
        assert found["cpu"]["step_us"] == pytest.approx(found["cpu"]["plan_us"] / bench.LAYERS + 80.0 / layers)
        assert "not captured" in found["stubborn"]["graph_error"] and found["stubborn"]["graph_us"] is None
        assert "wrong: relative error" in found["wrong"]["left_out"] and "90 GB" in found["broken"]["left_out"]
    monkeypatch.setattr(bench, "SLOW", slow)
    text = bench.markdown(result)
    for part in ("| tiny 1,4 / 32,8 | 4/2 | cpu |", "wrong: relative error", "90 GB", "not captured", "flat cpu"):
        assert part in text
    assert bench.failures(result) == []  # peers may fail; ours may not
    result["ours"] = ["wrong"]
    assert len(bench.failures(result)) == 2


def test_when_the_time_is_up_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(bench, "ceilings", lambda clock, dtype: {"copy_TB_s": 3.0, "bf16_TFLOP_s": 800.0})
    result = bench.run("cpu", ("cpu",), -1.0, True)
    assert result["cases"] == [] and result["not_reached"] == ["tiny 1,4 / 32,8 (4/2)", "tiny draft (2/2)"]
    assert "not reached in time: tiny draft" in bench.markdown(result)


def test_the_table_has_the_cases_it_should():
    jobs = bench.jobs(tiny=False)
    assert len(jobs) == len({(case.name, heads) for case, heads in jobs})
    assert {case.name for case, _ in jobs} == {case.name for case in all_cases()}
    assert {heads for _, heads in jobs} == {"32/8", *bench.SWEEP}


# ------------------------------------------------------------------------------------------------ the command


def test_the_limits_stay_under_nine_minutes(tmp_path):
    run = command.Run(False, tmp_path, tmp_path)
    for elapsed in (0.0, 150.0, 300.0, 400.0, 519.0, 1000.0):
        run.begin = time.perf_counter() - elapsed
        for part in command.LIMITS:
            assert 1.0 <= run.limit(part) <= command.LIMITS[part]
            assert elapsed + run.limit(part) <= max(command.TOTAL, elapsed + 1.0)
    run.begin = time.perf_counter() - command.LIMITS["build"] - command.LIMITS["checks"]  # both took all they may
    assert run.limit("benchmark") > 100


def test_a_command_that_hangs_is_ended_with_its_children(tmp_path):
    mark = tmp_path / "mark"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(mark)!r}).touch()"
    parent = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    step = command.call([sys.executable, "-c", parent], 1.5, tmp_path / "log")
    assert step["code"] == "stopped after 2 s" and step["seconds"] < 3
    time.sleep(3)
    assert not mark.exists(), "its child went on"
    assert "No such file" in command.call(["/nowhere/at/all"], 5)["code"]


def test_a_part_that_breaks_stops_no_other(tmp_path):
    run = command.Run(True, tmp_path, tmp_path)

    def breaks(run):
        raise RuntimeError("nothing works")

    run.part("build", breaks)
    run.result["tests"]["x"] = dict(tests=3, failures=1, errors=0, skipped=1, skip_reasons=["no GPU"],
                                    failed=[dict(name="a::b", message="off by one")])  # fmt: skip
    run.result["steps"]["memcheck"] = dict(command="", code=77, seconds=0.0)
    run.save()
    written = json.loads((tmp_path / "gpu_check.json").read_text())
    assert command.problems(written) == ["build: RuntimeError: nothing works", "a::b: off by one"]
    text = (tmp_path / "gpu_check.md").read_text()
    assert "**2 failed**" in text and "| memcheck | skipped |" in text and "skipped: no GPU" in text
    assert "| x | 3 | 1 | 0 | 1 |" in text and "**failed**: a::b: off by one" in text


def test_headers_of_pybind11_are_found_without_its_package(monkeypatch):
    missing = subprocess.CompletedProcess([], 1, "", "No module named pybind11")
    monkeypatch.setattr(command.subprocess, "run", lambda *a, **k: missing)
    (option,) = command.pybind11_options()
    folder = Path(option.removeprefix("-DANABRANCH_PYBIND11_INCLUDE="))
    assert (folder / "pybind11" / "pybind11.h").exists()


def test_every_file_of_tests_gpu_is_a_group():
    groups = command.test_groups(dry=False)
    files = [file for group in groups.values() for file in group]
    assert len(files) == len(set(files)) and all((ROOT / file).exists() for file in files)
    assert {f"tests/gpu/{file.name}" for file in GPU.glob("test_*.py")} < set(files)
    assert {"tests/kernels/test_triton_kernels.py", "tests/kernels/test_branch_triton.py"} < set(files)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run the command itself")
def test_without_a_gpu(tmp_path, capsys):
    assert command.main(["--out", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().out and not list(tmp_path.iterdir())
    # The command itself, from the build to the table.
    done = subprocess.run(
        [sys.executable, str(GPU / "run.py"), "--dry-run", "--out", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / "gpu_check.json").read_text())
    assert set(result["steps"]) == {"build", "tests all", "memcheck", "benchmark"} and result["failed"] == []
    assert result["tests"]["all"]["skipped"] == result["tests"]["all"]["tests"] > 200
    assert result["steps"]["memcheck"]["code"] == command.SKIPPED
    assert [row["case"] for row in result["benchmark"]["cases"]] == ["tiny 1,4 / 32,8", "tiny draft"]
    text = (tmp_path / "gpu_check.md").read_text()
    assert done.stdout.endswith(text + "\n") and text.rstrip().splitlines()[-1].startswith("- flashinfer")
