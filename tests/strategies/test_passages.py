"""A long prompt read passage by passage: side by side, keeping what the question needs; or one after another."""

from __future__ import annotations

import pytest
from engine_kit import byte_tokenizer, make_engine
from systems_kit import play

import anabranch as ab
from anabranch.strategies.calls.passages import take_apart
from anabranch.strategies.calls.running_summary import FINAL, REQUEST

TEXT = "Ana is 7. It rains! The mill is old. Ben is 9. Who is older?"


@pytest.mark.parametrize(
    ("text", "words", "question", "passages", "asked"),
    [
        (TEXT, 3, None, ["Ana is 7. ", "It rains! ", "The mill is old. ", "Ben is 9. "], "Who is older?"),
        (TEXT, 6, None, ["Ana is 7. It rains! ", "The mill is old. ", "Ben is 9. "], "Who is older?"),
        (TEXT, 99, None, ["Ana is 7. It rains! The mill is old. Ben is 9. "], "Who is older?"),
        ("One.\nTwo three.\nWho? Say a name.", 1, None, ["One.\n", "Two three.\n"], "Who? Say a name."),
        ("Who is older? Ana is 7.", 2, "Ana", ["Who is older? "], "Ana is 7."),
        ("Only a question?", 5, None, [], "Only a question?"),
        ('He said "no." Then 3.5 more. And?', 4, None, ['He said "no." ', "Then 3.5 more. "], "And?"),
        ("no end of a sentence", 2, "nowhere", [], "no end of a sentence"),
    ],
)
def test_taken_apart_nothing_is_lost(text, words, question, passages, asked):
    assert take_apart(text, words, question) == (passages, asked)
    assert "".join(passages) + asked == text


def scores(strategy, prompt, engine):
    """What each passage adds to the question's log-probability, from the model's plain forward."""
    import torch

    passages, question = take_apart(prompt, strategy.passage_words)
    found = []
    for passage in ("", *passages):
        ids = byte_tokenizer()(f"{passage.strip()}\n", add_special_tokens=False)["input_ids"]
        asked = byte_tokenizer()(question, add_special_tokens=False)["input_ids"]
        logits = engine.model(torch.tensor([[*ids, *asked]])).logits[0].detach().log_softmax(-1)
        found.append(sum(float(logits[len(ids) - 1 + i, token]) for i, token in enumerate(asked)))
    return passages, [likelihood - found[0] for likelihood in found[1:]]


@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
def test_passages_that_make_the_question_likelier_stay(keep):
    engine = make_engine(tokenizer=byte_tokenizer(), num_pages=200)
    strategy = ab.SelectPassages(passage_words=3, keep=keep)
    passages, gains = scores(strategy, TEXT, engine)
    assert max(gains) > 0 > min(gains)  # else the test says nothing
    kept = [p for p, gain in zip(passages, gains, strict=True) if gain > 0 and gain >= keep * max(gains)]
    result = engine.generate(TEXT, strategy=strategy, max_new_tokens=5)
    assert result.answers == kept and 0 < len(kept) < len(passages)
    assert result.text == engine.generate("".join(kept) + "Who is older?", max_new_tokens=5).text
    *readers, answer = result.tree.children
    assert {(kid.role, kid.fate) for kid in readers} == {("fresh", "discarded")} and len(readers) == len(passages) + 1
    assert (answer.role, answer.fate) == ("fresh", "joined")
    assert result.metrics.longest_context < len(TEXT)  # bytes are tokens here: no thread held it all
    engine.clear_prefix_cache()
    assert engine.cache.usage().pages_free == 200


def test_where_no_passage_helps_all_stay_and_a_bare_question_is_answered():
    engine = make_engine(tokenizer=byte_tokenizer(), num_pages=200)
    strategy = ab.SelectPassages()
    assert strategy._kept(["a", "b"], [-1.0, 0.0]) == ["a", "b"]
    result = engine.generate("Who?", strategy=strategy, max_new_tokens=4)
    assert result.answers == [] and result.text == engine.generate("Who?", max_new_tokens=4).text


def test_the_answer_is_written_by_any_strategy():
    engine = make_engine(tokenizer=byte_tokenizer(), num_pages=400)
    for inner in (ab.SelfConsistency(n=3), ab.Aspects(intro_tokens=4, aspect_tokens=4)):
        for outer in (ab.SelectPassages(inner, keep=0.0), ab.RunningSummary(inner, summary_tokens=4)):
            result = engine.generate(TEXT, strategy=outer, max_new_tokens=12)
            answer = result.tree.children[-1]
            assert len(answer.children) == 3 and result.text
            assert ab.Sequential(outer).needs == inner.needs
    engine.clear_prefix_cache()
    assert engine.cache.usage().pages_free == 400


def test_a_summary_goes_on_and_its_passage_does_not():
    request, final = "{question}|{summary}|{passage}>", "{summary}?{question}"
    strategy = ab.RunningSummary(passage_words=4, request=request, final=final, summary_stop=";", nothing="-")
    result, _ = play(
        strategy,
        "A is 7. B is 9. Who?",
        ("Who?|-|A is 7.>", " A 7<eos>"),
        ("Who?|A 7|B is 9.>", "A 7, B 9;"),
        ("A 7, B 9;?Who?", "B<eos>"),
    )
    assert result.text == "B" and result.answers == ["A 7", "A 7, B 9;"]
    assert [kid.fate for kid in result.tree.children] == ["discarded", "discarded", "joined"]


def test_an_empty_summary_is_counted_and_the_one_before_stays():
    strategy = ab.RunningSummary(
        passage_words=4, request="{question}|{summary}|{passage}>", final="{summary}?{question}"
    )
    result, _ = play(
        strategy,
        "A is 7. B is 9. Who?",
        ("Who?|none yet|A is 7.>", "A 7<eos>"),
        ("Who?|A 7|B is 9.>", "<eos>"),
        ("A 7?Who?", "A<eos>"),
    )
    assert result.text == "A" and result.answers == ["A 7", "A 7"] and len(result.malformed) == 1


def test_what_is_asked_by_default_holds_what_it_must():
    assert all(f"{{{name}}}" in REQUEST for name in ("question", "summary", "passage"))
    assert "{summary}" in FINAL and FINAL.endswith("{question}")


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: ab.SelectPassages("plain"), TypeError, "is not a Strategy"),
        (lambda: ab.SelectPassages(keep=1.5), ValueError, "a share from 0 to 1"),
        (lambda: ab.SelectPassages(passage_words=0), ValueError, "passage_words"),
        (lambda: ab.SelectPassages(question="("), ValueError, "no regular expression"),
        (lambda: ab.RunningSummary(request="{summary}"), ValueError, "does not hold {passage}"),
        (lambda: ab.RunningSummary(final="x"), ValueError, "does not hold {summary}"),
        (lambda: ab.RunningSummary(summary_tokens=0), ValueError, "summary_tokens"),
    ],
)
def test_mistakes(make, error, said):
    with pytest.raises(error, match=said.replace("{", r"\{")):
        make()
