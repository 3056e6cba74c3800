"""ThreadWeaver to the token: traces written by hand, a naive reference, and everything a model can get wrong."""

from __future__ import annotations

import dataclasses
import random
import re

import pytest
import torch
from engine_kit import EOS, VOCAB, Recorder, assert_dense, assert_nothing_held, byte_tokenizer, make_engine, make_model
from threadweaver_kit import (
    AGAIN,
    ALONE,
    FIRST,
    JOINED,
    JOINED_AGAIN,
    LAST,
    MANY,
    TAG,
    TAGS,
    TWO,
    Babble,
    Polite,
    Script,
    by_the_rules,
    engine_with_tags,
    ids,
    play,
    tag_tokenizer,
)
from tokenizers import Tokenizer
from transformers import LogitsProcessor, PreTrainedTokenizerFast

import anabranch as ab
from anabranch.strategies import Sequential, Tagged, ThreadWeaver


def assert_trace(result, answer: str, threads: list[str]) -> None:
    """Token for token and position for position: the flat answer on dense positions, each thread behind its fork."""
    assert result.token_ids == ids(answer)
    runs = result.tree.runs
    flat = [t for run in runs for t in run.token_ids]
    positions = [run.position + i for run in runs for i in range(len(run.token_ids))]
    assert flat == [*result.prompt_token_ids, *ids(answer)] and positions == list(range(len(flat)))
    assert [k.token_ids for k in result.tree.children] == [ids(t) for t in threads]
    for kid in result.tree.children:
        assert kid.start == kid.forked_at and kid.stop == kid.start + len(kid.token_ids) and kid.fate == "joined"


NONE = [("s", "just so<eos>")]
EXPECTED = {
    "q: ": (FIRST + JOINED + LAST, ["\n<Thread>\n1: a is 4.</Thread>", "\n<Thread>\n2: b is 25, I think.</Thread>"]),
    "r": (
        AGAIN + JOINED_AGAIN + ALONE + "\n<Thread>\n7:w</Thread>\n</Parallel>.<eos>",
        [f"\n<Thread>\n{n}:{t}</Thread>" for n, t in (("1.1", "x"), ("1.2", "yy"), ("3", "zzz"), ("7", "w"))],
    ),
    "s": ("just so<eos>", []),
}


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "top_k": 0}], ids=["greedy", "seeded"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_traces_written_by_hand(family, sampling):
    script = Script(*TWO, *MANY, *NONE)
    for prompts in ([p] for p in EXPECTED), [list(EXPECTED)]:
        for prompt in prompts:
            engine, recorder = engine_with_tags(family=family), Recorder()
            results = engine.generate(
                prompt if isinstance(prompt, list) else [prompt],
                strategy=ThreadWeaver(),
                logits_processor=[recorder, script],
                max_new_tokens=200,
                seed=5,
                **sampling,
            )
            recorded, compared = recorder.seen, 0
            for result in results:
                asked = tag_tokenizer().decode(result.prompt_token_ids)
                assert_trace(result, *EXPECTED[asked])
                assert result.malformed == () and result.metrics.format_correctness == 1.0
                start = len(result.prompt_token_ids)
                recorder.seen = [s for s in recorded if s[0][:start] == result.prompt_token_ids]
                compared += assert_dense(result, recorder, family)
            assert compared == len(recorded) == sum(r.metrics.sampled_tokens for r in results)
            assert_nothing_held(engine)


def test_metrics_and_kept_work():
    recorder = Recorder()
    result = play("q: ", *TWO, recorder=recorder)
    headers = [len(ids(f"\n<Thread>\n{n}:")) for n in (1, 2)]
    says = [len(ids(text)) for _, text in TWO]
    metrics = result.metrics
    assert metrics.sampled_tokens == sum(says) and metrics.inserted_tokens == sum(headers) + 1
    assert metrics.critical_path_tokens == says[0] + max(headers[0] + says[1], headers[1] + says[2]) + 1 + says[3]
    assert (metrics.threads_per_block, metrics.max_concurrency, metrics.trigger_rate) == ((2,), 2, 1.0)
    # Thread 1 is kept where it stands, thread 2 computed again; all else once, but for the last token, never needed.
    assert [(r.kind, r.source, r.spliced) for r in result.tree.runs] == [
        ("prompt", None, False),
        ("sampled", None, False),
        ("joined", "0.0", True),
        ("joined", "0.1", False),
        ("inserted", None, False),
        ("sampled", None, False),
    ]
    # (Thread 2's own last token: nobody asks for what follows it, and its KV is not what the join needs.)
    again = len(ids("<Thread>\n2: b is 25, I think.</Thread>"))
    assert metrics.rows == len(ids("q: ")) + metrics.total_tokens - 1 + again - 1


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_naive_reference_agrees_greedy_and_seeded(family):
    prompts = [list(ids(p)) for p in ("count the ways", "why not")]
    for seed in (None, 1) if family == "llama" else (2,):
        engine = engine_with_tags(family=family)
        options = dict(
            strategy=ThreadWeaver(),
            logits_processor=[Polite()],
            max_new_tokens=400,
            top_k=0,
            do_sample=seed is not None,
        )
        together = engine.generate(prompts, seed=seed or 0, **options)
        alone = [engine.generate(p, seed=seed or 0, **options) for p in prompts]
        one_by_one = engine.generate(prompts, seed=seed or 0, **(options | {"strategy": Sequential(ThreadWeaver())}))
        for prompt, result in zip(prompts, together, strict=True):
            answer, threads = by_the_rules(make_model(family), prompt, seed)
            assert list(result.token_ids) == answer
            assert [list(k.token_ids) for k in result.tree.children] == threads and len(threads) >= 4
            assert result.malformed == ()
        assert [r.tree for r in alone] == [r.tree for r in together]
        assert [r.tree for r in one_by_one] == [r.tree for r in together]
        for parallel, sequential in zip(together, one_by_one, strict=True):
            assert sequential.metrics.max_concurrency == 1 < parallel.metrics.max_concurrency
            assert sequential.metrics.critical_path_tokens == sequential.metrics.total_tokens
            assert parallel.metrics.critical_path_tokens < parallel.metrics.total_tokens
        assert_nothing_held(engine)


# ------------------------------------------------------------------------------------------------ unhappy paths


HEAD = "<Parallel><Outlines><Outline>1:a</Outline><Outline>2:b</Outline></Outlines>"


def broken(first: str, second: str, **options):
    """Two threads that say `first` and `second`; the script holds nothing for a trunk that would go on."""
    return play(
        "p", ("p", HEAD), ("p" + HEAD + "\n<Thread>\n1:", first), ("p" + HEAD + "\n<Thread>\n2:", second), **options
    )


def test_eos_inside_a_thread_closes_it_and_ends_the_answer():
    recorder = Recorder()
    for first, second, dead in (("ab<eos>", "c</Thread>", "0.0"), ("ab</Thread>", "c<eos>", "0.1")):
        result = broken(first, second, recorder=recorder)
        texts = [t.replace("<eos>", "\n</Thread>") for t in (first, second)]
        answer = f"{HEAD}\n<Thread>\n1:{texts[0]}<Thread>\n2:{texts[1]}\n</Parallel>"
        assert_trace(result, answer, [f"\n<Thread>\n{n}:{t}" for n, t in zip((1, 2), texts, strict=True)])
        assert result.malformed == (f"thread {dead}: ended by eos without </Thread>; closed",)
        assert assert_dense(result, recorder, "llama") and result.metrics.format_correctness == 0.0
        recorder.seen.clear()


@pytest.mark.parametrize("own", [True, False], ids=["thread_tokens", "max_new_tokens"])
def test_a_thread_that_never_closes(own):
    limit = {"strategy": ThreadWeaver(thread_tokens=3)} if own else {"max_new_tokens": len(ids(HEAD)) + 3}
    result = broken("abcdefg", "x</Thread>", **limit)
    answer = HEAD + "\n<Thread>\n1:abc\n</Thread><Thread>\n2:x</Thread>\n</Parallel>"
    assert_trace(result, answer, ["\n<Thread>\n1:abc\n</Thread>", "\n<Thread>\n2:x</Thread>"])
    assert result.malformed == ("thread 0.0: ended by length without </Thread>; closed",)


def test_a_budget_over_all_threads_ends_them():
    result = broken("abcdefg", "hijklmn", max_total_tokens=len(ids(HEAD)) + 4)
    answer = HEAD + "\n<Thread>\n1:ab\n</Thread><Thread>\n2:hi\n</Thread>\n</Parallel>"
    assert result.token_ids == ids(answer)
    assert len(result.malformed) == 2 and all("ended by budget" in why for why in result.malformed)


def test_a_limit_that_leaves_nothing_for_the_threads_or_for_the_trunk():
    nothing = broken("a", "b", max_new_tokens=len(ids(HEAD)))
    closed = "\n<Thread>\n1:\n</Thread>", "\n<Thread>\n2:\n</Thread>"
    assert_trace(nothing, HEAD + closed[0] + closed[1].lstrip("\n") + "\n</Parallel>", list(closed))
    # Both closed by themselves, with the last token that was allowed: the block is closed for the model.
    last = broken("a</Thread>", "b</Thread>", max_new_tokens=len(ids(HEAD)) + 2)
    assert last.token_ids == ids(HEAD + "\n<Thread>\n1:a</Thread><Thread>\n2:b</Thread>\n</Parallel>")
    assert last.malformed == () and last.tree.ended == "length"


def test_a_budget_that_ends_among_the_outlines():
    result = play("p", ("p", HEAD), max_new_tokens=4)
    assert result.token_ids == ids(HEAD)[:4] and result.tree.children == ()
    assert result.malformed == ("thread 0: its tags are <Parallel> <Outlines> <Outline>",)


@pytest.mark.parametrize(
    "outlines",
    ["<Outlines></Outlines>", "<Outlines><Outline>do a</Outline><Outline>a.1:</Outline></Outlines>", "</Outlines>"],
    ids=["none", "without ids", "never opened"],
)
def test_outlines_without_ids_stay_plain_text(outlines):
    text = "<Parallel>" + outlines + "so what</Parallel>.<eos>"
    result = play("p", ("p", text))
    assert_trace(result, text, [])
    assert result.malformed[0] == "thread 0: </Outlines> without any outline id; kept as plain text"
    assert result.metrics.trigger_rate == 0.0


def test_only_ids_after_the_last_outlines_count_and_duplicates_are_dropped():
    head = (
        "<Outlines><Outline>8:no</Outline><Outlines><Outline>2:b</Outline><Outline>1:a</Outline><Outline>2:c</Outline>"
    )
    head = "<Parallel>" + head + "</Outlines>"
    threads = ["\n<Thread>\n2:x</Thread>", "\n<Thread>\n1:y</Thread>"]
    answer = head + threads[0] + threads[1][1:] + "\n"
    result = play(
        "p",
        ("p", head),
        ("p" + head + "\n<Thread>\n2:", "x</Thread>"),
        ("p" + head + "\n<Thread>\n1:", "y</Thread>"),
        ("p" + answer, "</Parallel><eos>"),
    )
    assert_trace(result, answer + "</Parallel><eos>", threads)
    assert result.malformed[0] == "thread 0: duplicate outline ids in 2 1 2; dropped" and len(result.malformed) == 2


def test_tags_inside_a_thread_are_plain_text():
    inside = "<Parallel><Outlines><Outline>1:n</Outline></Outlines><Thread>m</Thread>"
    answer = HEAD + f"\n<Thread>\n1:{inside}<Thread>\n2:b</Thread>\n"
    result = play(
        "p",
        ("p", HEAD),
        ("p" + HEAD + "\n<Thread>\n1:", inside),
        ("p" + HEAD + "\n<Thread>\n2:", "b</Thread>"),
        ("p" + answer, "</Parallel><eos>"),
    )
    assert_trace(result, answer + "</Parallel><eos>", [f"\n<Thread>\n1:{inside}", "\n<Thread>\n2:b</Thread>"])
    assert len(result.malformed) == 1 and "its tags are" in result.malformed[0] and result.metrics.num_forks == 1


def test_a_block_too_many_ends_the_answer():
    block = "<Parallel><Outlines><Outline>1:a</Outline></Outlines>"
    joined = block + "\n<Thread>\n1:</Thread>\n"
    text, lines = "", []
    for _ in range(3):
        lines += [("p" + text, "</Parallel>" * bool(text) + block)]
        text += "</Parallel>" * bool(text) + block
        lines += [("p" + text + "\n<Thread>\n1:", "</Thread>")]
        text += joined[len(block) :]
    result = play("p", *lines, strategy=ThreadWeaver(max_blocks=2))
    assert result.token_ids == ids((joined + "</Parallel>") * 2 + block) and result.metrics.num_forks == 2
    assert result.malformed[0] == "thread 0: more than 2 parallel blocks; ended there"
    assert ThreadWeaver().max_blocks == 32


def test_a_prompt_may_begin_the_block():
    prompt = "p<Parallel><Outlines><Outline>1:a</Outline>"
    result = play(
        prompt,
        (prompt, "<Outline>2:b</Outline></Outlines>"),
        *((prompt + f"<Outline>2:b</Outline></Outlines>\n<Thread>\n{n}:", "</Thread>") for n in (1, 2)),
        (
            prompt + "<Outline>2:b</Outline></Outlines>\n<Thread>\n1:</Thread><Thread>\n2:</Thread>\n",
            "</Parallel><eos>",
        ),
    )
    assert result.malformed == () and result.metrics.threads_per_block == (2,)


class Terse(LogitsProcessor):
    """Closes the outlines, says one letter in every thread, and nothing more."""

    def __call__(self, input_ids, scores):
        last = int(input_ids[0, -1])
        token = {TAG["</Outline>"]: TAG["</Outlines>"], ids(":")[0]: ids("x")[0], ids("x")[0]: TAG["</Thread>"]}.get(
            last
        )
        token = TAG["</Parallel>"] if last == ids("\n")[0] else EOS if token is None else token
        return torch.full_like(scores, -torch.inf).index_fill(-1, torch.tensor(token), 0.0)


def test_a_thousand_outlines_queue():
    prompt = "<Parallel><Outlines>" + "".join(f"<Outline>{i}:</Outline>" for i in range(1000))
    engine = engine_with_tags(num_pages=1600, page_size=16)
    result = engine.generate(prompt, strategy=ThreadWeaver(max_threads=100), logits_processor=[Terse()])
    threads = "".join(f"<Thread>\n{i}:x</Thread>" for i in range(1000))
    assert result.token_ids == ids("</Outlines>\n" + threads + "\n</Parallel><eos>")
    assert result.metrics.threads_per_block == (1000,) and result.malformed == ()
    assert result.metrics.max_concurrency == 100
    assert_nothing_held(engine)


@pytest.mark.parametrize("limit", [1, 2, None])
def test_a_limit_on_threads_changes_no_token(limit):
    prompt = "<Parallel><Outlines>" + "".join(f"<Outline>{i}:</Outline>" for i in range(5))
    free, held = (
        engine_with_tags().generate(prompt, strategy=ThreadWeaver(max_threads=n), logits_processor=[Terse()])
        for n in (64, limit)
    )
    assert held.tree == free.tree and held.metrics.max_concurrency == (limit or 5)
    # Who waits for a turn has what was sampled before it on its path (the headers are all there from the fork on).
    longer = held.metrics.critical_path_tokens - free.metrics.critical_path_tokens
    assert longer == {1: 4, 2: 2, None: 0}[limit] * len(ids("x</Thread>"))


def test_any_babble_is_survived_with_plenty_or_few_pages():
    rng, forks, preemptions, broken, done = random.Random(0), 0, 0, 0, 0
    roomy = engine_with_tags(num_pages=4000)
    for _ in range(8):
        prompts = [[rng.randrange(200) for _ in range(rng.randint(1, 5))] for _ in range(4)]
        options = dict(logits_processor=[Babble()], max_new_tokens=rng.randint(30, 70), seed=1)
        expected = roomy.generate(prompts, strategy=ThreadWeaver(), **options)
        assert_nothing_held(roomy)
        forks += sum(r.metrics.num_forks for r in expected)
        broken += sum(bool(r.malformed) for r in expected)
        peak = expected[0].metrics.pages_peak
        tight = engine_with_tags(num_pages=rng.randint(peak // 2, peak))
        try:
            results = tight.generate(prompts, strategy=ThreadWeaver(max_threads=rng.randint(1, 4)), **options)
        except ValueError as error:
            assert "larger num_pages" in str(error)
        else:
            assert [r.tree for r in results] == [r.tree for r in expected]
            assert [sorted(r.malformed) for r in results] == [sorted(r.malformed) for r in expected]
            done += 1
            preemptions += sum(r.metrics.preemptions for r in results)
        assert_nothing_held(tight)
    assert forks > 20 and preemptions > 5 and 10 < broken < 32 and done > 4, (forks, preemptions, broken, done)


# ------------------------------------------------------------------------------------------------ tags and definitions


def test_a_tag_of_several_tokens_is_told_before_anything_runs():
    engine = make_engine(tokenizer=byte_tokenizer())
    with pytest.raises(
        ValueError, match=r"control tag '<Parallel>' must be one token.*makes it 10 .*add_special_tokens"
    ) as told:
        engine.generate("p", strategy=ThreadWeaver())
    assert "resize_token_embeddings" in str(told.value) and "'</Thread>'" in str(told.value)
    assert engine.generate("p", max_new_tokens=2).token_ids  # as good as new
    added = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(byte_tokenizer()._tokenizer.to_str()))
    added.add_special_tokens({"extra_special_tokens": list(TAGS)}, replace_extra_special_tokens=False)
    with pytest.raises(
        ValueError, match=rf"token id 260, outside the model's vocabulary of {VOCAB}; call model.resize"
    ):
        make_engine(tokenizer=added).generate("p", strategy=ThreadWeaver())


def test_without_a_tokenizer_the_ids_are_given():
    engine = make_engine(num_pages=600)
    with pytest.raises(ValueError, match="control tag '<Parallel>' needs a tokenizer, and the engine has none"):
        engine.generate([1], strategy=ThreadWeaver())
    pieces = TAG | {c: ids(c)[0] for c in "\n:.0123456789"}
    strategy = ThreadWeaver(pieces=pieces)
    assert hash(strategy) == hash(dataclasses.replace(strategy))
    prompt = list(ids("q: "))
    result = play(prompt, *TWO, strategy=strategy, engine=engine, eos_token_id=EOS)
    assert_trace(result, *EXPECTED["q: "])
    for lacks, message in (("</Thread>", "no token id for the control tag '</Thread>'"), (":", "nothing spells ':'")):
        partial = ThreadWeaver(pieces={k: v for k, v in pieces.items() if k != lacks})
        with pytest.raises(ValueError, match=message):
            # Without ":" no outline has an id either; a format whose header needs it says so when it forks.
            play(prompt, *TWO, strategy=dataclasses.replace(partial, outline=r"<Outline>(\d)"), engine=engine)


def test_a_system_of_ones_own_with_a_concat_join():
    plans = Tagged(
        tags=TAGS,
        opening="<Outlines>",
        trigger="</Outlines>",
        outline=r"(\d+)\.",
        header="<Thread>{id}.",
        stop="</Thread>",
        unclosed="</Thread>",
        after="</Parallel>",
        closing="",
        shape="(<Outlines></Outlines>(<Thread></Thread>)+</Parallel>)?",
        join="concat",
    )
    head, recorder = "<Outlines>1. a 2. b</Outlines>", Recorder()
    threads = ["<Thread>1.xyz</Thread>", "<Thread>2.w</Thread>"]
    result = play(
        "p",
        ("p", head),
        ("p" + head + "<Thread>1.", "xyz</Thread>"),
        ("p" + head + "<Thread>2.", "w</Thread>"),
        ("p" + head + "".join(threads) + "</Parallel>", "done<eos>"),
        strategy=plans,
        recorder=recorder,
    )
    assert result.token_ids == ids(head + "".join(threads) + "</Parallel>done<eos>") and result.malformed == ()
    assert [k.start for k in result.tree.children] == [1 + len(ids(head))] * 2  # siblings share positions
    assert assert_dense(result, recorder, "llama") == result.metrics.sampled_tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trigger": "</Plan>"}, "trigger='</Plan>' is not one of tags"),
        ({"outline": "("}, "outline='.' is no regular expression"),
        ({"outline": "a+"}, "has no group"),
        ({"shape": "["}, "shape='.' is no regular expression"),
        ({"header": "<Thread>"}, "header='<Thread>' does not hold {id}"),
        ({"join": "summary"}, "join='summary'; pass 'reprefill' or 'concat'"),
        ({"join": "concat"}, "next_header=.* with join='concat'"),
        ({"join": "concat", "next_header": None, "after": ""}, "after is empty"),
        ({"max_blocks": 0}, "max_blocks=0"),
        ({"max_blocks": None}, "max_blocks=None"),
        ({"max_threads": 0}, "max_threads=0"),
        ({"thread_tokens": 1.5}, "thread_tokens=1.5"),
    ],
)
def test_a_format_checks_its_fields(change, message):
    with pytest.raises(ValueError, match=message):
        ThreadWeaver(**change)


def test_the_example_in_the_docstring_is_a_format():
    # (Python 3.13 takes the indentation off docstrings)
    example = re.search(r"plans = (Tagged\(.*?\n *\)$)", Tagged.__doc__ or "", re.DOTALL | re.MULTILINE)
    plans = eval(example.group(1), {"Tagged": Tagged})
    assert plans.trigger == "</plan>" and re.findall(plans.outline, "<plan>1. a 2. b</plan>") == ["1", "2"]
    assert re.fullmatch(plans.shape, "<plan></plan><step></step><step></step><answer>")


def test_it_prints_and_is_at_the_front_door():
    assert ab.ThreadWeaver is ThreadWeaver and hash(ab.ThreadWeaver()) == hash(ThreadWeaver())
    assert repr(Sequential(ThreadWeaver(thread_tokens=9))).startswith("Sequential(strategy=ThreadWeaver(tags=(")
