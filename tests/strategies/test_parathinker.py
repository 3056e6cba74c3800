"""ParaThinker: paths with tags and vectors of their own, spliced, then a forced summary.

Scores are compared with a forward written out here, which adds the vectors by its own means.
"""

from __future__ import annotations

import copy

import pytest
import torch
from engine_kit import Dense, Recorder, assert_nothing_held, byte_tokenizer, make_engine, make_model
from safetensors.torch import save_file
from systems_kit import Babble, Script, assert_same_everywhere, engine_with, ids, play, survive, tokenizer_with
from transformers.models.llama.modeling_llama import rotate_half

import anabranch as ab
from anabranch import training

TAGS = (*(f"{t}think{i}>" for i in range(1, 5) for t in ("<", "</")), "<summary>", "</summary>", "</think>")
THOUGHTS = ("<think1>a</think1>", "<think2>bb bb</think2>", "<think3>cc</think3>")
LINES = [
    *(("why" + t[:8], t[8:]) for t in THOUGHTS),
    ("why" + "".join(THOUGHTS) + "<summary>", "ok</summary>"),
]
PLAIN = ab.ParaThinker(paths=3, biased=False)


def tags(text):
    return ids(text, *TAGS)


def vectors(segments: int = 5) -> ab.SegmentVectors:
    """Strong enough that a missing one shows; segment 0 has one too."""
    return ab.SegmentVectors(torch.randn(2, segments, 32, generator=torch.Generator().manual_seed(5)))


def biased_logits(model, token_ids, positions, sees, segments, table):
    """A Llama's logits [T, vocabulary], written out: row t attends to the tokens `sees[t]`; K and V get the vectors."""
    config, size = model.config, len(token_ids)
    mask = torch.full((size, size), -torch.inf)
    for row, seen in enumerate(sees):
        mask[row, seen] = 0
    where = torch.tensor([positions])
    x = model.model.embed_tokens(torch.tensor(token_ids))
    cos, sin = (t[0][:, None] for t in model.model.rotary_emb(x[None], where))
    heads, group = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    for layer, block in enumerate(model.model.layers):
        attention, h = block.self_attn, block.input_layernorm(x)
        q = attention.q_proj(h).view(size, -1, config.head_dim)
        extra = table[layer][torch.tensor(segments)][:, None]
        k = attention.k_proj(h).view(size, heads, -1) + extra
        v = attention.v_proj(h).view(size, heads, -1) + extra
        q, k = (t * cos + rotate_half(t) * sin for t in (q, k))
        k, v = (t.repeat_interleave(group, 1) for t in (k, v))
        weights = (torch.einsum("qhd,khd->hqk", q, k) * config.head_dim**-0.5 + mask).softmax(-1)
        x = x + attention.o_proj(torch.einsum("hqk,khd->qhd", weights, v).reshape(size, -1))
        x = x + block.mlp(block.post_attention_layernorm(x))
    return model.lm_head(model.model.norm(x))


def assert_biased(result, recorder, table) -> int:
    """Every recorded row equals the forward above; how many were compared."""
    dense = Dense(result, "llama")  # its tokens, positions and who sees whom; not its scores
    segments = [0] * len(dense.ids)
    for node in result.tree.walk():
        for index in dense.own[node.id] if node.id != "0" else ():
            segments[index] = int(node.id.split(".")[1]) + 1
    with torch.no_grad():
        logits = biased_logits(make_model(), dense.ids, dense.positions, dense.sees, segments, table)
    by_context = {tuple(dense.ids[i] for i in seen): logits[row] for row, seen in enumerate(dense.sees)}
    compared = 0
    for context, scores in recorder.seen:
        if context in by_context:
            torch.testing.assert_close(scores, by_context[context], atol=3e-4, rtol=3e-4)
            compared += 1
    return compared


def generate(strategy, *lines, engine=None, prompt="why", **options):
    recorder, table = Recorder(), vectors()
    engine = engine or engine_with(*TAGS, segment_vectors=table)
    result = engine.generate(
        prompt,
        strategy=strategy,
        logits_processor=[recorder, Script(*lines, pieces=TAGS)],
        **({"max_new_tokens": 100} | options),
    )
    assert_nothing_held(engine)
    assert not any(module._forward_hooks for module in engine.model.modules())
    return result, recorder, table.vectors


def test_paths_are_spliced_and_the_summary_goes_on_from_the_longest():
    result, compared = play(PLAIN, "why", *LINES, pieces=TAGS)
    text = "".join(THOUGHTS) + "<summary>ok</summary>"
    assert result.text == text and result.token_ids == tags(text) and result.malformed == ()
    assert {kid.start for kid in result.tree.children} == {3}
    summary = next(run for run in result.tree.runs if run.kind == "inserted")
    longest = max(kid.stop for kid in result.tree.children)
    assert summary.token_ids == tags("<summary>") and summary.position == longest == 3 + len(tags(THOUGHTS[1]))
    assert compared == result.metrics.sampled_tokens
    assert result.metrics.rows == 3 + result.metrics.total_tokens - 1  # nothing is computed again


def test_every_row_has_the_vectors_of_its_segment():
    result, recorder, table = generate(ab.ParaThinker(paths=3), *LINES)
    assert result.text == "".join(THOUGHTS) + "<summary>ok</summary>"
    assert assert_biased(result, recorder, table) == result.metrics.sampled_tokens
    assert [run.kv_segment for run in result.tree.runs] == [0, 1, 2, 3, 0, 0]
    assert [run.kv_segment for kid in result.tree.children for run in kid.runs] == [1, 1, 2, 2, 3, 3]
    wrong = table.clone()
    wrong[:, 0] = 0  # the proof can fail: by the prompt's own vector alone
    with pytest.raises(AssertionError):
        assert_biased(result, recorder, wrong)


def test_every_row_in_a_batch_with_few_pages():
    """After pre-emptions paths are rebuilt by the same forks and joins, with the same vectors."""
    table = vectors()
    engine = engine_with(*TAGS, segment_vectors=table, num_pages=14)
    recorder = Recorder()
    prompts = ["why", "who", "how", "when"]
    script = [(before.replace("why", p, 1), says) for p in prompts for before, says in LINES]
    results = engine.generate(
        prompts, strategy=ab.ParaThinker(paths=3), logits_processor=[recorder, Script(*script, pieces=TAGS)],
        max_new_tokens=60,
    )  # fmt: skip
    assert sum(r.metrics.preemptions for r in results) > 0
    assert sum(assert_biased(r, recorder, table.vectors) for r in results) >= sum(
        r.metrics.sampled_tokens for r in results
    )
    assert_nothing_held(engine)


@pytest.mark.parametrize("strategy", [ab.ParaThinker(paths=3), ab.Sequential(ab.ParaThinker(paths=3))])
def test_replay_and_training_see_the_same(strategy, tmp_path):
    result, _, table = generate(strategy, *LINES, logprobs=True)
    path = tmp_path / "trace.json"
    result.trace().save(path)
    trace = ab.records.trace.load(path)
    assert trace.tree == result.tree
    engine = engine_with(*TAGS, segment_vectors=vectors())
    again = ab.replay(trace, engine)
    pairs = list(ab.engine.logprob_pairs(result, again))
    assert len(pairs) == result.metrics.sampled_tokens and max(abs(a - b) for a, b in pairs) < 1e-4
    layout = training.from_trace(trace)
    assert layout.kv_segments.tolist() == training.Layout.from_dict(layout.as_dict()).kv_segments.tolist()
    with torch.no_grad():
        got = layout.logprobs(engine.model, segment_vectors=ab.SegmentVectors(table))
        torch.testing.assert_close(got, layout.recorded[layout.learnt], atol=2e-4, rtol=0)
        assert (layout.logprobs(engine.model) - got).abs().max() > 1e-2  # without them it is another model
    paths = [kid.token_ids[1:] for kid in result.tree.children]
    formatted = training.formats.parathinker(
        tags("why"), paths, tags("ok</summary>"), headers=[tags(t[:8]) for t in THOUGHTS], after=tags("<summary>")
    )
    assert formatted.input_ids.tolist() == layout.input_ids.tolist()
    assert formatted.position_ids.tolist() == layout.position_ids.tolist()
    assert formatted.kv_segments.tolist() == layout.kv_segments.tolist()


def test_vectors_can_be_trained():
    table = torch.nn.Parameter(vectors().vectors.clone())
    layout = training.formats.parathinker(tags("why"), [tags("a"), tags("bb")], tags("ok"), after=tags("<summary>"))
    engine = engine_with(*TAGS)
    layout.logprobs(engine.model, segment_vectors=ab.SegmentVectors(table)).sum().backward()
    used = table.grad.abs().sum((0, 2)) > 0
    assert used.tolist() == [True, True, True, False, False]


def test_a_stray_tag_becomes_the_first_and_any_end_the_paths_own():
    lines = [
        ("why<think1>", "a<think3>"),
        ("why<think1>a<think1>", "b<summary>"),
        ("why<think1>a<think1>b<think1>", "</think2>"),
        ("why<think2>", "<eos>"),
        ("why<think3>", "c</think>"),
        ("why<think1>a<think1>b<think1></think1><think2></think2><think3>c</think3><summary>", "ok<eos>"),
    ]
    result, recorder, table = generate(ab.ParaThinker(paths=3), *lines)
    assert result.text == "<think1>a<think1>b<think1></think1><think2></think2><think3>c</think3><summary>ok</summary>"
    assert result.malformed == (
        "thread 0: ended by eos without </summary>",
        *["thread 0.0: a path or the summary begun inside a path; taken for <think1>"] * 2,
        "thread 0.0: ended by another tag without </think1>",
        "thread 0.1: ended by eos without </think2>",
        "thread 0.2: ended by another tag without </think3>",
    )
    assert assert_biased(result, recorder, table) > 6


def test_what_a_limit_cuts_stays_open():
    lines = [
        ("why<think1>", "abcd"),
        ("why<think2>", "x</think2>"),
        ("why<think1>ab<think2>x</think2><summary>", "klm"),
    ]
    result, _, _ = generate(ab.ParaThinker(paths=2, path_tokens=2, summary_tokens=3), *lines)
    assert result.text == "<think1>ab<think2>x</think2><summary>klm"
    assert [kid.ended for kid in result.tree.children] == ["length", "stop"] and len(result.malformed) == 2


def test_the_summary_may_be_made_to_begin_with_a_sentence():
    strategy = ab.ParaThinker(paths=3, opening=ab.ParaThinker.OPENING)
    before = "why" + "".join(THOUGHTS) + "<summary>" + ab.ParaThinker.OPENING
    result, recorder, table = generate(strategy, *LINES[:3], (before, " 7</summary>"))
    assert result.text.endswith("<summary>" + ab.ParaThinker.OPENING + " 7</summary>")
    assert assert_biased(result, recorder, table) == result.metrics.sampled_tokens


def test_other_strategies_of_the_same_engine_see_no_vectors():
    engine = engine_with(*TAGS, segment_vectors=vectors())
    generate(ab.ParaThinker(paths=3), *LINES, engine=engine)
    plain = engine.generate("why", max_new_tokens=8)
    assert plain.token_ids == engine_with(*TAGS).generate("why", max_new_tokens=8).token_ids


def test_rows_of_other_requests_in_the_same_steps_get_no_vectors():
    table, recorder = vectors(), Recorder()
    engine = engine_with(*TAGS, segment_vectors=table)
    script = Script(*LINES, pieces=TAGS)
    handles = [
        engine.add("why", strategy=ab.ParaThinker(paths=3), logits_processor=[recorder, script], max_new_tokens=60),
        engine.add("another", max_new_tokens=12, eos_token_id=None),
    ]
    while not all(handle.done for handle in handles):
        engine.step()
    result, plain = (handle.result() for handle in handles)
    assert assert_biased(result, recorder, table.vectors) == result.metrics.sampled_tokens
    assert plain.token_ids == engine_with(*TAGS).generate("another", max_new_tokens=12, eos_token_id=None).token_ids


def test_nothing_remains_after_an_exception():
    def broken(input_ids, scores):
        if input_ids.shape[1] > 5:
            raise RuntimeError("broken")
        return scores

    engine = engine_with(*TAGS, segment_vectors=vectors())
    with pytest.raises(RuntimeError, match="broken"):
        engine.generate("why", strategy=ab.ParaThinker(paths=3), logits_processor=[broken])
    assert_nothing_held(engine)
    assert not any(module._forward_hooks for module in engine.model.modules())


# ------------------------------------------------------------------------------------------------ where they come from


def state_dict(table, **change):
    return {f"model.layers.{n}.self_attn.seg_embeddings.weight": table[n].clone() for n in range(len(table))} | change


def test_vectors_are_found_in_a_state_dict_a_file_and_where_the_model_came_from(tmp_path):
    table = vectors().vectors
    loaded = ab.SegmentVectors.load(state_dict(table))
    assert torch.equal(loaded.vectors, table) and loaded.num_segments == 5
    assert repr(loaded) == "SegmentVectors(layers=2, segments=5, head_dim=32)"
    model = make_model()
    model.save_pretrained(tmp_path)
    save_file(state_dict(table), tmp_path / "vectors.safetensors")
    assert torch.equal(ab.SegmentVectors.load(tmp_path).vectors, table)
    assert torch.equal(ab.SegmentVectors.load(str(tmp_path / "vectors.safetensors")).vectors, table)
    model.config._name_or_path = str(tmp_path)
    engine = ab.Engine(model, tokenizer_with(*TAGS), num_pages=200, page_size=4)
    result, recorder, _ = generate(ab.ParaThinker(paths=3), *LINES, engine=engine)
    assert assert_biased(result, recorder, table) == result.metrics.sampled_tokens


def test_qwen_norms_its_keys_and_the_vectors_come_behind():
    """Added to what is rotated: with the vectors in K and V by hand, the same scores."""
    table = vectors()
    recorder = Recorder()
    engine = engine_with(*TAGS, family="qwen3", segment_vectors=table)
    result = engine.generate(
        "why", strategy=ab.ParaThinker(paths=3), logits_processor=[recorder, Script(*LINES, pieces=TAGS)], logprobs=True
    )
    model = copy.deepcopy(engine.model)
    layout = training.from_trace(result)
    for n, block in enumerate(model.model.layers):
        rows = table.vectors[n][layout.kv_segments]

        class Adds(torch.nn.Module):
            def __init__(self, inner, rows):
                super().__init__()
                self.inner, self.rows = inner, rows

            def forward(self, x):
                out = self.inner(x)
                if out.shape[1] != len(self.rows):
                    return out  # the probe's forward
                return out + (self.rows[None, :, None] if out.dim() == 4 else self.rows.repeat(1, 2)[None])

        block.self_attn.k_norm = Adds(block.self_attn.k_norm, rows)
        block.self_attn.v_proj = Adds(block.self_attn.v_proj, rows)
    with torch.no_grad():
        torch.testing.assert_close(layout.recorded[layout.learnt], layout.logprobs(model), atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"model.embed_tokens.weight": torch.zeros(2)}, "dict holds no segment vectors at all"),
        ({"model.layers.1.self_attn.seg_embeddings.weight": torch.zeros(2, 4)}, "no segment vectors of layer 0"),
        (
            state_dict(torch.zeros(2, 4, 8), **{"model.layers.1.self_attn.seg_embeddings.weight": torch.zeros(4, 9)}),
            "of different shapes",
        ),
        ("/no/such/folder", "is no .safetensors file, nor a folder with any"),
    ],
)
def test_a_checkpoint_without_the_vectors(source, message):
    with pytest.raises(ValueError, match=message):
        ab.SegmentVectors.load(source)


def test_an_engine_without_vectors_with_too_few_or_with_others():
    engine = engine_with(*TAGS)
    with pytest.raises(ValueError, match=r"needs the model's segment vectors.*SegmentVectors\.load.*biased=False"):
        engine.generate("why", strategy=ab.ParaThinker(paths=3))
    few = engine_with(*TAGS, segment_vectors=vectors(3))
    with pytest.raises(ValueError, match=r"needs vectors of 4 segments.*ask for fewer paths"):
        few.generate("why", strategy=ab.Sequential(ab.ParaThinker(paths=3)))
    with pytest.raises(ValueError, match=r"made for \(layers, head_dim\) \(3, 32\), but the model has \(2, 32\)"):
        make_engine(segment_vectors=ab.SegmentVectors(torch.zeros(3, 5, 32)))
    with pytest.raises(ValueError, match=r"expected floats of shape \[layers, segments, head_dim\]"):
        ab.SegmentVectors(torch.zeros(3, 5))
    assert_nothing_held(engine)


def test_segments_of_a_fork_are_checked():
    class Wrong(ab.Strategy):
        def run(self, trunk):
            yield trunk.decode(1)
            trunk.fork(2, segments=[1])

    with pytest.raises(ValueError, match=r"fork: segments=\[1\]; pass one for each of the 2 children"):
        engine_with(*TAGS).generate("why", strategy=Wrong())


USUAL = {
    **{f"<think{i}>": ["a", "b", "<think2>"] for i in range(1, 5)},
    "a": ["a", "b", *(f"</think{i}>" for i in range(1, 5))],
    "b": ["</think1>", "</think2>", "<summary>", "a"],
    "<summary>": ["a", "b", "</summary>"],
}
BABBLE = Babble(TAGS, USUAL)


@pytest.mark.parametrize("biased", [False, True])
def test_the_same_seed_gives_the_same_tree(biased):
    strategy = ab.ParaThinker(paths=3, biased=biased, path_tokens=20)
    with_vectors = {"engine": {"segment_vectors": vectors()}} if biased else {}
    prompts = [f"question {n}" for n in range(16)]
    results = assert_same_everywhere(strategy, prompts, BABBLE, *TAGS, pages=60, **with_vectors)
    assert all(r.metrics.num_threads == 3 for r in results)


def babbled(count):
    results = survive(ab.ParaThinker(paths=4, biased=False), lambda seed: f"{seed}", BABBLE, *TAGS, count=count)
    assert any(r.metrics.format_correctness == 0.0 for r in results)
    assert all("</think4><summary>" in r.text or r.tree.children[-1].ended == "length" for r in results)


def test_malformed_generations():
    babbled(300)


@pytest.mark.slow
def test_many_malformed_generations():
    babbled(10_000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paths": 0}, "ParaThinker: paths=0"),
        ({"opening": None}, "opening=None; pass a text"),
        ({"biased": 1}, "biased=1; pass True or False"),
        ({"path_tokens": 0}, "path_tokens=0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        ab.ParaThinker(**options)


def test_a_tokenizer_without_the_tags():
    with pytest.raises(ValueError, match=r"control tag '<think1>' must be one token.*add it"):
        make_engine(tokenizer=byte_tokenizer()).generate("p", strategy=PLAIN)
    with pytest.raises(ValueError, match="control tag '<think5>' must be one token"):
        engine_with(*TAGS).generate("p", strategy=ab.ParaThinker(paths=5, biased=False))
