"""The problems that taught SmolLM2 to fork, their layout against the engine, and the adapter."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from safetensors.torch import save_file
from training.adaptive import families, questions, text, wider
from training.adaptive.families import GOODS, NAMES, SPLITS, problems

import anabranch as ab
from anabranch.evaluation.evaluate import is_right, read_problems
from anabranch.models import adaptive
from training import adaptive as package

OWN = ("bills", "times", "story")
FILE = package.__path__[0] + "/problems.jsonl"


def some(split: str, count: int, names: tuple[str, ...] = OWN, seed: int = 3) -> list[families.Problem]:
    return list(itertools.islice(problems(split, seed, names), count))


def with_gym() -> tuple[str, ...]:
    """All families where reasoning-gym is installed, else ours alone."""
    try:
        import reasoning_gym  # noqa: F401
    except ImportError:
        return OWN
    return families.FAMILIES


def test_every_sum_product_and_comparison_that_is_written_is_true():
    seen = 0
    for split in SPLITS:
        for p in some(split, 120, with_gym()):
            written = " ".join(part.work for part in p.parts) + " " + p.join
            for chain in re.findall(r"[\d+*=-]*=[\d+*=-]*\d", written):
                assert len({eval(re.sub(r"\b0+(?=\d)", "", side)) for side in chain.split("=")}) == 1, (chain, p)
                seen += 1
            for big, than, small in re.findall(r"(\d+)([<>])(\d+)", p.join):
                assert (int(big) > int(small)) == (than == ">")
            assert p.threads == (len(p.parts) if len(p.parts) > 1 else 0) and len(p.parts) <= 6
    assert seen > 1000


def test_the_answer_follows_from_the_question():
    for p in some("train", 200, ("bills",)):
        assert p.prompt.count("cents") >= len(p.parts)
        by_name = {part.outline: part.result for part in p.parts}
        numbers = [int(x) for x in re.findall(r"\d+", p.prompt)]  # quantity, price and extra of one after another
        assert len(numbers) == 3 * len(by_name)
        for i, (name, result) in enumerate(by_name.items()):
            q, price, extra = numbers[3 * i : 3 * i + 3]
            assert result == f"{name} {q * price + extra}"
        assert [p.prompt.index(name) for name in by_name] == sorted(p.prompt.index(name) for name in by_name)
        assert p.answer == (", ".join(by_name.values()) if p.threads else p.parts[0].result.split()[1])
    for p in some("test", 60, ("times",)):
        totals = {part.outline: int(part.result.split()[1]) for part in p.parts}
        if p.threads:
            best = max(totals, key=lambda name: totals[name])
            assert p.answer == f"{best} {totals[best]}"


def test_splits_share_neither_names_nor_goods_nor_numbers_nor_problems():
    for table in (NAMES, GOODS, families.THINGS):
        assert not set(table["train"]) & (set(table["dev"]) | set(table["test"]))
        assert not set(table["dev"]) & set(table["test"])
    drawn = {split: some(split, 300, ("bills",)) for split in SPLITS}
    prompts = [p.prompt for many in drawn.values() for p in many]
    assert len(prompts) == len(set(prompts))
    for split, many in drawn.items():
        for p in many:
            for part in p.parts:
                a, b = map(int, re.search(r" (\d+)\*(\d+)", part.work).groups())
                assert families.held_out(a, b) == split
    assert not any(p.unseen_words for p in drawn["train"])
    assert 0.3 < sum(p.unseen_words for p in drawn["test"]) / 300 < 0.7


def test_the_problem_file_is_of_the_test_split():
    lines = read_problems(FILE)
    assert len(lines) == len({p.prompt for p in lines}) >= 400
    counts = {f: sum(p.family == f for p in lines) for f in families.FAMILIES}
    assert min(counts.values()) >= 40
    for p in lines:
        assert is_right(f"The answer is {p.answer}.", p.answer)
        assert not any(re.search(rf"\b{name}\b", p.prompt) for name in NAMES["train"])


@pytest.mark.parametrize("family", ["legs", "sums"])
def test_reasoning_gym_s_verifier_agrees(family):
    pytest.importorskip("reasoning_gym")
    from training.adaptive.score import verified

    for line in [p for p in read_problems(FILE) if p.family == family][:40]:
        assert verified(line, f"The answer is {line.answer}.<|im_end|>")
        wrong = re.sub(r"\d+$", lambda m: str(int(m[0]) + 1), line.answer)
        assert not verified(line, f"The answer is {wrong}.") and not verified(line, "I do not know.")
    if family == "sums":
        line = next(p for p in read_problems(FILE) if p.threads == 3 and p.family == family)
        parts = line.answer.split(", ")
        assert not verified(line, f"The answer is {', '.join(parts[::-1])}.") and not verified(
            line, f"The answer is {parts[0]}."
        )


# ------------------------------------------------------------------------------------------------ wider families


def of_wider(split: str, count: int, seed: int = 3) -> list[families.Problem]:
    names = [n for n in wider.WIDER if n != "herd" or "legs" in with_gym()]
    return list(itertools.islice(problems(split, seed, names, makers=wider.WIDER), count))


@pytest.mark.parametrize("split", SPLITS)
def test_the_wider_families_write_true_arithmetic_and_keep_to_their_split(split):
    made = of_wider(split, 120)
    assert len({p.prompt for p in made}) == 120
    assert {len(p.parts) for p in made} == {1, 2, 3, 4, 5, 6}
    others = {name for s in SPLITS if s != split for name in NAMES[s]}
    checked = 0
    for p in made:
        assert not any(re.search(rf"\b{name}\b", p.prompt) for name in others)
        for chain in re.findall(r"[\d+*-]+=\d+", " ".join(part.work for part in p.parts) + p.join):
            left, right = chain.split("=")
            assert eval(re.sub(r"\b0+(?=\d)", "", left)) == int(right), (chain, p)
            checked += 1
        for part in p.parts if p.family not in ("herd", "longest") else ():
            if found := re.search(r"(\d+)\*(\d+)", part.work):
                assert families.held_out(*sorted(map(int, found.groups()))) == split
        assert re.search(r"\d+$", p.parts[-1].result)
        if p.family in ("packs", "herd"):
            assert int(p.answer) == sum(int(part.result) for part in p.parts)
        elif p.family != "longest" and p.threads:
            assert p.answer == ", ".join(part.result for part in p.parts)
    assert checked > 400


def test_an_expression_s_value_is_what_the_prompt_says():
    """Read back from the prompt: one product with its sums a person."""
    seen = 0
    for p in of_wider("train", 200):
        if p.family != "values" or "plied" in p.prompt:
            continue
        said = p.prompt.replace(" times ", "*").replace(" x ", "*").replace(" × ", "*")
        said = re.sub(r" ?plus ?", "+", re.sub(r" ?minus ?", "-", said))
        terms = re.findall(r"\d+(?: ?[*+-] ?\d+)+", said.replace("\n- ", "; "))
        assert [eval(t) for t in terms] == [int(part.result) for part in p.parts], p.prompt
        seen += 1
    assert seen > 10


def test_a_join_adds_one_digit_at_a_time():
    assert families.added(126, 72) == "126+72: 126+70=196, 196+2=198"
    assert families.added(126, 70) == "126+70=196" and families.added(0, 84) == "0+84=84"
    assert families.added(58, 130) == "58+130: 58+100=158, 158+30=188"
    assert families.running_sum([60, 32, 70]) == "60+32: 60+30=90, 90+2=92, 92+70=162"


@pytest.mark.parametrize("name", ["problems_wider.jsonl", "problems_own_words.jsonl"])
def test_the_further_problem_files_can_be_read_and_answered(name):
    lines = read_problems(f"{package.__path__[0]}/{name}")
    assert len(lines) == len({p.prompt for p in lines}) >= 24
    for p in lines:
        assert is_right(f"The answer is {p.answer}.", p.answer) and p.threads != 1


# ------------------------------------------------------------------------------------------------ ordinary questions


def test_ordinary_questions_share_no_topic_and_no_chat_between_splits():
    drawn = {split: list(itertools.islice(questions.questions(split), n))
             for split, n in zip(SPLITS, (900, 48, 160), strict=True)}  # fmt: skip
    texts = {s: {"\n".join(m["content"] for m in chat if m["role"] != "system") for _, chat in many}
             for s, many in drawn.items()}  # fmt: skip
    assert all(len(texts[s]) == len(drawn[s]) for s in SPLITS)
    assert not texts["train"] & texts["test"] and not texts["train"] & texts["dev"] and not texts["dev"] & texts["test"]
    for kind in questions.KINDS.values():
        for topic in kind.topics:
            for split in set(SPLITS) - {questions.split_of(topic)}:
                whole = topic[0].isupper() and topic[-1] in ".?!"
                assert not whole or not any(topic in text for text in texts[split])
    assert not any("France" in text for text in texts["train"] | texts["dev"])
    kinds = {kind for kind, _ in drawn["test"]}
    assert len(kinds) >= 15 and "more" in kinds
    systems = {
        s: {m["content"] for _, chat in many for m in chat if m["role"] == "system"} for s, many in drawn.items()
    }
    assert systems["train"] & systems["test"] == {questions.STOCK_SYSTEM}


def test_no_ordinary_question_is_a_problem():
    for split in SPLITS:
        for _, chat in itertools.islice(questions.questions(split), 48):
            assert not re.search(r"\d+ ?[*+x×-] ?\d+", chat[-1]["content"]) and len(chat) in (1, 2, 3, 4)


# ------------------------------------------------------------------------------------------------ layout and adapter


def stock() -> None:
    try:
        ab.models.path("smollm2")
    except ab.models.ModelUnavailable as missing:
        pytest.skip(str(missing))


@pytest.mark.smollm2
def test_the_tokenizer_has_one_token_a_tag_and_ordinary_text_is_as_before():
    stock()
    from transformers import AutoTokenizer

    own, before = text.tokenizer(), AutoTokenizer.from_pretrained(ab.models.path("smollm2"))
    for tag, i in text.TAG_IDS.items():
        assert own(tag, add_special_tokens=False)["input_ids"] == [i] and own.decode([i]) == tag
    for said in ("Anna pays 7*38: 7*30=210.", "naïve – “quotes”\n\n", "<thread> < Thread>"):
        assert own(said)["input_ids"] == before(said)["input_ids"]
    assert own.eos_token == "<|im_end|>"


@pytest.mark.smollm2
def test_forced_through_the_engine_a_problem_has_the_layout_s_tokens_and_positions():
    stock()
    tokenizer = text.tokenizer()
    model = _untrained(tokenizer)
    for p in [next(p for p in some("train", 50) if p.threads == n) for n in (0, 2, 4)]:
        made = text.lesson_of(p, tokenizer)
        follow = _Teacher(made)
        engine = ab.Engine(model, tokenizer, num_pages=128)
        result = engine.generate(
            made.row.input_ids[: follow.prompt].tolist(), strategy=ab.ThreadWeaver(), do_sample=False,
            max_new_tokens=900, logits_processor=[follow],
        )  # fmt: skip
        assert result.metrics.num_threads == p.threads and not result.malformed
        assert is_right(result.text, p.answer)
        # Every sampled token is one of the trie's, with its position as depth.
        seen = set(zip(made.row.position_ids.tolist(), made.row.input_ids.tolist(), strict=True))
        for node in result.tree.walk():
            for run in node.runs:
                for offset, token in enumerate(run.token_ids):
                    assert (run.position + offset, token) in seen
        assert follow.asked == set(made.row.mask.previous[made.forked].tolist())


@pytest.mark.smollm2
def test_an_ordinary_row_is_the_chat_and_the_answer_without_a_tag():
    stock()
    tokenizer = text.tokenizer()
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello!"}]
    for ended in (True, False):
        row = text.ordinary_lesson(text.Answered("talk", chat, "Hello! How are you?", ended), tokenizer).row
        prompt = text.chat_ids(chat, tokenizer)
        assert row.input_ids[: len(prompt)].tolist() == prompt
        assert tokenizer.decode(row.input_ids[row.learnt]) == "Hello! How are you?" + "<|im_end|>" * ended
        assert row.learnt.tolist() == list(range(len(prompt), len(row.input_ids)))
        assert not set(row.input_ids.tolist()) & set(text.TAG_IDS.values())


@pytest.mark.smollm2
def test_with_the_adapter_switched_off_a_row_is_scored_as_by_the_stock_model():
    stock()
    from training.adaptive import train

    tokenizer = text.tokenizer()
    student = train.Student(rank=2, alpha=4.0)
    kept = train.ordinary_example(text.Answered("talk", [{"role": "user", "content": "Hi"}], "Hello!", True), tokenizer)
    problem = train.example(some("train", 1)[0], tokenizer)
    vocabulary = torch.arange(student.row_of.shape[0])
    batch = train.collate([kept])
    with torch.no_grad():
        before = student.model(**{k: batch[k] for k in ("input_ids", "position_ids", "branch_mask", "logits_to_keep")},
                               use_cache=False).logits[0]  # fmt: skip
        for lora in student.loras.values():
            torch.nn.init.normal_(lora.b, std=0.05)
        torch.testing.assert_close(student.stock_scores(batch), before, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(student(batch, vocabulary), before, rtol=1e-2, atol=1e-2)
        # In a row with a problem each kind of target has its own loss.
        loss, told = train.loss_of(student, [problem, kept, problem], vocabulary)
        alone, told_alone = train.loss_of(student, [kept], vocabulary)
        _, told_problem = train.loss_of(student, [problem], vocabulary)
        each = train.divergence(student, student.hidden(batch), [kept])
    assert told["ordinary"] == pytest.approx(told_alone["ordinary"], rel=1e-3)
    assert told["ordinary"] == pytest.approx(each[kept.forked].mean().item(), rel=1e-3)
    # The chat's own tokens count as well, with less weight: all but the first, which nothing predicts.
    assert len(each) == len(kept) - 1 and (~kept.forked).sum() > 5
    assert alone.item() == pytest.approx(((each * kept.weights).sum() / kept.weights.sum()).item(), rel=1e-3)
    assert told["problems"] == pytest.approx(told_problem["problems"], rel=1e-3)
    assert 0 < alone and torch.isfinite(loss)


class _Teacher:
    """A logits processor that lets the model write the row's forked run and nothing else."""

    def __init__(self, made):
        self.children: dict[int, dict[int, int]] = {}
        self.target: dict[int, int] = {}
        ids = made.row.input_ids.tolist()
        for i, up in enumerate(made.row.mask.previous.tolist()):
            self.children.setdefault(up, {})[ids[i]] = i
            if made.forked[i]:
                assert up not in self.target
                self.target[up] = ids[i]
        self.prompt = int(made.row.learnt[0])
        self.asked: set[int] = set()

    def __call__(self, input_ids, scores):
        out = torch.full_like(scores, -1e9)
        for i, ids in enumerate(input_ids.tolist()):
            row = -1
            for token in ids:
                row = self.children[row][token]
            self.asked.add(row)
            out[i, self.target[row]] = 0.0
        return out


def _untrained(tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    config._attn_implementation = "anabranch"
    return LlamaForCausalLM(config).eval()


@pytest.mark.smollm2
def test_an_adapter_is_merged_as_low_rank_updates_and_tag_rows(tmp_path):
    stock()
    from safetensors.torch import load_file

    base = ab.models.path("smollm2")
    weights = load_file(base / "model.safetensors")
    target = "model.layers.3.mlp.up_proj"
    out_features, in_features = weights[f"{target}.weight"].shape
    torch.manual_seed(0)
    a, b = torch.randn(2, in_features) * 0.1, torch.randn(out_features, 2) * 0.1
    tags = torch.randn(8, weights["model.embed_tokens.weight"].shape[1])
    adapter, folder = tmp_path / "adapter", tmp_path / "merged"
    adapter.mkdir(), folder.mkdir()
    save_file(
        {f"base_model.model.{target}.lora_A.weight": a, f"base_model.model.{target}.lora_B.weight": b,
         adaptive.TAG_ROWS: tags}, adapter / "adapter_model.safetensors",
    )  # fmt: skip
    config = {"r": 2, "lora_alpha": 4, "tag_ids": text.TAG_IDS, "chat_template": text.TEMPLATE}
    (adapter / "adapter_config.json").write_text(__import__("json").dumps(config))
    adaptive.merge(base, adapter, folder)
    merged = load_file(folder / "model.safetensors")
    want = weights[f"{target}.weight"].float() + 2.0 * (b @ a)
    torch.testing.assert_close(merged[f"{target}.weight"].float(), want, rtol=8e-3, atol=1e-3)
    rows = merged["model.embed_tokens.weight"][torch.tensor(list(text.TAG_IDS.values()))].float()
    torch.testing.assert_close(rows, tags, rtol=8e-3, atol=1e-3)
    same = "model.layers.4.mlp.up_proj.weight"
    assert torch.equal(merged[same].float(), weights[same].float())
    save_file({f"base_model.model.{target}.lora_A.weight": a[:, :5].clone(),
               f"base_model.model.{target}.lora_B.weight": b, adaptive.TAG_ROWS: tags},
              adapter / "adapter_model.safetensors")  # fmt: skip
    with pytest.raises(ValueError, match="does not fit"):
        adaptive.merge(base, adapter, folder)
