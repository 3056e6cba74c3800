"""Training layouts of the field's formats, labels, batches and collators; each against rules written out by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from engine_kit import make_engine, make_model
from hypothesis import given, settings
from hypothesis import strategies as st

import anabranch as ab
from anabranch import hf, training
from anabranch.records.result import Node, Run
from anabranch.training import Block, BranchCollator, GRPOCollator, Inserted, Layout


def contexts(layout: Layout) -> list[tuple[int, ...]]:
    """The token ids that each token sees, itself last, in the order of their positions."""
    found = []
    for seen in layout.mask.dense():
        where = seen.nonzero()[:, 0]
        order = layout.position_ids[where].argsort(stable=True)
        found.append(tuple(layout.input_ids[where[order]].tolist()))
    return found


def learnt_contexts(layout: Layout) -> list[tuple[int, ...]]:
    every = contexts(layout)
    return [every[i] for i in layout.learnt.tolist()]


def prefixes(begin: list[int], rest: list[int]) -> list[tuple[int, ...]]:
    """Contexts of the tokens `rest` written behind `begin`."""
    return [(*begin, *rest[: i + 1]) for i in range(len(rest))]


# ---------------------------------------------------------------------------------------------------- formats


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=5))
def test_a_trie_holds_every_prefix_once(sequences):
    layout = training.trie([[(ids[:1], False, False), (ids[1:], True, True)] for ids in sequences])
    found = contexts(layout)
    assert len(set(found)) == len(found)
    assert set(found) == {tuple(ids[: i + 1]) for ids in sequences for i in range(len(ids))}
    assert layout.position_ids.tolist() == [len(c) - 1 for c in found]  # depth
    assert set(learnt_contexts(layout)) == {c for c in found if len(c) > 1}


P, A, B, X = [1, 2], [10, 11], [20], [30, 31]  # prompt, text before a block, between, after
HEADS, NEXT = [[5, 6], [5, 7], [5, 8]], [[6], [7], [8]]
THREADS = [[40, 41, 42], [50], [60, 61]]
AFTER = [9]


@pytest.mark.parametrize("mode", ["alone", "flat_loss", "sequential"])
def test_threadweaver(mode):
    options = {} if mode == "alone" else {mode: True}
    layout = training.threadweaver(P, [A, Block(THREADS, HEADS, AFTER, NEXT), X], **options)
    flat = [*P, *A, 5, 6, 40, 41, 42, 7, 50, 8, 60, 61, 9, *X]
    branches = [[*P, *A, *h, *t] for h, t in zip(HEADS, THREADS, strict=True)]
    every = contexts(layout)
    assert every[: len(flat)] == prefixes([], flat)  # the whole trajectory, in one piece
    assert set(every) == {c for ids in (flat, *branches) for c in prefixes([], ids)}
    assert layout.position_ids.tolist() == [len(c) - 1 for c in every]
    # Thread 1 is there once, the others twice: alone, and behind their siblings.
    ids = layout.input_ids.tolist()
    assert [ids.count(t[0]) for t in THREADS] == [1, 2, 2]
    want = prefixes([*P], A) + prefixes([*P, *A, *HEADS[0]], THREADS[0]) + prefixes(flat[:-2], X)
    want += [c for h, t in zip(HEADS[1:], THREADS[1:], strict=True) for c in prefixes([*P, *A, *h], t)]
    if mode != "alone":
        want += prefixes(flat[:10], THREADS[1]) + prefixes(flat[:12], THREADS[2])
    if mode == "sequential":
        want = sorted({*want, *prefixes(P, flat[2:])})
    assert sorted(learnt_contexts(layout)) == sorted(want)


def test_multiverse_positions_restart_and_siblings_are_blind():
    """FORMATS: paths start at g + 1; the conclusion at g + m + 1, m the longest path; dense from there."""
    layout = training.multiverse(P, [A, Block(THREADS, HEADS, AFTER), X])
    g = len(P) + len(A) - 1
    sizes = [len(h) + len(t) for h, t in zip(HEADS, THREADS, strict=True)]
    positions = [*range(g + 1), *(g + 1 + i for n in sizes for i in range(n))]
    positions += range(g + max(sizes) + 1, g + max(sizes) + 1 + len(AFTER) + len(X))
    assert layout.position_ids.tolist() == positions
    total, begin = layout.num_tokens, g + 1
    sees = torch.ones(total, total).tril().bool()  # causal, minus both directions between siblings
    bounds = [begin + sum(sizes[:i]) for i in range(4)]
    for i in range(3):
        for j in range(3):
            if i != j:
                sees[bounds[i] : bounds[i + 1], bounds[j] : bounds[j + 1]] = False
    assert torch.equal(layout.mask.dense(), sees)
    inserted = [*P, *(t for h in HEADS for t in h), *AFTER]
    assert sorted(layout.input_ids[~layout.written].tolist()) == sorted(inserted)
    assert layout.labels[layout.written].tolist() == layout.input_ids[layout.written].tolist()
    for same in (training.npr, training.parallel_r1):
        assert same(P, [A, Block(THREADS, HEADS, AFTER), X]).mask == layout.mask


def test_nested_blocks():
    inner = Block([[70, 71], [80]], [[7], [8]], [9])
    layout = training.multiverse([1], [[2], Block([[[3], inner, [4]], [5]]), [6]])
    ids = [1, 2, 3, 7, 70, 71, 8, 80, 9, 4, 5, 6]
    assert layout.input_ids.tolist() == ids
    assert layout.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 6, 7, 2, 8]
    sees = {3: [0, 1, 2, 3], 6: [0, 1, 2, 6], 9: list(range(10)), 10: [0, 1, 10], 11: list(range(12))}
    for row, columns in sees.items():
        assert layout.mask.dense()[row].nonzero()[:, 0].tolist() == columns
    assert layout.threads.tolist() == [0, 0, 1, 2, 2, 2, 3, 3, 1, 1, 4, 0]


def test_parathinker_and_grpo():
    layout = training.parathinker(P, THREADS, X, headers=[[1001], [1002], [1003]], after=[1000])
    assert layout.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 2, 3, 2, 3, 4, 6, 7, 8]
    assert layout.threads.tolist() == [0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 3, 0, 0, 0]
    group = training.grpo(P, THREADS)
    assert contexts(group)[2:] == [c for t in THREADS for c in prefixes(P, t)]
    assert group.mask.previous[group.learnt].tolist() == [1, 2, 3, 1, 1, 6]  # the prompt's last row predicts three
    assert group.position_ids.tolist() == [0, 1, 2, 3, 4, 2, 2, 3]


def test_separate_sequences():
    parent = (P, [A, Inserted(B), X])
    layout = training.separate([parent, ([3], [[4, 5]])])
    assert layout.position_ids.tolist() == [*range(7), 0, 1, 2]
    assert learnt_contexts(layout) == [*prefixes(P, A), *prefixes([*P, *A, *B], X), *prefixes([3], [4, 5])]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Block([]), "threads: empty"),
        (lambda: Block(THREADS, HEADS[:2]), "headers: expected one for each of the 3 threads, got 2"),
        (lambda: training.threadweaver(P, [Block([[[1], Block([[2]])]])]), r"pieces\[0\]: thread 0 holds a Block"),
        (lambda: training.multiverse([], [A]), "prompt: empty"),
        (lambda: training.grpo(P, [A, []]), r"answers\[1\]: empty"),
        (lambda: training.separate([]), "sequences: empty"),
        (lambda: training.trie([]), "sequences: empty"),
    ],
)
def test_formats_say_what_does_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------------------------------------------- labels


def small(**fields) -> Layout:
    mask = ab.BranchMask.from_tree([2, 2, 1], [-1, 0, 0])
    given = {"input_ids": torch.arange(10, 15), "written": torch.tensor([False, False, True, False, True])} | fields
    return Layout(mask=mask, **given)


def test_labels_are_what_the_model_writes():
    assert small().labels.tolist() == [-100, -100, 12, -100, 14]
    assert small(written=torch.ones(5, dtype=torch.bool)).labels.tolist() == [-100, 11, 12, 13, 14]
    assert small(labels=torch.tensor([-100, -100, -100, -100, 14])).learnt.tolist() == [4]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": [-100, -100, 12, 13, 14]}, r"labels: token 3 \(segment 1\) has label 13: the runtime inserts it"),
        ({"labels": [10, -100, -100, -100, -100], "written": [True] * 5}, r"token 0 .*nothing precedes it"),
        ({"labels": [-100, -100, -100, -100, 15]}, r"token 4 \(segment 2\) has label 15: labels are the tokens"),
        ({"labels": [-100] * 4}, r"labels: expected \[5\]"),
        ({"input_ids": [1, 2]}, r"input_ids: expected \[5\]"),
        ({"threads": [1, 2]}, r"threads: expected \[5\]"),
        ({"recorded": [1.0]}, r"recorded: expected \[5\]"),
    ],
)
def test_bad_labels_name_the_segment(fields, message):
    with pytest.raises(ValueError, match=message):
        small(**fields)


# ---------------------------------------------------------------------------------------------------- batches


def test_a_batch_with_copies_gives_the_loss_of_one_without():
    """GRPO's prompt predicts every answer's first token: all logits a row, or those that are needed, or by hand."""
    answers = [[8, 9], [10], [8, 11, 12], [13, 14]]
    model, layout = make_model(), training.grpo([5, 6, 7], answers)
    needed, every = layout.batch(), layout.batch("all")
    assert needed["logits_to_keep"].tolist() == [2, 3, 2, 2, 6, 7, 2, 9]
    assert every["input_ids"].shape == (1, layout.num_tokens + 3) and (every["shift_labels"] != -100).sum() == 8
    assert every["input_ids"][0, -3:].tolist() == [7, 7, 7] and every["position_ids"][0, -3:].tolist() == [2, 2, 2]
    hf.enable(model)
    with torch.no_grad():
        by_hand = -layout.logprobs(model).mean()
        for batch in (needed, every):
            torch.testing.assert_close(model(**batch, use_cache=False).loss, by_hand)
        begin = 0
        for answer in answers:  # and each answer alone
            row = torch.tensor([[5, 6, 7, *answer]])
            alone = model(row, use_cache=False).logits[0, 2:-1].log_softmax(-1)
            alone = alone.gather(-1, row[0, 3:, None])[:, 0]
            got = layout.logprobs(model)[begin : begin + len(answer)]
            torch.testing.assert_close(got, alone, atol=1e-5, rtol=1e-5)
            begin += len(answer)
    with pytest.raises(ValueError, match="logits='some'"):
        layout.batch("some")


@settings(max_examples=30)
@given(st.data())
def test_copies_see_what_their_rows_see(data):
    count = data.draw(st.integers(1, 6))
    context = [sorted(data.draw(st.sets(st.integers(0, i - 1)))) if i else [] for i in range(count)]
    lengths = data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    mask = ab.BranchMask.from_context(lengths, context)
    if not mask.num_tokens:
        return
    rows = data.draw(st.lists(st.integers(0, mask.num_tokens - 1), max_size=4))
    more, total = mask.with_copies(rows), mask.num_tokens
    want = torch.zeros(total + len(rows), total + len(rows), dtype=torch.bool)
    want[:total, :total] = mask.dense()
    for i, row in enumerate(rows):
        want[total + i, :row] = mask.dense()[row, :row]
        want[total + i, total + i] = True
    assert torch.equal(more.dense(), want)
    assert more.positions.tolist() == [*mask.positions.tolist(), *mask.positions[rows].tolist()]
    parts = (more.starts, more.row_ptr, more.cols, more.positions)
    assert ab.BranchMask.from_intervals(*parts) == more  # in the form that the class promises


def test_layouts_pack_move_and_travel_as_plain_data():
    one, two = training.grpo(P, THREADS), training.multiverse(P, [A, Block(THREADS, HEADS, AFTER), X])
    both = Layout.pack([one, two])
    assert torch.equal(both.mask.dense(), torch.block_diag(one.mask.dense().int(), two.mask.dense().int()).bool())
    assert both.labels.tolist() == [*one.labels.tolist(), *two.labels.tolist()]
    # Each token is predicted by the row of its own part that predicted it there; nothing predicts a part's first token.
    behind = [-1 if row < 0 else one.num_tokens + row for row in two.previous.tolist()]
    assert both.previous.tolist() == [*one.previous.tolist(), *behind] and behind[0] == -1
    again = Layout.from_dict(both.as_dict())
    assert again.mask == both.mask
    for name in ("input_ids", "labels", "written", "threads", "previous"):
        assert torch.equal(getattr(again, name), getattr(both, name))
    assert both.to("cpu").mask is both.mask
    with pytest.raises(ValueError, match="cols: missing"):
        Layout.from_dict({k: v for k, v in both.as_dict().items() if k != "cols"})
    with pytest.raises(ValueError, match=r"cols: segment 1 has interval \[0, 3\]"):
        Layout.from_dict(one.as_dict() | {"cols": [[0, 3]] * 3})
    with pytest.raises(ValueError, match="layouts: empty"):
        Layout.pack([])


# ---------------------------------------------------------------------------------------------------- traces


def node(name: str, runs, children=(), forked_at=0, **fields) -> Node:
    runs = tuple(Run(*run) for run in runs)
    ids = tuple(t for run in runs if run.kind != "prompt" for t in run.token_ids)
    role = "fork" if "." in name else "trunk"
    return Node(
        name, role, ids, None, runs[0].position, 0, forked_at, None, "joined", runs, children=children, **fields
    )


def laid_out(tree: Node, **options) -> Layout:
    return training.from_trace(SimpleNamespace(tree=tree), **options)


def test_what_was_cut_off_stands_behind_what_it_followed():
    """Cut twice: [5 6 7] → [5], then [5 8 9] → [5 8]; the pieces are branches, and there is loss on them."""
    cuts = (Run("sampled", (6, 7), 3), Run("sampled", (9,), 4))
    tree = node("0", [("prompt", (1, 2), 0), ("sampled", (5, 8), 2), ("inserted", (3,), 4)], forgotten=cuts)
    layout = laid_out(tree)
    want = [*prefixes([], [1, 2, 5, 8, 3]), (1, 2, 5, 8, 9), (1, 2, 5, 6), (1, 2, 5, 6, 7)]
    assert set(want) == set(contexts(layout))
    learnt = [(1, 2, 5), (1, 2, 5, 8), (1, 2, 5, 8, 9), (1, 2, 5, 6), (1, 2, 5, 6, 7)]
    assert sorted(learnt_contexts(layout)) == sorted(learnt)
    assert laid_out(tree, forgotten=False).input_ids.tolist() == [1, 2, 5, 8, 3]


def test_a_fork_from_what_was_cut_off_is_told():
    kid = node("0.0", [("sampled", (7,), 3)], forked_at=3)
    tree = node("0", [("prompt", (1, 2), 0), ("inserted", (9, 4), 2)], (kid,), forgotten=(Run("sampled", (5,), 2),))
    assert laid_out(tree).num_tokens == 6  # without a log it is taken to have forked later
    log = [SimpleNamespace(do="fork", children=["0.0"], length=None), SimpleNamespace(do="truncate", length=2)]
    object.__setattr__(tree, "log", log)
    with pytest.raises(ValueError, match=r"thread 0\.0 was forked from thread 0 at a context length of 3.*back to 2"):
        laid_out(tree)
    object.__setattr__(tree, "log", log[::-1])
    assert laid_out(tree).num_tokens == 6


def test_a_fork_at_the_very_place_of_a_cut_shares_what_is_still_there():
    kid = node("0.0", [("sampled", (7,), 2)], forked_at=2)
    tree = node("0", [("prompt", (1, 2), 0), ("inserted", (9, 4), 2)], (kid,), forgotten=(Run("sampled", (5,), 2),))
    log = [SimpleNamespace(do="fork", children=["0.0"], length=None), SimpleNamespace(do="truncate", length=2)]
    object.__setattr__(tree, "log", log)
    assert set(contexts(laid_out(tree))) == {*prefixes([], [1, 2, 9, 4]), (1, 2, 5), (1, 2, 7)}


@pytest.mark.parametrize("header", [(4, 5), (6,), ()], ids=["the same header", "another", "none"])
def test_what_a_join_brought_back_is_learnt_again_as_far_as_the_model_wrote_it(header):
    """With flat_loss: neither a header, which may read differently there, nor what was inserted further on."""
    runs = [("inserted", (4, 5), 2), ("sampled", (7,), 4), ("inserted", (9,), 5), ("sampled", (8,), 6)]
    kid, back = node("0.0", runs, forked_at=2), (*header, 7, 9, 8)
    tree = node("0", [("prompt", (1, 2), 0), ("inserted", (3,), 2), ("joined", back, 3, "0.0")], (kid,))
    there, here = [(1, 2, 4, 5, 7), (1, 2, 4, 5, 7, 9, 8)], [(1, 2, 3, *header, 7), (1, 2, 3, *back)]
    assert sorted(learnt_contexts(laid_out(tree))) == sorted(there)
    assert sorted(learnt_contexts(laid_out(tree, flat_loss=True))) == sorted([*there, *here])


def test_a_trace_that_is_not_whole_is_told():
    kid = node("0.0", [("sampled", (7,), 3)], forked_at=9)
    with pytest.raises(ValueError, match=r"thread 0\.0 was forked at a context length of 9.*is the trace whole"):
        laid_out(node("0", [("prompt", (1, 2), 0)], (kid,)))
    with pytest.raises(ValueError, match=r"thread '0\.7' was joined, but is not among"):
        laid_out(node("0", [("prompt", (1, 2), 0), ("joined", (3,), 2, "0.7", True)]))


# ---------------------------------------------------------------------------------------------------- collators


def test_branch_collator_takes_traces_layouts_and_plain_data():
    engine = make_engine()
    result = engine.generate([5, 6, 7], strategy=ab.SelfConsistency(3), max_new_tokens=5)
    layout = training.from_trace(result)
    items = [layout, layout.as_dict(), result, result.trace(), result.trace().as_dict()]
    batch = BranchCollator()(items)
    assert batch["branch_mask"].num_tokens == batch["input_ids"].shape[1] == 5 * (layout.num_tokens + 2)  # two copies
    assert (batch["labels"] != -100).sum() == (batch["shift_labels"] != -100).sum() == 5 * 15
    kept = BranchCollator(discarded=False, logits="needed")([result])
    assert kept["shift_labels"].tolist() == [list(result.token_ids)]
    assert kept["input_ids"].tolist() == [[5, 6, 7, *result.token_ids]]
    with pytest.raises(ValueError, match="features: empty"):
        BranchCollator()([])
    with pytest.raises(TypeError, match=r"features\[1\]: expected a Layout"):
        BranchCollator()([layout, "text"])
    with pytest.raises(ValueError, match=r"features\[0\]: trace.version"):
        BranchCollator()([result.trace().as_dict() | {"version": 99}])


def test_grpo_collator():
    items = [
        {"prompt_ids": [1, 2], "completion_ids": [[3], [4, 5]], "advantages": [1.0, -1.0],
         "old_logprobs": [[-0.1], [-0.2, -0.3]]},
        {"prompt_ids": [6], "completion_ids": [[7, 8]], "advantages": [0.5], "old_logprobs": [[-0.4, -0.5]]},
    ]  # fmt: skip
    batch = GRPOCollator()(items)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert batch["shift_labels"].tolist() == [[3, 4, 5, 7, 8]] and batch["logits_to_keep"].tolist() == [1, 1, 3, 5, 6]
    assert batch["answers"].tolist() == [0, 1, 1, 2, 2]
    assert batch["advantages"].tolist() == [1.0, -1.0, -1.0, 0.5, 0.5]
    torch.testing.assert_close(batch["old_logprobs"], torch.tensor([-0.1, -0.2, -0.3, -0.4, -0.5]))
    for change, message in (
        ({"completion_ids": None}, r"features\[0\]: completion_ids is missing"),
        ({"completion_ids": [[3], []]}, r"features\[0\]: answers\[1\]: empty"),
        ({"advantages": None}, "advantages: given for 1 of 2 items"),
        ({"advantages": [1.0]}, "advantages: expected 2 numbers for item 0, got 1"),
        ({"old_logprobs": [[-0.1], [-0.2]]}, "old_logprobs: expected 2 numbers for item 1, got 1"),
        ({"old_logprobs": [[-0.1]]}, "old_logprobs: expected 3 lists, one an answer, got 2"),
    ):
        changed = {k: v for k, v in (items[0] | change).items() if v is not None}
        with pytest.raises(ValueError, match=message):
            GRPOCollator()([changed, items[1]])
