"""APR: fresh contexts, a parent that is rewritten at the join, the released code's reading of what the model wrote."""

from __future__ import annotations

import pytest
from engine_kit import make_engine
from systems_kit import (
    Babble,
    assert_same_everywhere,
    assert_training_parity,
    ids,
    play,
    survive,
)

import anabranch as ab

PROMPT = ab.APR.prompt(27, [22, 26, 31, 53])
EXPLORE = (
    "\nExploring Operation: 53-22=31, Resulting Numbers: [26, 31, 31]\n"
    "Generated Node #0,0: 27:[26, 31, 31] Operation: 53-22=31\n"
    "Generated Node #0,1: 27:[22, 26] Operation: 53-31=22\n"
)
CALL = (
    "<Calling Sub Searches>\n"
    "<Start Sub Search 0 at level 1> Moving to Node #0,0\n"
    "<Start Sub Search 1 at level 1> Moving to Node #0,1\n"
    "<End Calling Sub Searches>"
)
CHILDREN = (
    "Moving to Node #0,0\nCurrent State: 27:[26, 31, 31], Operations: ['53-22=31']",
    "Moving to Node #0,1\nCurrent State: 27:[22, 26], Operations: ['53-31=22']",
)
PATH = "Moving to Node #0,1\nCurrent State: 27:[22, 26]\n27,27 equal: Goal Reached"
FAILED = "\nExploring.\nNo solution found."
FOUND = f"\n27,27 equal: Goal Reached\n{PATH}\n"
AFTER = (
    "<Sub Searches>\n"
    "<No Solution in Sub Search 0 at level 1 at Node #0,0>\n"
    "<Goal Reached in Sub Search 1 at level 1 at Node #0,1>\n"
    f"{PATH}\n"
    "<End Sub Searches>\n"
)
LAST = f"Goal Reached\n{PATH}"
LINES = [
    (PROMPT, EXPLORE + CALL),
    (CHILDREN[0], FAILED + "<eos>"),
    (CHILDREN[1], FOUND + "<eos>"),
    (PROMPT + EXPLORE + AFTER, LAST + "<eos>"),
]


def test_the_call_that_was_just_closed_is_the_one_that_goes():
    """A block that was opened before, and never closed, is text like any other."""
    begun = "<Calling Sub Searches>\nNot yet.\n"
    lines = [
        (PROMPT, EXPLORE + begun + CALL),
        *LINES[1:3],
        (PROMPT + EXPLORE + begun + AFTER, LAST + "<eos>"),
    ]
    result, _ = play(ab.APR(), PROMPT, *lines)
    assert result.text == EXPLORE + begun + AFTER + LAST and result.malformed == ()


def test_the_parent_is_rewritten_by_what_its_children_found():
    result, compared = play(ab.APR(), PROMPT, *LINES)
    # Token for token: the calling block is gone, what stood before it is not.
    assert result.text == EXPLORE + AFTER + LAST
    assert result.token_ids == ids(EXPLORE) + ids(AFTER) + ids(LAST + "<eos>")
    assert result.answers == PATH
    assert result.malformed == ()
    # Children: contexts of their own from position 0, which hold the node's state and nothing else.
    for kid, prompt, wrote in zip(result.tree.children, CHILDREN, (FAILED, FOUND), strict=True):
        assert (kid.role, kid.start, kid.forked_at, kid.fate) == ("fresh", 0, 0, "joined")
        assert kid.runs[0].kind == "prompt" and kid.runs[0].token_ids == ids(prompt)
        assert kid.token_ids == ids(wrote + "<eos>")
    # Dense positions in the parent, the deleted block on those that its replacement took over.
    runs = result.tree.runs
    assert [r.position for r in runs] == [sum(len(q.token_ids) for q in runs[:i]) for i in range(len(runs))]
    (cut,) = result.tree.forgotten
    assert cut.token_ids == ids(CALL) and cut.position == len(ids(PROMPT + EXPLORE))
    # All rows but those of contexts that were deleted, and both blocks begin with "<".
    assert compared == result.metrics.sampled_tokens - len(ids(CALL)) + 2
    longest = max(len(ids(t)) for t in (PROMPT + EXPLORE + CALL, CHILDREN[1] + FOUND, PROMPT + EXPLORE + AFTER + LAST))
    assert result.metrics.longest_context == longest + 1  # the authors' cost, EOS included


def test_every_row_equals_training_the_deleted_block_included():
    assert_training_parity(ab.APR(), PROMPT, *LINES)


def test_success_is_the_second_goal_and_the_path_stands_behind_the_last_but_one():
    once = [(PROMPT, "\nGoal Reached<eos>")]
    assert play(ab.APR(), PROMPT, *once)[0].answers is None
    thrice = [(PROMPT, "\nGoal Reached\na\nGoal Reached\nthe path: Goal Reached\n<eos>")]
    assert play(ab.APR(), PROMPT, *thrice)[0].answers == "the path: Goal Reached"


def test_results_that_the_model_writes_itself_are_a_call():
    own = CALL.replace("<Calling", "<").replace("< Sub", "<Sub")
    assert own.startswith("<Sub Searches>\n")
    head, rest = own[: len("<Sub Searches>")], own[len("<Sub Searches>") :]
    result, _ = play(
        ab.APR(),
        PROMPT,
        (PROMPT, EXPLORE + head),
        (PROMPT + EXPLORE + "<Calling Sub Searches>", rest),
        *LINES[1:],
    )
    assert result.text == EXPLORE + AFTER + LAST
    assert result.malformed == ("thread 0: <Sub Searches> written by the model; taken for <Calling Sub Searches>",)


def test_a_tag_that_shares_tokens_with_the_text_around_it():
    """What one token holds in front of the calling block stays, though the token goes."""
    pieces = ("\n<Calling Sub", ".<Sub ", "Searches>\n")
    before = EXPLORE.rstrip("\n")
    result, _ = play(
        ab.APR(),
        PROMPT,
        (PROMPT, before + "\n" + CALL),
        (CHILDREN[0], FAILED[:-1] + ".<Sub Searches>\n"),
        (CHILDREN[0] + FAILED + "<Calling Sub Searches>", "<eos>"),
        *LINES[2:],
        pieces=pieces,
    )
    assert result.text == EXPLORE + AFTER + LAST
    assert result.tree.children[0].text == FAILED + "<Calling Sub Searches>"
    assert result.tree.children[0].runs[2].kind == "inserted"


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (CALL.replace("#0,1\n<End", "#9,9\n<End"), "a call of node '9,9', whose state was never written"),
        (CALL.replace("#0,1\n<End", "#zero\n<End"), "a call of node 'zero', whose state was never written"),
    ],
)
def test_a_call_of_an_unknown_node_ends_the_answer(call, why):
    result, _ = play(ab.APR(), PROMPT, (PROMPT, EXPLORE + call))
    assert result.answers is None and result.text == EXPLORE + call and result.metrics.num_threads == 0
    assert result.malformed == (f"thread 0: {why}",)


def test_an_end_without_a_beginning_is_plain_text_and_a_call_of_nobody_finds_nothing():
    result, _ = play(
        ab.APR(),
        PROMPT,
        (PROMPT, "x<End Calling Sub Searches>y<Calling Sub Searches>\n<End Calling Sub Searches>"),
        (PROMPT + "x<End Calling Sub Searches>y<Sub Searches>\n<End Sub Searches>\n", "z<eos>"),
    )
    assert result.text == "x<End Calling Sub Searches>y<Sub Searches>\n<End Sub Searches>\nz"
    assert result.malformed == (
        "thread 0: <End Calling Sub Searches> without <Calling Sub Searches>; kept as plain text",
    )


@pytest.mark.parametrize("depth", [1, 2])
def test_calls_of_a_called_thread(depth):
    """One level as released: a child that calls is not served, and writes on. With depth=2 it is."""
    inner = CALL.replace("level 1", "level 2").replace("#0,", "#0,0,")
    tell = (
        "\nGenerated Node #0,0,0: 27:[57, 31] Operation: 26+31=57\nGenerated Node #0,0,1: 27:[5] Operation: 31-26=5\n"
    )
    kids = [
        "Moving to Node #0,0,0\nCurrent State: 27:[57, 31], Operations: ['53-22=31', '26+31=57']",
        "Moving to Node #0,0,1\nCurrent State: 27:[5], Operations: ['53-22=31', '31-26=5']",
    ]
    none = "<No Solution in Sub Search {i} at level 2 at Node #0,0,{i}>\n"
    results = "<Sub Searches>\n" + none.format(i=0) + none.format(i=1) + "<End Sub Searches>\n"
    served = CHILDREN[0] + tell + results
    result, _ = play(
        ab.APR(depth=depth),
        PROMPT,
        LINES[0],
        (CHILDREN[0], tell + inner + ("\n.<eos>" if depth == 1 else "")),
        *[(kid, "no<eos>") for kid in kids],
        (served, "No solution found.<eos>"),
        *LINES[2:],
    )
    assert result.text == EXPLORE + AFTER + LAST
    child = result.tree.children[0]
    assert [kid.id for kid in child.children] == ([] if depth == 1 else ["0.0.0", "0.0.1"])
    assert child.text == (tell + inner + "\n." if depth == 1 else tell + results + "No solution found.")


def test_the_budget_stands_in_front_of_the_prompt_and_children_do_not_see_it():
    prompt = ab.APR.prompt(27, [22, 26, 31, 53], sub_call_budget=10)
    assert prompt == "Sub Call Budget: 10 " + PROMPT
    lines = [(before.replace(PROMPT, prompt), says) for before, says in LINES]
    result, _ = play(ab.APR(), prompt, *lines)
    assert result.text == EXPLORE + AFTER + LAST


def test_limits_of_a_call():
    result, _ = play(
        ab.APR(call_tokens=len(ids(EXPLORE + CALL))),
        PROMPT,
        LINES[0],
        (CHILDREN[0], "a" * 500),
        (CHILDREN[1], "b" * 500),
        (PROMPT + EXPLORE + AFTER.replace("Goal Reached in", "No Solution in").replace(PATH + "\n", ""), "c<eos>"),
    )
    assert [kid.ended for kid in result.tree.children] == ["length"] * 2 and result.text.endswith("c")


PIECES = (
    "<Calling Sub Searches>", "<End Calling Sub Searches>", "<Sub Searches>", "<End Sub Searches>",
    "<Start Sub Search 0 at level 1> ", "Moving to Node #", "0,1", "0,2", "Goal Reached",
    "\nGenerated Node #0,1: 27:[1] Operation: ",
    "Current State: 27:[2, 3], Operations: []", "<Sub", "Searches>", "<Calling",
)  # fmt: skip
USUAL = {
    "<Calling Sub Searches>": ["\n"],
    "\n": ["<Start Sub Search 0 at level 1> ", "<End Calling Sub Searches>", "Goal Reached"],
    "<Start Sub Search 0 at level 1> ": ["Moving to Node #"],
    "Moving to Node #": ["0,1", "0,1", "0,1", "0,1", "0,2"],
    "0,1": ["\n"],
    "0,2": ["\n"],
    "a": ["\nGenerated Node #0,1: 27:[1] Operation: ", "<Calling Sub Searches>", "a", "Goal Reached", "<Sub"],
    "<Sub": [" "],
    " ": ["Searches>", "a"],
    "Searches>": ["\n"],
    "\nGenerated Node #0,1: 27:[1] Operation: ": ["a"],
    "z": ["<Calling Sub Searches>"],
    "<End Sub Searches>": ["\n"],
}
BEGUN = "\nMoving to Node #0,1\nCurrent State: 9:[1, 2], Operations: []\nGenerated Node #0,1,1: 9:[3] Operation: 1+2=3z"
BABBLE = Babble(PIECES, USUAL, wild=0.05)


def test_the_same_seed_gives_the_same_tree():
    prompts = [f"{n}{BEGUN}" for n in range(16)]
    results = assert_same_everywhere(ab.APR(depth=2), prompts, BABBLE, *PIECES, pages=120)
    assert sum(r.metrics.num_threads for r in results) > 16


def babbled(count):
    results = survive(ab.APR(depth=3), lambda seed: f"{seed}{BEGUN}", BABBLE, *PIECES, count=count)
    assert sum(r.metrics.num_threads > 0 for r in results) > count / 20
    assert {r.metrics.format_correctness for r in results} == {0.0, 1.0}


def test_malformed_generations():
    babbled(300)


@pytest.mark.slow
def test_many_malformed_generations():
    babbled(10_000)


@pytest.mark.parametrize(
    ("options", "message"), [({"depth": 0}, "APR: depth=0"), ({"call_tokens": -1}, "APR: call_tokens")]
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        ab.APR(**options)


def test_without_a_tokenizer():
    with pytest.raises(ValueError, match="needs a tokenizer"):
        make_engine().generate([1, 2, 3], strategy=ab.APR())
