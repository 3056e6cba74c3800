"""Chats: through the template, continued where the assistant spoke last, with what else the template takes."""

from __future__ import annotations

import os

import pytest
from engine_kit import byte_tokenizer, make_engine
from text_kit import byte_fallback, engine_for

import anabranch as ab
from anabranch.text.prompts import Text, takes_chats

USER = {"role": "user", "content": "Name a fruit."}
BEGUN = {"role": "assistant", "content": "My favourite is the"}
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content TRIM }}|{% endfor %}"
    "{% if tools %}T{{ tools | length }}{% endif %}{% if documents %}D{{ documents[0].title }}{% endif %}"
    "{% if add_generation_prompt %}[a]{% if thinking is defined and not thinking %}<no>{% endif %}{% endif %}"
)


def chatty(trim: bool = False):
    tokenizer = byte_fallback()
    tokenizer.chat_template = TEMPLATE.replace("TRIM", "| trim" if trim else "")
    return tokenizer


def prompt_of(tokenizer, chat, **options) -> str:
    """The text that the model is asked to go on with."""
    result = engine_for(tokenizer).generate(chat, max_new_tokens=1, **options)
    return tokenizer.decode(list(result.prompt_token_ids))


def test_a_chat_that_ends_with_the_assistant_is_continued():
    tokenizer = chatty()
    assert prompt_of(tokenizer, [USER]) == "[user]Name a fruit.|[a]"
    assert prompt_of(tokenizer, [USER, BEGUN]) == "[user]Name a fruit.|[assistant]My favourite is the"
    assert prompt_of(tokenizer, [USER, BEGUN, USER]).endswith("the|[user]Name a fruit.|[a]")
    parts = {"role": "assistant", "content": [{"type": "text", "text": "It is "}]}
    tokenizer.chat_template = TEMPLATE.replace(
        "m.content TRIM", "m.content if m.content is string else m.content[0].text"
    )
    assert prompt_of(tokenizer, [USER, parts]) == "[user]Name a fruit.|[assistant]It is "


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("end", ["", " ", "\n", " \n\n", "\t"])
def test_it_is_continued_to_the_last_space_even_where_the_template_trims(trim, end):
    chat = [USER, {"role": "assistant", "content": f"It is the{end}"}]
    assert prompt_of(chatty(trim), chat) == f"[user]Name a fruit.|[assistant]It is the{end}"


def test_the_caller_may_decide_otherwise():
    tokenizer, chat = chatty(), [USER, BEGUN]
    for options, end in (
        ({"add_generation_prompt": True}, "is the|[a]"),
        ({"continue_final_message": False}, "is the|[a]"),
        ({"add_generation_prompt": False}, "is the|"),
        ({"continue_final_message": True, "add_generation_prompt": False}, "is the"),
    ):
        assert prompt_of(tokenizer, chat, chat_template_kwargs=options).endswith(end)
    assert prompt_of(tokenizer, [USER], chat_template_kwargs={"continue_final_message": True}).endswith("fruit.")
    with pytest.raises(ValueError, match="pass one of them"):
        both = {"continue_final_message": True, "add_generation_prompt": True}
        prompt_of(tokenizer, chat, chat_template_kwargs=both)


def test_a_template_that_changes_the_last_message_is_refused():
    tokenizer = chatty()
    tokenizer.chat_template = TEMPLATE.replace("m.content TRIM", "m.content[:4]")
    with pytest.raises(ValueError, match="prompt: the chat template cannot go on with the last message"):
        prompt_of(tokenizer, [USER, BEGUN])
    assert prompt_of(tokenizer, [USER, BEGUN], chat_template_kwargs={"add_generation_prompt": True}).endswith(
        "My f|[a]"
    )


def test_what_else_the_template_takes_is_passed_on():
    tokenizer = chatty()

    def lookup(word: str) -> str:
        """Look a word up.

        Args:
            word: the word.
        """

    options = {"thinking": False, "tools": [lookup], "documents": [{"title": "Fruit", "text": "…"}]}
    assert prompt_of(tokenizer, [USER], chat_template_kwargs=options).endswith("|T1DFruit[a]<no>")
    engine = engine_for(tokenizer)
    many = engine.generate([[USER], [USER, BEGUN]], max_new_tokens=1, chat_template_kwargs={"thinking": False})
    ends = [tokenizer.decode(list(r.prompt_token_ids))[-6:] for r in many]
    assert ends == ["a]<no>"[-6:], "is the"]
    (*_, finish) = engine.stream([USER], max_new_tokens=1, chat_template_kwargs={"thinking": False})
    assert finish.result.prompt_token_ids == many[0].prompt_token_ids


@pytest.mark.parametrize(
    "prompt, options, message",
    [
        ("text", {"thinking": False}, "chat_template_kwargs: prompt is no chat"),
        ([1, 5], {"tools": []}, "chat_template_kwargs: prompt is no chat"),
        ([[USER], "text"], {"thinking": False}, r"chat_template_kwargs: prompt\[1\] is no chat"),
        ([USER], ["thinking"], "pass a dict of what the chat template takes"),
        ([USER], {"tokenize": False}, "'tokenize' is not the template's to decide"),
        ([{"role": "user"}], None, r"prompt\[0\]: a chat message needs 'role' and 'content'"),
    ],
)
def test_what_no_template_takes_is_refused(prompt, options, message):
    with pytest.raises(ValueError, match=message):
        engine_for(chatty()).generate(prompt, max_new_tokens=1, chat_template_kwargs=options)


def test_none_and_nothing_are_the_same():
    engine = engine_for(chatty())
    for options in (None, {}):
        assert engine.generate("he", max_new_tokens=1, chat_template_kwargs=options).token_ids


def test_strategies_ask_through_the_same_template():
    asked = []

    class Asks(ab.strategies.Strategy):
        def run(self, trunk):
            asked.append(trunk.text_of(trunk.encode_prompt([{"role": "user", "content": "x"}])))
            asked.append(trunk.text_of(trunk.encode_prompt("x")))
            yield trunk.decode(1)

    options = {"thinking": False, "continue_final_message": True}
    engine_for(chatty()).generate([USER, BEGUN], strategy=Asks(), chat_template_kwargs=options, max_new_tokens=1)
    assert asked == ["[user]x|[a]<no>", "<s> x"]


def test_a_continued_chat_is_traced_and_replayed(tmp_path):
    tokenizer = byte_tokenizer()
    engine = make_engine(tokenizer=tokenizer)
    result = engine.generate([USER, BEGUN], strategy=ab.SelfConsistency(2), max_new_tokens=5, eos_token_id=None)
    assert tokenizer.decode(list(result.prompt_token_ids)).endswith("My favourite is the")
    ab.trace.save(result, tmp_path / "trace.json")
    again = ab.replay(ab.trace.load(tmp_path / "trace.json"), engine)
    assert again.tree == result.tree and again.text == result.text


def test_tool_calls_need_no_content():
    tokenizer = chatty()
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    tokenizer.chat_template = TEMPLATE.replace("m.content TRIM", "m.content or m.tool_calls[0].function.name")
    assert prompt_of(tokenizer, [USER, call, USER]).count("|[assistant]f|") == 1
    with pytest.raises(ValueError, match="cannot go on with the last message"):
        prompt_of(tokenizer, [USER, call])


# ------------------------------------------------------------------------------------------------ mistral-common


def mistral(file: str):
    common = pytest.importorskip("mistral_common", reason="mistral-common is not installed")
    from transformers import MistralCommonBackend

    path = os.path.join(os.path.dirname(common.__file__), "data", file)
    if not os.path.exists(path):
        pytest.skip(f"this mistral-common has no {file}")
    try:
        return MistralCommonBackend(path)
    except ImportError as error:
        pytest.skip(f"this mistral-common is not the one that Transformers wants: {error}")


MISTRAL = ("tekken_240911.json", "mistral_instruct_tokenizer_240323.model.v3", "tokenizer.model.v1")


@pytest.mark.parametrize("file", MISTRAL)
def test_mistral_common_reads_as_text_and_takes_chats(file):
    tokenizer = mistral(file)
    text = Text(tokenizer, len(tokenizer), frozenset([2]))
    assert takes_chats(tokenizer)
    ids = text.prompt_ids([USER])
    assert ids == tokenizer.apply_chat_template([USER], return_dict=True)["input_ids"]
    begun = text.prompt_ids([USER, {"role": "assistant", "content": "It is the "}])
    assert begun[: len(ids)] == ids and text.text(begun[len(ids) :], reversed(ids)).lstrip(" ") == "It is the "
    for answer in ("Well then.", "ພາສາລາວ", "മലയാളം", "👩‍👩‍👧 龘\n\n ok"):
        written = tokenizer(answer, add_special_tokens=False)["input_ids"]
        reader = text.reader(reversed(ids))
        told = "".join(reader.push([t]) for t in written) + reader.rest()
        assert told == text.text(written, reversed(ids)) and told.removeprefix(" ") == answer
        added = text.encode(answer, reversed(ids))
        assert text.text(added, reversed(ids)) == answer
    if ids[1] in tokenizer.all_special_ids:
        assert text.text([ids[1]], reversed(ids)) == "[INST]" and text.text(ids).replace("] ", "]").startswith(
            "<s>[INST]Name a"
        )
