"""The benchmarks of serving with tiny models and a make-believe vLLM: everybody writes all tokens of all requests."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from engine_kit import Nested, byte_tokenizer, make_engine, make_model

import anabranch as ab
from benchmarks import plots, remote, report, report_load, serve
from benchmarks.programs import Ended, Program
from benchmarks.serve import CASES, Case
from benchmarks.serve_peers import ContinuousBatching, OneAfterAnother, VLLMArrivals

TEXTS = [[5] * 20 + [i] for i in range(2, 6)]
# As much of vLLM as the program uses. An engine's step gives a token to each sample of each request there is.
VLLM = """
from types import SimpleNamespace as Named
__version__ = "0.0"
class SamplingParams(Named):
    pass
class Engine:
    def __init__(self):
        self.there, self.cached = {}, set()
    def add_request(self, name, prompt, params):
        ids = tuple(prompt["prompt_token_ids"][:16])
        self.there[name] = [Named(index=i, token_ids=[7]) for i in range(params.n)], params, 16 * (ids in self.cached)
        self.cached.add(ids)
        assert params.ignore_eos and params.min_tokens == params.max_tokens and params.output_kind == "delta"
        self.left = {**getattr(self, "left", {}), name: params.max_tokens}
    def has_unfinished_requests(self):
        return bool(self.there)
    def step(self):
        assert self.there, "a step of nobody"
        told = []
        for name, (samples, params, found) in list(self.there.items()):
            told += [Named(request_id=name, outputs=[sample], num_cached_tokens=found) for sample in samples]
            self.left[name] -= 1
            if not self.left[name]:
                del self.there[name]
        return told
class LLM:
    def __init__(self, **options):
        if options["model"] == "broken":
            raise ValueError("no such model")
        assert options["enable_prefix_caching"] and options["max_model_len"] >= 24
        self.llm_engine = Engine()
    def reset_prefix_cache(self):
        self.llm_engine.cached.clear()
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The Python of an environment that has a vLLM."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text(VLLM)
    (tmp_path / "vllm" / "sampling_params.py").write_text("class RequestOutputKind:\n    DELTA = 'delta'\n")
    (tmp_path / "torch.py").write_text("__version__ = '0.0'\ndef get_num_threads():\n    return 1\n")
    found = tmp_path / "python"
    found.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}" exec "{sys.executable}" "$@"\n')
    found.chmod(0o755)
    return found


def checked(name: str, contender: serve.Serve, branches: int) -> dict:
    requests = serve.arrivals(TEXTS, 50.0)
    assert [r.at for r in requests] == sorted(r.at for r in requests) and requests[0].at == 0
    seconds, found = contender(requests, branches, 3)
    assert all(len(r.times) == branches for r in requests)
    assert all(len(times) == 3 and times == sorted(times) for r in requests for times in r.times.values())
    entry = serve.entry(name, f"{branches}", 50.0, requests, seconds, hit_rate=found, dtype="float32")
    assert (
        0 < entry["first_p50"] <= entry["first_p99"] <= entry["seconds"] and 0 <= entry["gap_p50"] <= entry["gap_p99"]
    )
    assert entry["tokens"] == 12 * branches
    return entry


def test_everybody_answers_all(python: Path, tmp_path: Path) -> None:
    model = make_model()
    model.set_attn_implementation("sdpa")
    vllm = VLLMArrivals(python, tmp_path, "float32", 24)
    assert vllm.title == "vLLM 0.0, CPU build"
    ours = serve.Ours(make_model(), num_pages=64)
    contenders = {"anabranch": ours, "vllm": vllm, "continuous": ContinuousBatching(model),
                  "generate": OneAfterAnother(model)}  # fmt: skip
    try:
        entries = [checked(name, call, branches) for branches in (1, 2) for name, call in contenders.items()]
    finally:
        vllm.close()
    found = {e["contender"]: e["hit_rate"] for e in entries[:4]}
    assert found["anabranch"] > 0 and found["vllm"] == pytest.approx(3 * 16 / (4 * 21)) and found["generate"] == 0
    left = {"contender": "vllm", "title": "vLLM", "answers": "x", "rate": 1.0, "dtype": "float32", "requests": 4,
            "left_out": "gone"}  # fmt: skip
    data = {"machine": {"cpu": "X", "cores": 2, "isa": [], "threads": 1, "os": "L", "python": "3", "versions": {},
                        "date": "today"}, "serve": [*entries, left]}  # fmt: skip
    assert report_load.serve_table(data).row_count == 9
    assert "vLLM: gone" in report.markdown(data) and "Transformers continuous batching" in report.markdown(data)
    pytest.importorskip("matplotlib")
    files = plots.draw(data, tmp_path / "figures")
    assert [f.name for f in files] == ["benchmark-serving.svg", "benchmark-serving.png"]


def test_a_run_goes_on_without_who_fails(monkeypatch: pytest.MonkeyPatch, python: Path, tmp_path: Path) -> None:
    def load(name, dtype, **more):
        model = make_model().to(dtype)
        model.set_attn_implementation(more.get("attn_implementation", "eager"))
        return model, byte_tokenizer()

    class Broken(ContinuousBatching):
        def __call__(self, requests, branches, new_tokens):
            if branches > 1:
                raise RuntimeError("not this one")
            return super().__call__(requests, branches, new_tokens)

    monkeypatch.setattr(ab, "models", SimpleNamespace(load=load, path=lambda name: "broken"))
    monkeypatch.setattr(serve, "ContinuousBatching", Broken)
    entries = list(serve.run(True, "float32", [50.0], 2, ("plain", "4 branches"), python))
    assert [e["contender"] for e in entries] == 2 * list(serve.TITLES)
    left = {(e["contender"], e["answers"]): e["left_out"] for e in entries if "left_out" in e}
    assert set(left) == {("vllm", "plain"), ("vllm", "4 branches"), ("continuous", "4 branches")}
    assert "ended with status 1" in left["vllm", "plain"] and left["continuous", "4 branches"] == "not this one"


def test_prompts_share_what_they_are_to_share() -> None:
    tokenizer = byte_tokenizer()
    plain, shared = (serve.prompts(tokenizer, 16, case) for case in (CASES["plain"], Case(shared=64, of=8)))
    assert len(plain) == len(shared) == 16 and len({tuple(ids) for ids in shared}) == 16
    begins = [tuple(ids[:60]) for ids in shared]
    assert sorted(begins.count(b) for b in set(begins)) == [8, 8] and begins[:8].count(begins[0]) < 8
    assert [serve.percentile([3.0, 1.0, 2.0], p) for p in (0.5, 0.99, 0.1)] == [2.0, 3.0, 1.0]


def test_a_program_that_ends_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "program.py"
    file.write_text(
        "import os\nassert 'PYTHONPATH' not in os.environ\nprint('noise\\nANSWER {}', flush=True)\ninput()\n"
    )
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    program = Program([sys.executable, file])
    assert program.about == {}
    with pytest.raises(Ended, match=r"program.py ended with status 0"):
        program.ask({})
    with pytest.raises(Ended):
        program.ask({})
    program.close()


def test_threads_beside_the_same_threads_one_after_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tokens are compared; problems that are not answered by threads do not count."""

    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps({"prompt": "x" * n, "threads": n}) + "\n" for n in range(1, 6)))
    monkeypatch.setattr(remote, "PROBLEMS", problems)
    monkeypatch.setattr(remote, "WAYS", {"threads": Nested, "sequential": lambda: ab.Sequential(Nested())})
    engine = make_engine(tokenizer=byte_tokenizer())
    first, entry = remote.run(engine, 2, 2, 60, report=lambda line: None)
    assert first["by_problem"] == entry["by_problem"][:1]
    assert entry["problems"] == entry["same_tokens"] == 2 and entry["rounds"] == 2
    assert all(len(seconds) == 2 for p in entry["by_problem"] for seconds in p["seconds"].values())
    assert entry["tokens_by_critical"] > 1 and entry["ratios"]["least"] <= entry["ratio"] <= entry["ratios"]["most"]
    assert "same tokens" in remote.line(entry["by_problem"][0])
    monkeypatch.setattr(remote, "WAYS", dict.fromkeys(remote.WAYS, lambda: None))
    with pytest.raises(ValueError, match="no problem by threads"):
        next(remote.run(engine, 2, 1, 5, report=lambda line: None))
