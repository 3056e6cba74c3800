"""`anabranch compare`: every combination once, whatever happens on the way."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from engine_kit import byte_tokenizer, make_engine, make_model
from typer.testing import CliRunner

import anabranch as ab
from anabranch.cli.app import app
from anabranch.evaluation.comparison import Budget, Item, Store, cells, compare, find_task, read_budget, task_names
from anabranch.evaluation.comparison.plots import save_plots
from anabranch.evaluation.comparison.summary import ALL
from anabranch.evaluation.comparison.tasks import given_answer
from anabranch.evaluation.evaluate import wilson

ROOT = Path(__file__).resolve().parents[2]
STRATEGIES = ["plain", "self-consistency(n=2)"]


@dataclass(frozen=True)
class Words:
    """A task that accepts any answer with an "e" in it, and raises for some problems."""

    name: str = "words"
    broken: tuple[int, ...] = ()
    text: str = "Say something"

    def items(self, count: int, seed: int) -> list[Item]:
        return [Item(f"{self.text} {seed} {i}", "e", self._score(i)) for i in range(count)]

    def _score(self, number: int):
        def score(text: str) -> float:
            if number in self.broken:
                raise KeyError(f"problem {number}")
            return float("e" in text)

        return score


def engine():
    return make_engine(tokenizer=byte_tokenizer(), num_pages=200, page_size=8)


def run(store: Store, tasks=(Words(),), strategies=STRATEGIES, engines=None, **options):
    options = {"problems": 3, "seeds": (0, 1), "max_new_tokens": 6, **options}
    return compare(engines or {"tiny": engine}, strategies, tasks, store, **options)


def told(store: Store) -> list[tuple]:
    """What cannot differ between two runs: everything but times."""
    return [(row.key, row.prompt_sha256, row.text, row.score, row.error) for row in store.rows()]


# ------------------------------------------------------------------------------------------------ running


def test_every_combination_is_there_once_and_is_not_run_again(tmp_path):
    path = tmp_path / "r.sqlite"
    with Store(path) as store:
        first = run(store)
        assert (first.new, first.there, first.stopped, first.skipped) == (12, 0, None, [])
        rows = told(store)
    assert {(key.strategy, key.seed, key.problem) for key, *_ in rows} == {
        (s, seed, n) for s in STRATEGIES for seed in (0, 1) for n in range(3)
    }
    with Store(path) as store:

        def never():
            raise AssertionError("nothing is left to run")

        again = run(store, engines={"tiny": never})
        assert (again.new, again.there) == (0, 12) and told(store) == rows
        more = run(store, problems=4)
        assert (more.new, more.there) == (4, 12)
        assert len(store.runs()) == 3 and store.runs()[0]["versions"]["torch"]
        assert store.runs()[0]["strategies"]["plain"] == "Plain()"
    with Store(None) as store:  # a store of its own: the same answers
        run(store)
        assert told(store) == rows


def test_an_answer_is_that_of_the_engine_alone():
    with Store(None) as store:
        run(store, problems=1, seeds=(0,))
        plain = next(row for row in store.rows() if row.key.strategy == "plain")
    prompt = [{"role": "user", "content": "Say something 0 0"}]
    want = engine().generate(prompt, max_new_tokens=6)
    assert plain.text == want.text and plain.metrics["total_tokens"] == want.metrics.total_tokens


def test_several_at_a_time_are_the_same_answers_and_other_results(tmp_path):
    with Store(tmp_path / "r.sqlite") as store:
        run(store)
        alone = {row.key[:5]: (row.text, row.score) for row in store.rows()}
        many = run(store, batch=5, tasks=[Words(broken=(1,))])
        assert (many.new, many.there) == (12, 0) and json.loads(many.settings)["batch"] == 5
        rows = [row for row in store.rows() if row.key.settings == many.settings]
        assert {row.key[:5]: row.text for row in rows} == {key: text for key, (text, _) in alone.items()}
        assert sum(row.error is not None for row in rows) == 4
        assert run(store, batch=5).new == 0


def test_several_at_a_time_end_with_what_ends_the_run(monkeypatch):
    one = engine()
    with Store(None) as store, pytest.raises(KeyboardInterrupt):
        run(store, batch=4, engines={"tiny": lambda: one}, report=interrupt_at(7), max_new_tokens=20)
    one.clear_prefix_cache()
    assert one.cache.usage().pages_free == 200
    with pytest.raises(ValueError, match="batch=2: Alone answers one problem at a time"):
        run(Store(None), batch=2, engines={"tiny": Alone})
    with pytest.raises(ValueError, match="batch"):
        run(Store(None), batch=0)


class Alone:
    """An engine that has no `add`."""

    tokenizer = byte_tokenizer()


def interrupt_at(count: int):
    calls = []

    def report(*_: object) -> None:
        calls.append(0)
        if len(calls) == count:
            raise KeyboardInterrupt

    return report


def test_other_spellings_of_a_strategy_are_the_same_one():
    with Store(None) as store:
        run(store)
        other = run(store, strategies=["None", "Self_Consistency( n = 2 )"])
        assert (other.new, other.there) == (0, 12)


def test_a_verifier_that_raises_is_an_error_and_the_run_goes_on(tmp_path):
    with Store(tmp_path / "r.sqlite") as store:
        outcome = run(store, tasks=[Words(broken=(1,)), Words("other")])
        assert outcome.new == 24
        errors = [row for row in store.rows() if row.error is not None]
        assert len(errors) == 4 and all(row.key.task == "words" and row.key.problem == 1 for row in errors)
        assert errors[0].error == "verifier: KeyError: 'problem 1'" and errors[0].metrics["total_tokens"] > 0
        cell = next(c for c in cells(store.rows()) if (c.task, c.strategy) == ("words", "plain"))
        assert (cell.problems, cell.errors) == (6, 2) and cell.first_error.startswith("verifier")
        assert cell.accuracy == cell.right / 4 and cell.accuracy_95 == wilson(cell.right, 4)
        assert run(store, tasks=[Words(), Words("other")]).new == 0  # an error is a result …
        assert store.forget_errors() == 4
        assert run(store, tasks=[Words(), Words("other")]).new == 4  # … until it is to be tried again
        assert not [row for row in store.rows() if row.error is not None]


def test_a_generation_that_raises_is_an_error_and_holds_no_page():
    one = make_engine(tokenizer=byte_tokenizer(), num_pages=6, page_size=4)
    with Store(None) as store:
        outcome = run(store, tasks=[Words(text="far too long for so few pages " * 3)], engines={"tiny": lambda: one})
        assert outcome.new == 12
        assert all("num_pages" in row.error and row.metrics is None for row in store.rows())
        (cell, *_) = cells(store.rows())
        assert cell.accuracy is None and cell.errors == cell.problems and cell.total_tokens == 0
    assert one.cache.usage().pages_free == 6


def test_what_does_not_fit_a_model_is_left_out_with_the_reason():
    with Store(None) as store:
        outcome = run(store, strategies=["plain", "threadweaver", "sequential(threadweaver)"])
        assert outcome.new == 6 and [skip.what for skip in outcome.skipped] == [
            "threadweaver",
            "sequential(threadweaver)",
        ]
        assert "vocabulary" in outcome.skipped[0].why
    with Store(None) as store:
        real = {"multiplication": lambda: ab.Engine(*ab.models.load("multiplication"), num_pages=64)}
        tasks = [Words(), find_task("multiplication")]
        outcome = run(store, tasks=tasks, strategies=["threadweaver"], engines=real, seeds=(0,), max_new_tokens=400)
        assert [skip.what for skip in outcome.skipped] == ["words"] and outcome.new == 3
        (cell, total) = cells(store.rows(), outcome.keys)
        assert cell.task == "multiplication" and cell.accuracy == 1.0 and cell.trigger_rate > 0
        assert total.task == ALL and total.total_tokens == cell.total_tokens > cell.critical_path_tokens


def test_a_budget_ends_it_and_the_rest_follows(tmp_path):
    with Store(tmp_path / "r.sqlite") as store:
        some = run(store, budget=Budget(tokens=20))
        spent = sum(row.metrics["total_tokens"] for row in store.rows())
        assert some.stopped == "budget" and 20 <= spent <= 20 + 12 and some.new < 12
        assert run(store, budget=Budget(seconds=0)).new == 0
        rest = run(store)
        assert rest.stopped is None and (rest.there, rest.new) == (some.new, 12 - some.new)


def test_models_share_a_budget_and_strategies_stay_level():
    with Store(None) as store:
        run(store, engines={"a": engine, "b": engine}, budget=Budget(tokens=80), problems=9)
        by_model = {name: [row for row in store.rows() if row.key.model == name] for name in "ab"}
        assert all(by_model.values())
        for rows in by_model.values():
            counts = [sum(row.key.strategy == s for row in rows) for s in STRATEGIES]
            assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("20000tok", Budget(tokens=20000)),
        ("1.5ktok", Budget(tokens=1500)),
        ("300s", Budget(seconds=300)),
        ("5 min", Budget(seconds=300)),
    ],
)
def test_budgets(text, budget):
    assert read_budget(text) == budget


@pytest.mark.parametrize("text", ["20000", "0tok", "-3s", "soon", ""])
def test_no_budget(text):
    with pytest.raises(ValueError, match="such as 20000tok or 300s"):
        read_budget(text)


# ------------------------------------------------------------------------------------------------ killed


CHILD = """
import sys
sys.path[:0] = [{kits!r}, {here!r}]
from test_compare import Store, run
with Store({path!r}) as store:
    run(store, problems=20, seeds=(0,))
"""


@pytest.mark.parametrize("after", [1, 5])
def test_killed_at_any_moment_it_loses_and_doubles_nothing(tmp_path, after):
    path = str(tmp_path / "r.sqlite")
    code = CHILD.format(kits=str(ROOT / "tests/kits"), here=str(Path(__file__).parent), path=path)
    env = {**os.environ, "PYTHONPATH": str(Path(ab.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "-c", code], env=env)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and child.poll() is None:
        try:
            with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
                if database.execute("SELECT count(*) FROM results").fetchone()[0] >= after:
                    break
        except sqlite3.OperationalError:
            pass  # not there yet
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    with Store(path) as store:
        before = told(store)
        assert after <= len(before) < 40
        outcome = run(store, problems=20, seeds=(0,))
        assert (outcome.there, outcome.new) == (len(before), 40 - len(before))
        now = told(store)
        assert len(now) == len({key for key, *_ in now}) == 40
        assert set(before) <= set(now)
    with Store(None) as store:
        run(store, problems=20, seeds=(0,))
        assert told(store) == now


# ------------------------------------------------------------------------------------------------ stores


def test_a_store_of_another_schema_or_no_store_is_refused(tmp_path):
    path = tmp_path / "r.sqlite"
    Store(path).close()
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 7")
    with pytest.raises(ValueError, match="schema is version 7, this anabranch reads 1"):
        Store(path)
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as database:
        database.execute("CREATE TABLE mine (x)")
    with pytest.raises(ValueError, match="a database of something else"):
        Store(other)
    text = tmp_path / "notes.txt"
    text.write_text("not a database, but long enough to look at " * 30)
    before = text.read_bytes()
    with pytest.raises(ValueError, match="no result store"):
        Store(text)
    assert text.read_bytes() == before
    with pytest.raises(OSError, match="cannot be opened"):
        Store(tmp_path / "no" / "such" / "folder.sqlite")


def test_a_full_disk_is_told_and_what_is_there_stays(tmp_path):
    path = tmp_path / "r.sqlite"
    with Store(path) as store:
        run(store, problems=1)
        before = told(store)
        store._db.execute("PRAGMA max_page_count = 1")  # SQLite's own way to run out of room
        long = Words("w" * 20000)
        with pytest.raises(OSError, match=r"full.*what it holds is safe"):
            run(store, tasks=[long])
    with Store(path) as store:
        assert told(store) == before and run(store, problems=1).new == 0


def test_problems_that_have_changed_are_not_mixed():
    with Store(None) as store:
        run(store)
        with pytest.raises(ValueError, match="is not the one that the task gives now"):
            run(store, tasks=[Words(text="Say another thing")])
        assert len(store.rows()) == 12


# ------------------------------------------------------------------------------------------------ tasks


def test_names_of_tasks_and_their_mistakes(tmp_path):
    assert find_task("Multiplication").name == "multiplication"
    prompts = [[item.prompt for item in find_task("multiplication").items(5, seed)] for seed in (0, 0, 1)]
    assert prompts[0] == prompts[1] != prompts[2]
    item = find_task("multiplication").items(1, 0)[0]
    a, _, b = item.prompt.split()
    assert item.answer == str(int(a) * int(b)) and item.score(f"so it is {item.answer}") == 1.0
    with pytest.raises(ValueError, match="did you mean chain_sum"):
        find_task("chain_sun")
    with pytest.raises(ValueError, match="no such file"):
        find_task(str(tmp_path / "x.jsonl"))
    with pytest.raises(ValueError, match="is not option=value"):
        find_task("chain_sum(3)")
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{i}", "answer": i}) + "\n" for i in range(5)))
    mine = find_task(str(path))
    assert mine.name == "mine.jsonl" and len(mine.items(9, 0)) == 5 and len(mine.items(2, 0)) == 2
    path.write_text("{}")
    with pytest.raises(ValueError, match="line 1"):
        find_task(str(path))


def test_without_reasoning_gym_the_command_that_brings_it_is_told(monkeypatch):
    from anabranch.evaluation.comparison import tasks

    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'anabranch\[compare\]'"):
        find_task("chain_sum")
    assert find_task("multiplication").name == "multiplication"


@pytest.mark.parametrize("name", task_names()[1:])
def test_reasoning_gym_s_own_answers_are_right_and_others_are_not(name):
    pytest.importorskip("reasoning_gym", reason="needs reasoning-gym (pip install 'anabranch[compare]')")
    task = find_task(name)
    items = task.items(2, 3)
    assert [item.prompt for item in items] == [item.prompt for item in task.items(2, 3)]
    for item in items:
        assert item.score(f"Let me think.\nAnswer: {item.answer}") > 0.99
        assert item.score("I do not know, sorry!") < 0.5
    assert find_task(f"{name}()").name == name


def test_an_answer_that_a_verifier_cannot_read_is_wrong_and_a_broken_verifier_raises(monkeypatch):
    pytest.importorskip("reasoning_gym", reason="needs reasoning-gym (pip install 'anabranch[compare]')")
    from reasoning_gym.arithmetic.prime_factorization import PrimeFactorizationDataset

    (item,) = find_task("prime_factorization").items(1, 0)
    assert item.score("no idea") == 0.0
    monkeypatch.setattr(PrimeFactorizationDataset, "score_answer", lambda self, answer, entry: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        item.score("no idea")


def test_options_of_a_task():
    pytest.importorskip("reasoning_gym", reason="needs reasoning-gym (pip install 'anabranch[compare]')")
    task = find_task("chain-sum(max_terms=3, min_terms=3)")
    assert task.name == "chain_sum(max_terms=3,min_terms=3)"
    assert all(len([t for t in item.prompt.split() if t in "+-"]) == 2 for item in task.items(4, 0))
    with pytest.raises(ValueError, match="does not take these options"):
        find_task("chain_sum(colour=red)").items(1, 0)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer> 2 × 433 </answer> or so", "2 × 433"),
        ("First.\nThe answer is noremopyh.", "noremopyh"),
        ("a, b, c\n\nAnswer: c, b", "c, b"),
        ("one\ntwo words\n\n", "two words"),
        ("", ""),
    ],
)
def test_what_a_verifier_is_shown(text, answer):
    assert given_answer(text) == answer


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    make_model("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def invoke(*arguments: str, code: int = 0):
    result = CliRunner().invoke(app, ["compare", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, (result.output, result.stderr, result.exception)
    return result


def test_the_command_prints_a_table_and_one_json_object(tiny, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib (pip install 'anabranch[plots]')")
    store, plots = str(tmp_path / "r.sqlite"), tmp_path / "plots"
    base = ["--models", tiny, "--strategies", "plain,self-consistency(n=2,vote=line)", "--tasks", "multiplication",
            "--problems", "2", "--seeds", "2", "--max-new-tokens", "5", "--store", store]  # fmt: skip
    shown = invoke(*base, "--plots", str(plots)).output
    for word in ("self-consistency(n=2,vote=line)", "critical", "deciding", "broken", "all tasks", "8 results are new"):
        assert word in shown
    assert sorted(p.name for p in plots.iterdir()) == ["compare-accuracy.svg", "compare-cost.svg"]
    out = json.loads(invoke(*base, "--json").stdout)
    assert out["schema"] == "anabranch.compare" and out["results"] == {"new": 0, "there": 8}
    assert [cell["strategy"] for cell in out["cells"]] == ["plain", "self-consistency(n=2,vote=line)"]
    for cell in (*out["cells"], *out["totals"]):
        assert cell["problems"] == 4 and cell["accuracy"] == 0.0 and 0 < cell["overhead"] < 1
        assert cell["pages_peak"] > 0 and cell["longest_context"] > 5 and cell["wall_seconds"] > 0
    assert out["cells"][1]["trigger_rate"] == 1.0 and out["cells"][0]["trigger_rate"] == 0.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--preset", "slow"], "expected one of quick, full"),
        (["--strategies", "self-consistancy"], "did you mean self-consistency"),
        (["--strategies", "plain,self-consistency(n=0)"], "n=0"),
        (["--strategies", ","], "--strategies is empty"),
        (["--strategies", "a(b"], "not closed"),
        (["--tasks", "multiplicaton"], "did you mean multiplication"),
        (["--models", "multiplikation"], "did you mean multiplication"),
        (["--budget", "soon"], "such as 20000tok or 300s"),
    ],
)
def test_mistakes_on_the_command_line(arguments, said, tmp_path):
    store = tmp_path / "r.sqlite"
    models = [] if "--models" in arguments else ["--models", "multiplication"]
    tasks = [] if "--tasks" in arguments else ["--tasks", "multiplication"]
    result = invoke(*arguments, *models, *tasks, "--store", str(store), code=2)
    assert said in result.stderr and "Traceback" not in result.stderr and not store.exists()


@pytest.mark.parametrize("preset", ["quick", "full"])
def test_presets_name_what_is_there(preset):
    pytest.importorskip("reasoning_gym", reason="needs reasoning-gym (pip install 'anabranch[compare]')")
    from anabranch.cli.comparison import PRESETS
    from anabranch.strategies import registry

    chosen = PRESETS[preset]
    assert len({registry.spelled(text) for text in chosen.strategies}) == len(chosen.strategies)
    for text in chosen.strategies:
        registry.parse(text)
    for text in chosen.tasks:
        assert find_task(text).items(1, 0)[0].prompt
    assert set(chosen.models) <= set(ab.models.names())
    if preset == "full":
        assert len(chosen.strategies) >= 12 and len(chosen.tasks) >= 8 and chosen.seeds >= 3
    else:
        assert read_budget(chosen.budget).seconds <= 540  # under ten minutes with the models loaded


def test_a_server_runs_the_model_and_one_that_is_gone_is_no_wrong_answer(tiny, tmp_path):
    from completions_server import completions_server

    store = str(tmp_path / "r.sqlite")
    base = ["--models", tiny, "--strategies", "plain,self-consistency(n=2)", "--tasks", "multiplication",
            "--problems", "2", "--max-new-tokens", "4", "--store", store, "--json"]  # fmt: skip
    with completions_server(make_model("llama"), byte_tokenizer()) as (url, _):
        out = json.loads(invoke(*base, "--url", url).stdout)
        unfit = ["aspects" if "," in value else value for value in [*base[:-2], str(tmp_path / "u.sqlite"), "--json"]]
        (cell,) = json.loads(invoke(*unfit, "--url", url).stdout)["cells"]  # needs KV of its own: an error each
        assert cell["errors"] == cell["problems"] == 2 and "local Engine" in cell["first_error"]
    assert out["results"] == {"new": 4, "there": 0} and out["cells"][0]["model"] == f"{tiny} at {url}"
    assert all(cell["errors"] == 0 and cell["total_tokens"] > 0 for cell in out["cells"])
    local = json.loads(invoke(*base).stdout)  # another model to the store
    assert local["results"] == {"new": 4, "there": 0}
    more = ["3" if value == "2" else value for value in base]
    gone = invoke(*more, "--url", url, code=1)
    assert "Traceback" not in gone.stderr and not gone.stdout
    assert "--models" in invoke("--url", url, "--store", store, code=2).stderr
    with Store(store) as kept:
        assert len(kept.rows()) == 8 and not [row for row in kept.rows() if row.error]


def test_interrupted_it_says_where_the_results_are(tiny, tmp_path, monkeypatch):
    from anabranch.engine import Engine

    store, answered = tmp_path / "r.sqlite", []
    generate = Engine.generate

    def twice(self, *arguments, **options):
        if len(answered) == 2:
            raise KeyboardInterrupt
        answered.append(1)
        return generate(self, *arguments, **options)

    base = ["--models", tiny, "--strategies", "plain", "--tasks", "multiplication", "--max-new-tokens", "3"]
    monkeypatch.setattr(Engine, "generate", twice)
    result = invoke(*base, "--store", str(store), code=130)
    assert "2 results are in" in result.stderr and "goes on from there" in result.stderr
    monkeypatch.undo()
    out = json.loads(invoke(*base, "--store", str(store), "--json").stdout)
    assert out["results"] == {"new": 2, "there": 2}


def test_a_store_that_is_none_is_told_in_words(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("not a database " * 100)
    result = invoke("--models", "multiplication", "--tasks", "multiplication", "--store", str(path), code=1)
    assert "no result store" in result.stderr and "Traceback" not in result.stderr


def test_plots_without_anything_to_draw():
    pytest.importorskip("matplotlib", reason="needs matplotlib (pip install 'anabranch[plots]')")
    with pytest.raises(ValueError, match="no result to draw"):
        save_plots([], ".")
