"""A row's scores depend on its own sequence alone: every family, beside strangers far away and beyond its window."""

from __future__ import annotations

import pytest
import torch
from hf_kit import EVERY_FAMILY, VOCAB, assert_close, build_type
from torch import nn

import anabranch as ab
from anabranch import hf

N = 20  # tokens of each sequence: three windows and more
# Families whose random weights magnify rounding (the eager Granite itself is 2e-5 from float64), and how far a row may
# be off: it was 9.5e-5 on one processor. A row that depended on a stranger would be off by some percent.
MAGNIFIED = {"granite": 2e-4, "granitemoe_swa": 2e-4}


@pytest.fixture(scope="module", params=EVERY_FAMILY)
def pair(request) -> tuple[nn.Module, nn.Module]:
    """(with anabranch, its eager twin)"""
    try:
        model, eager = (build_type(request.param, attn) for attn in ("anabranch", "eager"))
    except LookupError as error:
        pytest.skip(str(error))
    eager.load_state_dict(model.state_dict())
    return model, eager


@pytest.fixture(scope="module")
def sequences(pair) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(ids, positions, logits of the eager model's own forward) of a sequence that begins at 0 and one far behind."""
    _, eager = pair
    generator, longest = torch.Generator().manual_seed(5), getattr(eager.config, "max_position_embeddings", None) or 256
    found = []
    for first in (0, longest - N - 1):
        ids, positions = torch.randint(3, VOCAB, (N,), generator=generator), torch.arange(first, first + N)
        with torch.no_grad():
            logits = eager(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits[0]
        found.append((ids, positions, logits))
    return found


@pytest.mark.parametrize("masked", [False, True], ids=["no-mask", "tree-mask"])
@torch.no_grad()
def test_over_a_tree(pair, sequences, masked):
    model, _ = pair
    cache = ab.TreeCache.for_model(model, num_pages=16, page_size=4)
    branches, got = [cache.branch() for _ in sequences], [[] for _ in sequences]
    # Chunks of one beside rows of the other, in front of it and behind, and single rows.
    for first, rows in ((0, (7, 9)), (1, (3, 1)), (0, (1, 2)), (1, (9, 8))):
        order, done = (first, 1 - first), [b.length for b in branches]
        step = cache.step(
            {branches[i]: rows[i] for i in order},
            positions={branches[i]: sequences[i][1][done[i] : done[i] + rows[i]] for i in order},
        )
        ids = torch.cat([sequences[i][0][done[i] : done[i] + rows[i]] for i in order])
        mask = {"attention_mask": hf.tree_mask(step)} if masked else {}
        logits = model(
            input_ids=ids[None], position_ids=step.position_ids[None], tree_step=step, use_cache=False, **mask
        ).logits[0]  # fmt: skip
        for i in order:
            got[i].append(logits[step.rows[branches[i]]])
    for parts, (_, _, want) in zip(got, sequences, strict=True):
        assert_close(torch.cat(parts), want, MAGNIFIED.get(model.config.model_type, 2e-5))


@pytest.mark.parametrize("guarded", [False, True], ids=["no-mask", "branch-guard"])
@torch.no_grad()
def test_under_a_branch_mask(pair, sequences, guarded):
    model, _ = pair
    hf.describe(model)
    mask = ab.BranchMask.from_tree([N, N], [-1, -1], torch.cat([positions for _, positions, _ in sequences]))
    ids = torch.cat([ids for ids, _, _ in sequences])
    given = {"attention_mask": hf.beside_branch_mask(2 * N, ids.device)} if guarded else {}
    got = model(
        input_ids=ids[None], position_ids=mask.positions[None], branch_mask=mask, use_cache=False, **given
    ).logits[0]  # fmt: skip
    assert_close(got, torch.cat([want for _, _, want in sequences]))


@pytest.mark.parametrize("model_type", ["phimoe", "qwen2_moe"])
@torch.no_grad()
def test_a_window_that_only_the_mask_knows_must_be_known_where_another_stands_in(model_type):
    """Their attention is not told of the window; a hand-made cache asks nobody who was."""
    model = build_type(model_type, "anabranch")
    cache = ab.TreeCache(num_layers=3, num_kv_heads=2, head_dim=32, num_pages=16)
    branch, ids = cache.branch(), torch.arange(3, 3 + N)[None]

    def run(**given) -> torch.Tensor:
        step = cache.step({branch: N})
        given = {name: value(step) for name, value in given.items()}
        try:
            return model(ids, position_ids=step.position_ids[None], tree_step=step, use_cache=False, **given).logits[0]
        finally:
            cache.truncate(branch, 0)

    want = model(ids, use_cache=False).logits[0]
    assert_close(run(), want)  # the model's own mask says it
    with pytest.raises(hf.UnsupportedModel, match=r"leaves its sliding window to the mask.*hf\.describe\(model\)"):
        run(attention_mask=hf.tree_mask)
    assert any(hf.describe(model).windows)
    assert_close(run(attention_mask=hf.tree_mask), want)


@pytest.mark.compiled
@pytest.mark.parametrize("model_type", ["phimoe", "qwen2_moe"])
@torch.no_grad()
def test_a_window_that_only_the_mask_knows_is_kept_under_compile(model_type):
    """There the model's own mask is built at once, and no longer says what its window is."""
    model = build_type(model_type, "anabranch")
    cache = ab.TreeCache.for_model(model, num_pages=16)
    ids, mask, step = torch.arange(3, 3 + N)[None], ab.BranchMask.from_tree([N], [-1]), cache.step({cache.branch(): N})
    want = model(ids, use_cache=False).logits[0]
    compiled = torch.compile(model, backend="eager")
    assert_close(compiled(ids, position_ids=mask.positions[None], branch_mask=mask, use_cache=False).logits[0], want)
    assert_close(compiled(ids, position_ids=step.position_ids[None], tree_step=step, use_cache=False).logits[0], want)
