"""Problems among sentences that have nothing to do with them."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import pytest
from test_compare import Words, run

from anabranch.cli.comparison import PRESETS
from anabranch.evaluation.comparison import BillsTask, BuriedTask, Store, cells, find_task
from anabranch.evaluation.comparison.buried import buried_of, filler
from anabranch.evaluation.comparison.plots import save_plots
from anabranch.strategies import registry


@pytest.mark.parametrize("words", [0, 1, 50, 400])
@pytest.mark.parametrize("inner", ["bills", "bills(parts=5)", "whereabouts"])
def test_all_of_the_problem_is_there_in_its_order_and_the_question_last(inner, words):
    plain = find_task(inner).items(4, 7)
    for item, buried in zip(plain, find_task(f"buried({inner},filler={words})").items(4, 7), strict=True):
        *facts, question = re.findall(r"[^.?]+[.?]", item.prompt)
        places = [buried.prompt.index(fact.strip()) for fact in facts]
        assert places == sorted(places) and buried.prompt.endswith(question.strip())
        assert buried.answer == item.answer
        rest = len(buried.prompt.split()) - len(item.prompt.split())
        assert words <= rest < words + 20 and (words or buried.prompt == item.prompt)


def test_filler_holds_nothing_that_a_problem_may_ask_for():
    sentences = filler(3000, random.Random(1))
    assert len(set(sentences)) == len(sentences) > 200
    text = " ".join(sentences)
    assert not re.search(r"\d|cent|buys|keeps", text)
    names = {name for n in range(50) for name in re.findall(r"(\w+) buys", BillsTask(12).items(1, n)[0].prompt)}
    assert len(names) == 12 and not names & set(text.split())


def test_lines_stay_lines_and_seeds_differ():
    task = BuriedTask(Words(text="Two lines.\nSay something"), 30)
    first, second = task.items(2, 0)
    assert first.prompt.splitlines()[-1] == "Say something 0 0" and "Two lines." in first.prompt.splitlines()[0]
    assert first.prompt != second.prompt and task.items(2, 0)[0].prompt == first.prompt
    assert task.items(1, 1)[0].prompt.splitlines()[0] != first.prompt.splitlines()[0]
    assert task.name == "buried(words,filler=30)" and buried_of(task.name) == ("words", 30)
    assert buried_of("words") is None


def test_a_prompt_of_chat_messages_is_refused():
    class Chats(Words):
        def items(self, count, seed):
            return [replace(item, prompt=[{"role": "user", "content": "x"}]) for item in super().items(count, seed)]

    with pytest.raises(ValueError, match="chat messages cannot be buried"):
        BuriedTask(Chats(), 5).items(1, 0)


def test_answers_of_our_own_tasks():
    bill, where = find_task("bills").items(1, 0)[0], find_task("whereabouts").items(1, 0)[0]
    assert bill.score(f"The answer is {bill.answer}.") == 1.0
    assert bill.score("The answer is " + re.sub(r"\d+$", "1", bill.answer)) == 0.0
    assert where.score(f"It is kept in the {where.answer}.") == 1.0 and where.score("In the fridge.") == 0.0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("buried(bills)", "expected buried"),
        ("buried(bills,filler=many)", "expected buried"),
        ("buried(bils,filler=3)", "did you mean bills"),
        ("bills(parts=1)", "a number from 2 to 12"),
        ("bills(people=3)", "no option 'people'; pass parts=NUMBER"),
        ("multiplication(x=1)", "it takes none"),
        ("whereabouts(parts=3)", "people=NUMBER"),
        ("berried(bills,filler=3)", "did you mean buried"),
    ],
)
def test_mistakes(name, said):
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        find_task(name)


def test_the_preset_s_names_are_good_and_its_results_are_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib (pip install 'anabranch[plots]')")
    preset = PRESETS["context-rot"]
    assert [registry.spelled(name) for name in preset.strategies]
    names = [find_task(name).name for name in preset.tasks]
    assert len({buried_of(name) for name in names}) == len(names) and None not in map(buried_of, names)
    with Store(None) as store:
        tasks = [BuriedTask(Words(text="Say. Something"), n) for n in (0, 20)]
        run(store, tasks=tasks, problems=1, seeds=(0,), strategies=["plain", "select-passages"])
        found = cells(store.rows())
    paths = save_plots(found, tmp_path)
    assert [path.name for path in paths] == ["compare-accuracy.svg", "compare-cost.svg", "compare-context.svg"]
    drawn = paths[-1].read_text()
    assert len(re.findall("<!-- (plain|select-passages.*?) -->", drawn)) == 2 and "have nothing to do" in drawn
