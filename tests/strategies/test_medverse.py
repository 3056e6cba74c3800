"""MedVerse to the token: a graph of steps worked off, what each sees and where it stands, and every broken plan."""

from __future__ import annotations

import formats_kit
import pytest
from engine_kit import byte_tokenizer, make_engine
from malformed_kit import Habits, assert_same_everywhere, assert_survives
from tagged_kit import Stage

import anabranch as ab
from anabranch.strategies.tagged.graph import in_order, repaired

STAGE = Stage(ab.MedVerse().tags)


def plan(**needs: str) -> str:
    """`s3="1, 2"`: step 3 depends on 1 and 2."""
    lines = "".join(
        f"<Outline> Transient Step {name[1:]}: A -> {name[1:]}; Dependency: [{on}] </Outline>\n"
        for name, on in needs.items()
    )
    return f"<Plan>\n{lines}</Plan>"


def header(name: str) -> str:
    return f"<Step> Transient Step {name}: A -> {name}\n"


def size(text: str) -> int:
    return len(STAGE.ids(text))


def play(
    head: str, says: dict[str, str], sees: dict[str, str], end: str = "So.</Conclusion><eos>", prompt="q", **options
):
    """A plan worked off: what each step says (its </Step> added), and which steps it sees, in the plan's order."""
    whole = {name: header(name) + text + "</Step>" for name, text in says.items()}
    begin = prompt + head + "\n<Execution>\n"
    lines = [(prompt, head)]
    for name, text in says.items():
        seen = "".join(whole[other] for other in sees.get(name, ""))
        lines.append((begin + seen + header(name), text + "</Step>"))
    joined = head + "\n<Execution>\n" + "".join(whole.values()) + "</Execution>\n<Conclusion>\n"
    lines.append((prompt + joined, end))
    strategy = options.pop("strategy", ab.MedVerse())
    result = STAGE.play(prompt, *lines, strategy=strategy, **options)
    assert result.token_ids == STAGE.ids(joined + end)
    return result, whole, size(begin)


SAYS = {"1": "one is longest of all", "2": "two", "3": "three", "4": "four", "5": "five"}
GRAPH = plan(s1="", s2="", s3="1", s4="2", s5="3, 4")


def test_a_graph_is_worked_off_and_nothing_is_computed_twice():
    result, whole, base = play(GRAPH, SAYS, {"3": "1", "4": "2", "5": "34"})
    assert result.malformed == ()
    at = {name: kid for name, kid in zip(SAYS, result.tree.children, strict=True)}
    assert [at[n].start for n in "12"] == [base, base]
    assert (at["3"].start, at["4"].start) == (base + size(whole["1"]), base + size(whole["2"]))
    assert at["5"].start == max(at["3"].stop, at["4"].stop)
    assert [kid.sees for kid in result.tree.children] == [
        (), (), (("0.0", size(whole["1"])),), (("0.1", size(whole["2"])),),
        (("0.2", size(whole["3"])), ("0.3", size(whole["4"]))),
    ]  # fmt: skip
    conclusion = next(run for run in result.tree.runs if run.kind == "inserted" and run.position > base)
    assert conclusion.position == max(kid.stop for kid in result.tree.children)
    assert result.metrics.rows == 1 + result.metrics.total_tokens - 1


def test_a_plan_in_the_prompt_is_not_the_one_just_written():
    example = plan(s7="", s8="7") + "\nNow yours.\n"
    result, _, _ = play(plan(s1="", s2="1"), {"1": "one", "2": "two"}, {"2": "1"}, prompt=example)
    assert result.malformed == () and len(result.tree.children) == 2


def test_a_step_starts_as_soon_as_its_own_dependencies_are_done():
    """Step 4 needs 2 alone: it is over before 1, on which 3 waits."""
    result, _, _ = play(GRAPH, SAYS | {"1": "x" * 60}, {"3": "1", "4": "2", "5": "34"})
    longest = size(header("1")) + 61 + size(header("3") + "three</Step>" + header("5") + "five</Step>")
    outside = size(GRAPH + "\n<Execution>\n</Execution>\n<Conclusion>\nSo.</Conclusion><eos>")
    assert result.metrics.critical_path_tokens == longest + outside


def test_ancestors_are_seen_where_asked_for():
    sees = {"3": "1", "4": "2", "5": "1234"}
    result, _, _ = play(GRAPH, SAYS, sees, strategy=ab.MedVerse(sees="ancestors"))
    assert [name for name, _ in result.tree.children[4].sees] == ["0.0", "0.1", "0.2", "0.3"]


def test_all_at_once_as_the_released_engine_does():
    result, _, base = play(GRAPH, SAYS, {}, strategy=ab.MedVerse(order="at once"))
    assert {kid.start for kid in result.tree.children} == {base}
    assert not any(kid.sees for kid in result.tree.children)


def test_a_plan_may_name_steps_before_those_that_they_depend_on():
    says = {"1": "one", "2": "two"}
    result, whole, base = play(plan(s1="2", s2=""), says, {"1": "2"})
    kids = result.tree.children  # in the order of work
    assert [kid.text for kid in kids] == [whole["2"], whole["1"]]
    assert kids[1].start == base + size(whole["2"])


@pytest.mark.parametrize(
    ("needs", "sees", "why"),
    [
        ({"s1": "1", "s2": ""}, {}, ["step 1 depends on 1, which is itself; left out"]),
        ({"s1": "7", "s2": "1"}, {"2": "1"}, ["step 1 depends on 7, which there is not; left out"]),
        ({"s1": "2", "s2": "1"}, {"1": "2"}, ["step 2 depends on 1, which depends on it; left out"]),
        ({"s1": "", "s2": "1, 1,, "}, {"2": "1"}, []),
        ({"s1": "x", "s2": "1"}, {"2": "1"}, ["step 1 depends on x, which there is not; left out"]),
    ],
)
def test_a_dependency_that_cannot_be_is_left_out(needs, sees, why):
    result, _, _ = play(plan(**needs), {"1": "one", "2": "two"}, sees)
    assert result.malformed == tuple(f"thread 0: {w}" for w in why)


def test_a_step_that_comes_twice_is_dropped():
    head = plan(s1="", s2="1").replace(
        "</Plan>", "<Outline> Transient Step 1: B -> C; Dependency: [2]</Outline></Plan>"
    )
    result, _, _ = play(head, {"1": "one", "2": "two"}, {"2": "1"})
    assert result.malformed == ("thread 0: step 1 comes twice; dropped",)


@pytest.mark.parametrize(
    "says", ["<Plan></Plan>no<eos>", "</Plan>no<eos>", "<Plan><Outline>1: a</Outline></Plan><eos>"]
)
def test_a_plan_without_steps_is_plain_text(says):
    result = STAGE.play("q", ("q", says), strategy=ab.MedVerse())
    assert result.token_ids == STAGE.ids(says) and not result.tree.children
    assert result.malformed == ("thread 0: </Plan> with 0 steps; kept as plain text",)


def test_a_step_that_does_not_end_is_closed_and_those_behind_it_see_that():
    head = plan(s1="", s2="1")
    begin = "q" + head + "\n<Execution>\n"
    one, two = header("1") + "abc</Step>", header("2") + "two</Step>"
    joined = head + "\n<Execution>\n" + one + two + "</Execution>\n<Conclusion>\n"
    lines = [("q", head), (begin + header("1"), "abc<eos>"), (begin + one + header("2"), "two</Step>")]
    result = STAGE.play("q", *lines, ("q" + joined, "<eos>"), strategy=ab.MedVerse())
    assert result.token_ids == STAGE.ids(joined + "<eos>")
    assert result.malformed == ("thread 0.0: ended by eos without </Step>; closed",)


def test_graphs_are_repaired_and_put_in_order():
    needs = {str(i): [str((i * 7 + k) % 12) for k in range(4)] for i in range(12)}
    graph, left_out = repaired(needs)
    order = in_order(graph)
    assert sorted(order) == sorted(needs) and left_out
    assert all(order.index(need) < order.index(name) for name, wanted in graph.items() for need in wanted)
    chain = {str(i): [str(i + 1)] for i in range(3000)} | {"3000": []}
    assert in_order(repaired(chain)[0])[0] == "3000"


def outlines(*steps: tuple[object, str]) -> str:
    return "".join(f"<Outline> Transient Step {n}: a; Dependency: [{on}] </Outline>" for n, on in steps)


GOOD = [outlines((1, ""), (2, ""), (3, "1"), (4, "2, 3")) + "</Plan>", outlines((1, ""), (2, "1")) + "</Plan>"]
HABITS = Habits(
    ab.MedVerse().tags,
    ["<Plan>"],
    [
        *GOOD,
        outlines((1, "2"), (2, "3"), (3, "1")) + "</Plan>",
        outlines((1, "1"), (1, ""), (2, "9, x,,")) + "</Plan>",
        outlines(*((i, i - 1) for i in range(60))) + "</Plan>",
        outlines(*((i, "") for i in range(1000))) + "</Plan>",
        outlines(("", ""), ("x", "1")) + "</Plan>",
        outlines((1, "")) + "<Outline> Transient Step 2: </Plan></Plan>",
        outlines((1, ""))[:-12] + outlines((2, "1")) + "</Plan>",
        "</Plan>",
        outlines((1, "")),
    ],
    formats_kit.MEDVERSE.usual,
)


def test_alone_in_a_batch_and_after_preemptions_the_tree_is_the_same():
    habits = Habits(HABITS.tags, HABITS.opening, GOOD[:1], HABITS.usual)
    assert_same_everywhere(ab.MedVerse(), habits, num_pages=230, max_new_tokens=300)


def test_malformed_generations_are_survived():
    told = assert_survives(ab.MedVerse(), HABITS, 300, limits=(40, 150, 300))
    assert told["forked"] > 60 and told["malformed"] > 150


@pytest.mark.slow
def test_ten_thousand_malformed_generations_are_survived():
    assert_survives(ab.MedVerse(), HABITS, 10_000, seed=1, limits=(40, 150, 300))


def test_a_tokenizer_without_the_tags_is_told_how_to_add_them():
    with pytest.raises(ValueError, match=r"<Plan>.*add"):
        make_engine(tokenizer=byte_tokenizer()).generate("p", strategy=ab.MedVerse())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sees": "all"}, "MedVerse: sees='all'; pass 'dependencies' or 'ancestors'"),
        ({"order": "random"}, "MedVerse: order='random'"),
        ({"max_steps": 0}, "MedVerse: max_steps=0"),
        ({"outline": "("}, "no regular expression"),
        ({"outline": "(a)"}, "its groups"),
        ({"tags": ("<Plan>",)}, "lack"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        ab.MedVerse(**options)
