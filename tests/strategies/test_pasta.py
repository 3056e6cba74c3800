"""PASTA to the token: promises kept while the text goes on, lengths that set positions, and every broken promise."""

from __future__ import annotations

import pytest
from engine_kit import make_engine
from malformed_kit import Habits, assert_same_everywhere, assert_survives
from tagged_kit import Stage

import anabranch as ab

STAGE = Stage(())
FIRST, SECOND = 'a<promise topic="x" tokens="40"/>', 'bb<promise topic="y"/>'
MAIN = FIRST + SECOND + "c<sync/>"
ASYNC = ["<async>first, long and slow</async>", "<async>2</async>"]
LINES = [
    ("p", MAIN),
    ("p" + FIRST + "<async>", ASYNC[0][7:]),
    ("p" + FIRST + SECOND + "<async>", ASYNC[1][7:]),
    ("p" + MAIN + "".join(ASYNC) + "\n", "end<eos>"),
]


def play(*lines, strategy=None, **options):
    return STAGE.play("p", *lines, strategy=strategy or ab.PASTA(), **options)


def size(text: str) -> int:
    return len(STAGE.ids(text))


def test_a_trace_written_by_hand():
    result = play(*LINES)
    assert result.token_ids == STAGE.ids(MAIN + "".join(ASYNC) + "\nend<eos>") and result.malformed == ()
    behind = size("p" + FIRST)
    one, two = result.tree.children
    assert (one.start, two.start) == (behind, behind + 40 + size(SECOND))
    assert (one.forked_at, two.forked_at) == (behind, behind + size(SECOND))
    furthest = max(one.stop, two.stop, behind + 40 + size(SECOND + "c<sync/>"))
    assert STAGE.placed(result) == [
        ("p" + FIRST, 0),
        (SECOND + "c<sync/>", behind + 40),
        (ASYNC[0], behind),
        (ASYNC[1] + "\nend<eos>", two.start),  # the second thread is the furthest
    ]
    assert furthest == two.stop
    assert result.metrics.rows == 1 + result.metrics.total_tokens - 1
    # The longest way to the sync, through one of the threads.
    longest = max(size(FIRST + ASYNC[0]), size(FIRST + SECOND + ASYNC[1]))
    assert result.metrics.critical_path_tokens == longest + size("\nend<eos>")
    assert result.metrics.max_concurrency >= 2


def test_dense_positions_look_at_no_length():
    result = play(*LINES, strategy=ab.PASTA(positions="dense"))
    assert [kid.start for kid in result.tree.children] == [kid.forked_at for kid in result.tree.children]


def test_what_stands_between_syncs_sees_what_was_kept_before():
    begin = "<promise/><sync/>"
    kept = begin + "<async>k</async>\n"
    again = kept + "m<promise/>n<sync/>"
    result = play(
        ("p", begin),
        ("p<promise/><async>", "k</async>"),
        ("p" + kept, "m<promise/>n<sync/>"),
        ("p" + kept + "m<promise/><async>", "l</async>"),
        ("p" + again + "<async>l</async>\n", "<eos>"),
    )
    assert result.token_ids == STAGE.ids(again + "<async>l</async>\n<eos>") and result.malformed == ()


@pytest.mark.parametrize(
    ("length", "room", "why"),
    [
        ("-3", 0, "a promise of '-3' tokens; taken for none"),
        ("many", 0, "a promise of 'many' tokens; taken for none"),
        ("", 0, "a promise of '' tokens; taken for none"),
        ("1001", 1000, "a promise of '1001' tokens; cut"),
        ("9" * 50, 1000, f"a promise of '{'9' * 20}' tokens; cut"),
        ("0", 0, None),
    ],
)
def test_lengths_that_are_none(length, room, why):
    begin = f'<promise tokens="{length}"/>'
    result = play(
        ("p", begin + "<sync/>"),
        ("p" + begin + "<async>", "k</async>"),
        ("p" + begin + "<sync/><async>k</async>\n", "<eos>"),
    )
    assert result.malformed == ((f"thread 0: {why}",) if why else ())
    assert result.tree.runs[2 if room else 1].position == (size("p" + begin) + room if room else 1)


def test_a_thread_that_does_not_end_is_closed():
    joined = "<promise/><sync/><async>k</async>\n"
    result = play(("p", "<promise/><sync/>"), ("p<promise/><async>", "k<eos>"), ("p" + joined, "<eos>"))
    assert result.token_ids == STAGE.ids(joined + "<eos>")
    assert result.malformed == ("thread 0.0: ended by eos without </async>; closed",)


def test_promises_that_are_never_synced_come_at_the_end():
    result = play(("p", "a<promise/>b<eos>"), ("pa<promise/><async>", "k</async>"), exact=False)
    assert result.token_ids == STAGE.ids("a<promise/>b<async>k</async>\n")
    assert result.malformed == ("thread 0: 1 promises without <sync/>; waited for at the end",)


def test_a_sync_without_promises_and_other_tags_are_plain_text():
    result = play(("p", "a<sync/>b<br/>c<async>d</async><promise topic=<eos>"))
    assert not result.tree.children
    assert result.malformed == ("thread 0: <sync/> with nothing to wait for; kept as plain text",)


def test_no_more_promises_than_allowed():
    lines = [("p", "<promise/><promise/><sync/>"), ("p<promise/><async>", "k</async>")]
    joined = "<promise/><promise/><sync/><async>k</async>\n"
    result = play(*lines, ("p" + joined, "<eos>"), strategy=ab.PASTA(max_threads=1))
    assert result.token_ids == STAGE.ids(joined + "<eos>")
    assert result.malformed == ("thread 0: more than 1 promises open; kept as plain text",)


# In one token each, so that they come up often.
LENGTHS = ('tokens="7"', 'tokens="-3"', 'tokens="99999999999"', 'tokens="')
TAGS = ("<promise ", *LENGTHS, "/>", "<sync/>", "<async>", "</async>")
HABITS = Habits(
    TAGS,
    ["<promise "],
    ['tokens="7"/>', 'topic="a"/>', "/>", 'tokens="-3"/>', "<promise />", 'tokens="99999999999"/><sync/>', "a" * 9],
    {
        "q": ["<promise ", "a"],
        "<async>": ["a", "b"],
        "/>": ["a", "<sync/>", "<promise "],
        "a": ["b", "</async>", "<sync/>", "<promise "],
        "b": ["a", "</async>"],
    },
)


def test_alone_in_a_batch_and_after_preemptions_the_tree_is_the_same():
    habits = Habits(TAGS, ["<promise "], HABITS.scripts[:3], HABITS.usual)
    assert_same_everywhere(ab.PASTA(), habits, num_pages=90, max_new_tokens=60)


def test_malformed_generations_are_survived():
    told = assert_survives(ab.PASTA(), HABITS, 300)
    assert told["forked"] > 60 and told["malformed"] > 100


@pytest.mark.slow
def test_ten_thousand_malformed_generations_are_survived():
    assert_survives(ab.PASTA(), HABITS, 10_000, seed=1)


def test_without_a_tokenizer_it_says_so():
    with pytest.raises(ValueError, match="tokenizer"):
        make_engine().generate([1, 2], strategy=ab.PASTA())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": "learnt"}, "PASTA: positions='learnt'; pass 'promised' or 'dense'"),
        ({"after": ""}, "PASTA: after=''"),
        ({"promise": "("}, "no regular expression"),
        ({"most_tokens": 0}, "PASTA: most_tokens=0"),
        ({"async_tokens": -1}, "PASTA: async_tokens=-1"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        ab.PASTA(**options)
