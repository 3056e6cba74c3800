"""pytest-benchmark cases, small ones: `pytest benchmarks/test_benchmarks.py` times, `--benchmark-disable` checks them.

Every case also checks what it computes, so that a fast wrong answer fails. The whole table is `python -m benchmarks`.
"""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import attention, branch, host, plots, report, step
from benchmarks.contenders import ALL, Unfit
from benchmarks.floor import Floor
from benchmarks.shapes import Case, all_cases, chunk, draft, levels
from benchmarks.store import Store
from benchmarks.timing import interleaved
from benchmarks.workload import TOLERANCE, Workload, oracle, relative_error, sampled_rows

SMALL = [
    levels("small tree", [1, 2, 8], [70, 33, 5]),
    levels("small forest", [2, 4], [40, 9]),
    levels("one-token leaves", [1, 6], [50, 1]),
    draft("small draft", 37, 9),
    chunk("small prefill", 45, 12),
]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", [n for n in ALL if n != "flex"])  # flex compiles for seconds: in the table alone
@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_attention(benchmark, case: Case, name: str, dtype: torch.dtype) -> None:
    work = Workload(case, 8, 2, 64, dtype)
    contender = ALL[name](work)
    try:
        contender.prepare()
    except Unfit as reason:
        pytest.skip(str(reason))
    rows = sampled_rows(case)
    out = benchmark(contender.call)
    assert out.shape == work.q.shape and out.dtype == dtype
    assert relative_error(out[rows], oracle(work, rows)) <= TOLERANCE[dtype]
    contender.finish()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_headline(benchmark, dtype: torch.dtype) -> None:
    work = Workload(next(c for c in all_cases() if c.group == "headline"), 32, 8, 128, dtype)
    contender = ALL["anabranch"](work)
    contender.prepare()
    out = benchmark.pedantic(contender.call, rounds=3, warmup_rounds=1)
    assert relative_error(out[:2], oracle(work, [0, 1])) <= TOLERANCE[dtype]


def test_step_of_1000_branches(benchmark) -> None:
    wood, cut = host.forest(512, 1000, 64), host.tile_config()
    wood.step(cut)
    benchmark.pedantic(wood.step, args=(cut,), rounds=20)
    assert all(b.length == wood.branches[0].length for b in wood.branches)


def test_fork_copies_nothing(benchmark) -> None:
    entry = benchmark.pedantic(host.fork_cost, args=(5,), rounds=1)
    assert entry["bytes_copied"] == 0


def test_memory_is_shared() -> None:
    entry = host.memory_held(8, 100, 20)
    assert entry["tokens_ideal"] <= entry["tokens_physical"] <= entry["tokens_ideal"] + 8 * 16


def test_cases_are_what_they_say() -> None:
    """Counts that the literature gives for these shapes, and the interval form of the mask against the tree itself."""
    cases = {c.name: c for c in all_cases()}
    assert len(cases) == len(all_cases()), "two cases of one name"
    for name, unique, logical in (
        ("few-shot 1,10 / 4000,400", 8_000, 44_000),
        ("1,16,64 / 1024,256,32", 7_168, 83_968),
        ("1,4,16,512 / 1024,256,128,32", 20_480, 737_280),
        ("forest 8,16,32,256 / 512,512,256,32", 28_672, 335_872),
    ):
        assert (cases[name].unique_tokens, cases[name].logical_tokens) == (unique, logical)
    for case in SMALL:
        work = Workload(case, 1, 1, 32, torch.float32)
        keys = torch.arange(case.unique_tokens)
        seen = (keys <= work.row_index[:, None]) & (work.row_index[:, None] < work.key_end)
        assert seen.sum(1).tolist() == case.row_lengths


def test_interleaved_rounds() -> None:
    order: list[str] = []
    timings = interleaved([lambda: order.append("a"), lambda: order.append("b")], rounds=3, cold=False)
    assert order == ["a", "b"] * 3
    assert [len(t.seconds) for t in timings] == [3, 3]


def test_a_wrong_contender_is_left_out(monkeypatch) -> None:
    class Wrong(ALL["sdpa"]):
        def variants(self):
            return {name: (lambda call=call: call() * 1.01) for name, call in super().variants().items()}

    monkeypatch.setitem(ALL, "sdpa", Wrong)
    floor = Floor(copy=1e10, fma=1e11)
    job = attention.Job(SMALL[0], "4/2", 32, torch.float32)
    result = attention.run_job(job, attention.Settings(contenders=("anabranch", "sdpa"), rounds=2, budget=0.1), floor)
    assert "wrong" in result["contenders"]["sdpa"]["left_out"]
    assert result["contenders"]["anabranch"]["rounds"] == 2


def test_results_become_tables_and_figures(tmp_path) -> None:
    store = Store(tmp_path / "results.json")
    floor = Floor(copy=1e10, fma=1e11, gemm={"float32": 9e10})
    store.set("floor", floor.as_dict())
    settings = attention.Settings(contenders=("anabranch", "sdpa", "two_phase"), rounds=2, budget=0.1)
    for case in SMALL[:2]:
        result = attention.run_job(attention.Job(case, "32/8", 128, torch.float32), settings, floor)
        store.put("attention", ("case", "heads", "head_dim", "dtype"), result)
        store.put("attention", ("case", "heads", "head_dim", "dtype"), result)  # replaces, does not double
    data = json.loads((tmp_path / "results.json").read_text())
    assert [e["case"] for e in data["attention"]] == [c.name for c in SMALL[:2]]
    assert data["machine"]["threads"] == torch.get_num_threads() and data["machine"]["versions"]["torch"]
    text = report.markdown(data)
    assert all(c.name in text for c in SMALL[:2]) and "two-phase torch" in text
    pytest.importorskip("matplotlib")
    files = plots.draw(data, tmp_path / "figures")
    assert [f.name for f in files] == ["benchmark-attention.svg", "benchmark-attention.png"]
    assert all(f.stat().st_size > 2000 for f in files)


@pytest.mark.parametrize("case", [branch.group(40, 3, 9), branch.fork_join(20, 2, 8, 2)], ids=["tree", "graph"])
def test_branch_attention(case, tmp_path) -> None:
    """Every contender that needs no compiler computes the same gradients; tables come out of the results."""
    names = ("anabranch", "masked", "separate")
    entry = branch.run_case(case, "4/2", 32, torch.float32, names=names, rounds=1, budget=0.1)
    assert entry["pairs"] == int(case.mask().dense().sum())
    for name, found in entry["contenders"].items():
        if name == "separate" and case.parents is None:
            assert "no sequence" in found["left_out"]
        else:
            assert found["relative_error"] <= 1e-5 and found["rounds"] == 1
    store = Store(tmp_path / "results.json")
    store.put("branch", ("case", "heads", "head_dim", "dtype"), entry)
    assert case.name in report.markdown(store.data) and "dense masked" in report.markdown(store.data)
    assert case.name in report.branch_line(entry) and report.branch_table(store.data).row_count == 1


def test_branch_subtrees() -> None:
    for case in branch.CASES:
        if case.parents is not None:
            ends, index = branch.subtree_ends(case), torch.arange(case.tokens)
            assert int((ends - index).sum()) == case.pairs


def small_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    small = dict(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = LlamaConfig(**small, num_key_value_heads=2, eos_token_id=1, pad_token_id=0)
    return LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()


def test_a_step_taken_apart(monkeypatch) -> None:
    """Every part has a time, and what cannot be had is left out with the reason."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    bench = step.Bench(small_model(), [3, 4, 5, 6], 4)
    entries = list(step.steps_of(bench, (1, 3), 1, Floor(copy=1e9, fma=1e10)))
    assert [(e["contender"], e["rows"]) for e in entries] == [(c, n) for n in (1, 3) for c in ("eager", "compiled")]
    for e in entries:
        if e["contender"] == "compiled":
            assert "no C++ compiler" in e["left_out"]
            continue
        assert e["of_floor"] > 1 and e["all_us"] >= e["decode_us"]
        assert min(e["linear_us"], e["attention_us"], e["sampling_us"]) > 0
    assert report.step_table({"step": entries}).row_count == 2


def test_a_replayed_step_is_a_replay():
    assert host.replay_cost(8, 4)["more"] == "4 of 4 steps were replays"
