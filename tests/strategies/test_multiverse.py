"""Multiverse to the token: traces written by hand, nested blocks, what is refused, and anything a model says."""

from __future__ import annotations

import dataclasses

import formats_kit
import pytest
from engine_kit import byte_tokenizer, make_engine
from malformed_kit import Habits, assert_same_everywhere, assert_survives, bad_outlines
from tagged_kit import Stage

import anabranch as ab

STAGE = Stage(ab.Multiverse().tags)


def goal(*ids: str) -> str:
    return "<Parallel><Goal>" + "".join(f"<Outline>{i}: x</Outline>" for i in ids) + "</Goal>"


def path(name: str, says: str) -> str:
    return f"\n<Path>\n{name}:{says}</Path>"


def block(begin: str, paths: dict[str, str]) -> list[tuple[str, str]]:
    """Lines of a block: what stands before the paths, and what each says."""
    return [(f"{begin}\n<Path>\n{name}:", f"{says}</Path>") for name, says in paths.items()]


HEAD = "Two. " + goal("1", "2")
PATHS = {"1": " a is 4.", "2": " b is 25, I think."}
JOINED = HEAD + "".join(path(*p) for p in PATHS.items()) + "<Conclusion>\n"
END = "29</Conclusion></Parallel> So 29.<eos>"
ONE = [("q: ", HEAD), *block("q: " + HEAD, PATHS), ("q: " + JOINED, END)]


def play(prompt, *lines, strategy=None, **options):
    return STAGE.play(prompt, *lines, strategy=strategy or ab.Multiverse(), **options)


def size(text: str) -> int:
    return len(STAGE.ids(text))


def test_a_trace_written_by_hand():
    result = play("q: ", *ONE)
    assert result.token_ids == STAGE.ids(JOINED + END) and result.malformed == ()
    g = size("q: " + HEAD) - 1
    kids = result.tree.children
    assert [kid.start for kid in kids] == [g + 1, g + 1]
    assert [kid.token_ids for kid in kids] == [STAGE.ids(path(*p)) for p in PATHS.items()]
    m = max(size(path(*p)) for p in PATHS.items())
    assert STAGE.placed(result) == [
        ("q: " + HEAD + path("1", PATHS["1"]), 0),
        (path("2", PATHS["2"]) + "<Conclusion>\n" + END, g + 1),  # path 2 is the longest: the conclusion follows it
    ]
    assert result.tree.runs[-2].position == g + m + 1
    # Nothing is computed again: each token once, but for the last, which is never needed.
    assert result.metrics.rows == size("q: ") + result.metrics.total_tokens - 1
    assert result.metrics.threads_per_block == (2,)


def test_a_conclusion_stands_behind_the_longest_path_wherever_that_stands_in_the_text():
    head = goal("1", "2", "3")
    paths = {"1": "a", "2": "a much longer one", "3": "bb"}
    joined = head + "".join(path(*p) for p in paths.items()) + "<Conclusion>\n"
    result = play("p", ("p", head), *block("p" + head, paths), ("p" + joined, "</Conclusion></Parallel><eos>"))
    g = size("p" + head) - 1
    furthest = g + size(path("2", paths["2"]))
    assert STAGE.placed(result) == [
        ("p" + head + path("1", "a"), 0),
        (path("2", paths["2"]), g + 1),
        (path("3", "bb"), g + 1),
        ("<Conclusion>\n</Conclusion></Parallel><eos>", furthest + 1),
    ]
    assert result.malformed == ()


def test_blocks_nest():
    head, inner = goal("1", "2"), "in " + goal("1.1", "1.2")
    first = "p" + head + "\n<Path>\n1:"
    deep = {"1.1": "x", "1.2": "yyy"}
    said = inner + "".join(path(*p) for p in deep.items()) + "<Conclusion>\n" + "c</Conclusion></Parallel>."
    joined = head + path("1", said) + path("2", "zz") + "<Conclusion>\n"
    result = play(
        "p",
        ("p", head),
        (first, inner),
        *block(first + inner, deep),
        (
            first + inner + "".join(path(*p) for p in deep.items()) + "<Conclusion>\n",
            "c</Conclusion></Parallel>.</Path>",
        ),
        *block("p" + head, {"2": "zz"}),
        ("p" + joined, "</Conclusion></Parallel><eos>"),
    )
    assert result.token_ids == STAGE.ids(joined + "</Conclusion></Parallel><eos>") and result.malformed == ()
    assert [node.id for node in result.tree.walk()] == ["0", "0.0", "0.0.0", "0.0.1", "0.1"]
    g = size("p" + head) - 1
    inner_g = g + size("\n<Path>\n1:" + inner)
    outer, second = result.tree.children
    assert [kid.start for kid in outer.children] == [inner_g + 1] * 2 and second.start == g + 1
    conclusion = inner_g + size(path("1.2", "yyy")) + 1
    assert outer.stop == conclusion + size("<Conclusion>\nc</Conclusion></Parallel>.</Path>")
    assert result.tree.runs[-2].position == outer.stop  # the nested path is the furthest


def test_the_released_engine_keeps_a_token_behind_each_path_and_one_newline_for_all():
    lead = "q: " + HEAD + "\n"
    paths = {name: f"<Path>\n{name}:{says}</Path>\n" for name, says in PATHS.items()}
    joined = lead + "".join(paths.values()) + "<Conclusion>\n"
    lines = [(f"{lead}<Path>\n{name}:", f"{says}</Path>\n") for name, says in PATHS.items()]
    result = play("q: ", ("q: ", HEAD), *lines, (joined, END), strategy=ab.Multiverse(released=True))
    assert result.prompt_token_ids + result.token_ids == STAGE.ids(joined + END) and result.malformed == ()
    g = size("q: " + HEAD) - 1
    assert [kid.start for kid in result.tree.children] == [g + 2] * 2
    assert result.tree.runs[-2].position == g + 2 + max(map(size, paths.values()))
    assert dataclasses.replace(ab.Multiverse(released=True), released=False) == ab.Multiverse()


# ------------------------------------------------------------------------------------------------ what goes wrong


def test_a_fork_with_fewer_than_30_tokens_left_is_refused():
    says = HEAD + "alone</Conclusion><eos>"
    most = size(HEAD) + 29
    result = play("q: ", ("q: ", says), max_new_tokens=most)
    assert result.token_ids == STAGE.ids(says) and not result.tree.children
    assert result.malformed[0] == "thread 0: a fork with 29 tokens left, fewer than 30; refused"
    result = play("q: ", *ONE, max_new_tokens=most + 1)
    assert len(result.tree.children) == 2 and "refused" not in str(result.malformed)


def test_a_fork_deeper_than_five_blocks_is_refused():
    lines, before = [], "p"
    for _ in range(6):  # the trunk's block, and five within it
        lines.append((before, goal("1")))
        before += goal("1") + "\n<Path>\n1:"
    lines.append((before, goal("1") + "text</Path>"))
    before += goal("1") + "text</Path>"
    for _ in range(5):
        lines.append((before + "<Conclusion>\n", "</Conclusion></Parallel></Path>"))
        before += "<Conclusion>\n</Conclusion></Parallel></Path>"
    lines.append((before + "<Conclusion>\n", "</Conclusion></Parallel><eos>"))
    result = play("p", *lines)
    assert result.metrics.num_forks == 6
    assert result.malformed[1] == "thread 0.0.0.0.0.0.0: a fork deeper than 5 blocks; refused"


@pytest.mark.parametrize(
    "says", ["<Parallel><Goal></Goal>no<eos>", "</Goal>no<eos>", "<Goal><Outline>x</Outline></Goal><eos>"]
)
def test_a_goal_without_outlines_is_plain_text(says):
    result = play("p", ("p", says))
    assert result.token_ids == STAGE.ids(says) and not result.tree.children
    assert result.malformed[0] == "thread 0: </Goal> without any outline id; kept as plain text"


def test_an_id_that_comes_twice_gets_two_paths():
    head = goal("1", "1")
    joined = head + path("1", "a") * 2 + "<Conclusion>\n"
    # Greedy siblings with one header write alike, and the dense check knows rows by their contexts.
    result = play(
        "p", ("p", head), *block("p" + head, {"1": "a"}), ("p" + joined, "</Conclusion></Parallel><eos>"), exact=False
    )
    assert result.token_ids == STAGE.ids(joined + "</Conclusion></Parallel><eos>")
    assert result.malformed == ("thread 0: duplicate outline ids in 1 1; kept",)
    dropped = dataclasses.replace(ab.Multiverse(), repeats="drop")
    joined = head + path("1", "a") + "<Conclusion>\n"
    lines = [("p", head), *block("p" + head, {"1": "a"}), ("p" + joined, "</Conclusion></Parallel><eos>")]
    assert len(play("p", *lines, strategy=dropped).tree.children) == 1


def test_a_path_that_does_not_end_is_left_open_and_the_answer_goes_on():
    head = goal("1", "2")
    joined = head + "\n<Path>\n1:a" + path("2", "b") + "<Conclusion>\n"
    lines = [("p", head), ("p" + head + "\n<Path>\n1:", "a<eos>"), *block("p" + head, {"2": "b"})]
    result = play("p", *lines, ("p" + joined, "c</Conclusion></Parallel><eos>"))
    assert result.token_ids == STAGE.ids(joined + "c</Conclusion></Parallel><eos>")
    assert result.malformed[1] == "thread 0.0: ended by eos without </Path>; left open"
    closed = dataclasses.replace(ab.Multiverse(), unclosed="</Path>")
    joined = joined.replace("1:a", "1:a</Path>")
    result = play("p", *lines, ("p" + joined, "c</Conclusion></Parallel><eos>"), strategy=closed)
    assert result.token_ids == STAGE.ids(joined + "c</Conclusion></Parallel><eos>")


INNER = "in " + goal("1.1", "1.2")
DEEP = {"1.1": "x", "1.2": "yyy"}


@pytest.mark.parametrize("left", [0, 2])
@pytest.mark.parametrize(
    ("says", "inserted", "options"),
    [
        ("ab<Goal></Goal>", "", {}),
        ("<Goal></Goal>ab<Goal></Goal>c", "", {}),
        ("in " + goal("2"), "", {"max_depth": 0}),
        (INNER, "".join(path(*p) for p in DEEP.items()) + "<Conclusion>\n", {}),
    ],
    ids=["a goal that fits no block", "two of them", "a fork that is refused", "a block of its own"],
)
def test_a_limit_of_a_thread_counts_all_that_it_samples(says, inserted, options, left):
    """However often it stops on the way; what its own children sample is theirs."""
    strategy = dataclasses.replace(ab.Multiverse(), thread_tokens=size(says) + left, **options)
    head = goal("1")
    own = "\n<Path>\n1:" + says + inserted + "vwxyz"[:left]
    lines = [("p", head), ("p" + head + "\n<Path>\n1:", says + ("" if inserted else "vwxyz"))]
    if inserted:
        lines += [*block("p" + head + "\n<Path>\n1:" + says, DEEP), ("p" + head + own[: len(own) - left], "vwxyz")]
    joined = head + own + "<Conclusion>\n"
    result = play("p", *lines, ("p" + joined, "</Conclusion></Parallel><eos>"), strategy=strategy)
    assert result.token_ids == STAGE.ids(joined + "</Conclusion></Parallel><eos>")
    (kid,) = result.tree.children
    assert kid.token_ids == STAGE.ids(own) and len(kid.children) == 2 * bool(inserted)
    assert "thread 0.0: ended by length without </Path>; left open" in result.malformed


def test_what_a_path_writes_of_other_tags_is_plain_text():
    head, said = goal("1"), "</Conclusion><Outline></Parallel>"
    joined = head + path("1", said) + "<Conclusion>\n"
    result = play("p", ("p", head), *block("p" + head, {"1": said}), ("p" + joined, "</Conclusion></Parallel><eos>"))
    assert result.token_ids == STAGE.ids(joined + "</Conclusion></Parallel><eos>")
    assert len(result.malformed) == 1 and "its tags are" in result.malformed[0]


# ------------------------------------------------------------------------------------------------ the same everywhere

HABITS = Habits(
    ab.Multiverse().tags,
    ["<Goal>"],
    bad_outlines("<Outline>{id}: a</Outline>", "</Goal>"),
    formats_kit.MULTIVERSE,
)


def test_alone_in_a_batch_and_after_preemptions_the_tree_is_the_same():
    habits = dataclasses.replace(HABITS, scripts=HABITS.scripts[:6])
    assert_same_everywhere(ab.Multiverse(min_left=5), habits, num_pages=150)


def test_malformed_generations_are_survived():
    told = assert_survives(ab.Multiverse(), HABITS, 300)
    assert told["forked"] > 60 and told["malformed"] > 200


@pytest.mark.slow
def test_ten_thousand_malformed_generations_are_survived():
    assert_survives(ab.Multiverse(), HABITS, 10_000, seed=1)


# ------------------------------------------------------------------------------------------------ bad input


def test_a_tokenizer_without_the_tags_is_told_how_to_add_them():
    with pytest.raises(ValueError, match=r"<Parallel>.*add"):
        make_engine(tokenizer=byte_tokenizer()).generate("p", strategy=ab.Multiverse())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_depth": -1}, "Multiverse: max_depth=-1"),
        ({"min_left": 1.5}, "Multiverse: min_left=1.5"),
        ({"repeats": "twice"}, "Multiverse: repeats='twice'; pass 'drop' or 'keep'"),
        ({"nested": 1}, "Multiverse: nested=1; pass True or False"),
        ({"released": "yes"}, "Multiverse: released='yes'; pass True or False"),
        ({"overlap": True}, "Multiverse: overlap=True needs"),
        ({"misfit": "raise"}, "Multiverse: misfit='raise'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        ab.Multiverse(**options)
