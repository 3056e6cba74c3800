"""Mistakes in the Triton kernels, which the interpreter runs on the host."""

from __future__ import annotations

from entry import Mutant

K = "tests/kernels/test_triton_kernels.py::test_"
BRANCH = "tests/kernels/test_branch_triton.py::test_"
FORMATS = "tests/kernels/test_kv_formats_triton.py::test_"

MUTANTS = [
    Mutant(
        "write: a page's place in 32 bits", "kernels/pages.py", "page = (slot // PAGE_SIZE).to(tl.int64)",
        "page = slot // PAGE_SIZE", f"{K}writes_beyond_32_bits",
    ),
    Mutant(
        "write: a slot's place in 32 bits", "kernels/pages.py", "offset = (slot % PAGE_SIZE).to(tl.int64)",
        "offset = slot % PAGE_SIZE", f"{K}writes_beyond_32_bits",
    ),
    Mutant(
        "write: a head's place in 32 bits", "kernels/pages.py", "    h = h.to(tl.int64)\n", "",
        f"{K}writes_beyond_32_bits",
    ),
    Mutant(
        "copy: a destination in 32 bits", "kernels/pages.py",
        "dst = tl.load(copies_ptr + num_copies + copy).to(tl.int64)",
        "dst = tl.load(copies_ptr + num_copies + copy)", f"{K}copies_beyond_32_bits",
    ),
    Mutant(
        "copy: a source in 32 bits", "kernels/pages.py", "src = tl.load(copies_ptr + copy).to(tl.int64)",
        "src = tl.load(copies_ptr + copy)", f"{K}copies_beyond_32_bits",
    ),
    Mutant(
        "copy: a plane in 32 bits", "kernels/pages.py", "num_kv_heads % num_planes).to(tl.int64)",
        "num_kv_heads % num_planes)", f"{K}copies_beyond_32_bits",
    ),
    Mutant(
        "copy: slots in 32 bits", "kernels/pages.py", "at = base + t.to(tl.int64) * stride_slot",
        "at = base + t * stride_slot", f"{K}copies_beyond_32_bits",
    ),
    Mutant(
        "copy: factors go from the destination", "kernels/pages.py", "tl.load(scales + src * stride_scale_page + t",
        "tl.load(scales + dst * stride_scale_page + t", f"{FORMATS}pages_and_factors_are_copied_together",
    ),
    Mutant(
        "merge: partials in 32 bits", "kernels/merge.py", "part = p.to(tl.int64) * num_q_heads + q_head",
        "part = p * num_q_heads + q_head", f"{K}partials_beyond_32_bits",
    ),
    Mutant(
        "merge: an empty partial is read", "kernels/merge.py", "mask=has[:, None] & in_d[None, :]",
        "mask=(p < end)[:, None] & in_d[None, :]", f"{K}merge {K}merges_of_many_partials",
    ),
    Mutant(
        "merge: a block of empty partials first", "kernels/merge.py",
        'm_ref = tl.where(m_new == float("-inf"), 0.0, m_new)', "m_ref = m_new",
        f"{K}merge {K}merges_of_many_partials",
    ),
    Mutant(
        "merge: the past is not scaled", "kernels/merge.py",
        "acc = acc * alpha + tl.sum(weight[:, None] * part_acc, axis=0)",
        "acc = acc + tl.sum(weight[:, None] * part_acc, axis=0)", f"{K}merge {K}merges_of_many_partials",
    ),
    Mutant(
        "attention: a row sees the token behind it", "kernels/attention.py",
        "visible = n[None, :] < limit[:, None]", "visible = n[None, :] <= limit[:, None]", f"{K}attention_options",
    ),
    Mutant(
        "attention: a window is one token wider", "kernels/attention.py",
        "row_pos[:, None] - kv_pos[None, :] < window", "row_pos[:, None] - kv_pos[None, :] <= window",
        f"{K}attention_options",
    ),
    Mutant(
        "attention: the earliest row's window is one token narrower", "kernels/attention.py",
        "seen = (n < end) & (row_pos_min - pos < window)", "seen = (n < end) & (row_pos_min - pos < window - 1)",
        f"{K}attention_options",
    ),
    Mutant(
        "attention: blocks begin with the first visible token", "kernels/attention.py",
        "begin = first // BLOCK_N * BLOCK_N", "begin = first", f"{K}same_bits_every_time_and_whoever_else_is_there",
    ),
    Mutant(
        "attention: slots that nobody sees are read", "kernels/attention.py",
        "keep = (n >= first) & (n < end)\n        next_n", "keep = n < end\n        next_n",
        f"{K}window_never_reads_what_nobody_sees",
        equivalent="such tokens get weight 0, by the guarded sum; their slots are memory still",
    ),
    Mutant(
        "attention: NaN that a window hides reaches the rows", "kernels/attention.py",
        "poisoned = poisoned & ((masked != 0) | HAS_WINDOW)", "poisoned = poisoned & (masked != 0)",
        f"{K}hidden_values",
    ),
    Mutant(
        "attention: NaN in the second part of the columns is not looked for", "kernels/attention.py",
        "            poisoned = poisoned | any_nan(acc1, live)\n", "            pass\n",
        f"{K}hidden_values_in_one_part_of_the_columns_of_v",
    ),
    Mutant(
        "attention: an item that just fills the small tile takes the large one", "kernels/attention.py",
        "    if packed <= NARROW:\n", "    if packed < NARROW:\n",
        f"{K}same_bits_every_time_and_whoever_else_is_there",
    ),
    Mutant(
        "attention: a partial in 32 bits", "kernels/attention.py",
        "part = dest.to(tl.int64) * num_q_heads + q_head", "part = dest * num_q_heads + q_head",
        f"{K}partials_beyond_32_bits",
    ),
    Mutant(
        "attention: a row in 32 bits", "kernels/attention.py", "mask=live, other=0).to(tl.int64)\n    # Without",
        "mask=live, other=0)\n    # Without", f"{K}rows_beyond_32_bits",
    ),
    Mutant(
        "attention: places of K and V in 32 bits", "kernels/attention.py",
        "page = (slot // PAGE_SIZE).to(tl.int64)", "page = slot // PAGE_SIZE", f"{K}offsets_beyond_32_bits",
    ),
    Mutant(
        "attention: V of the second part of the columns is scaled like K", "kernels/attention.py",
        "v1 = (dequantised(v1, STORED) * v_scale[:, None]).to(q0.dtype)",
        "v1 = (dequantised(v1, STORED) * k_scale[:, None]).to(q0.dtype)",
        f"{FORMATS}head_dims_page_sizes_and_layouts",
    ),
    Mutant(
        "guard: sixteen infinities of one sign count as one of the other", "kernels/primitives.py",
        "DOWN = tl.constexpr(64)", "DOWN = tl.constexpr(16)",
        f"{K}infinities_of_one_sign_in_every_token_of_a_step {BRANCH}seen_infinities",
    ),
    Mutant(
        "guard: NaN is +inf", "kernels/primitives.py", 'down = (wide == float("-inf")) | nan',
        'down = wide == float("-inf")', f"{K}seen_infinities {BRANCH}seen_infinities",
    ),
    Mutant(
        "quantise: ties do not go to even", "kernels/quantise.py",
        "((positive + 0x7FFFF + ((positive >> 20) & 1)) >> 20)", "((positive + 0x80000) >> 20)",
        f"{FORMATS}what_is_written_is_what_torch_writes",
    ),
    Mutant(
        "quantise: V's factors lie as K's do", "kernels/quantise.py",
        "v_scales_ptr + page * stride_vs_page + offset * stride_vs_slot",
        "v_scales_ptr + page * stride_ks_page + offset * stride_ks_slot",
        f"{FORMATS}what_is_written_is_what_torch_writes",
    ),
    Mutant(
        "branch: a window's first position is left out", "kernels/branch.py",
        "low = tl.min(tl.where(live, row_pos, 2147483647), axis=0) - window",
        "low = tl.min(tl.where(live, row_pos, 2147483647), axis=0) - window + 1", f"{BRANCH}options",
    ),
    Mutant(
        "branch: lanes of the second word see what those of the first do", "kernels/branch.py",
        "word = tl.load(at + 4 + lane // 32)", "word = tl.load(at + 4)",
        f"{BRANCH}options {BRANCH}several_tiles {BRANCH}a_tile_of_many_segments",
    ),
    Mutant(
        "branch: a poisoned tile is computed once more up to its first lanes", "kernels/branch.py",
        "for lane_begin in tl.range(0, tl.load(tile_ptr + 1) - tl.load(tile_ptr), GUARD, num_stages=1):",
        "for lane_begin in tl.range(0, GUARD, GUARD, num_stages=1):", f"{BRANCH}hidden_values",
    ),
    Mutant(
        "branch: dQ of rows that see nothing but hidden NaN", "kernels/branch_backward.py",
        "        poisoned = poisoned | any_nan(dq1, live)\n", "        pass\n",
        f"{BRANCH}hidden_values_that_only_the_second_part_of_the_columns_shows",
    ),
    Mutant(
        "branch: NaN in the second part of the columns is not looked for", "kernels/branch.py",
        "        poisoned = poisoned | any_nan(acc1, live)\n", "        pass\n",
        f"{BRANCH}hidden_values_that_only_the_second_part_of_the_columns_shows",
    ),
    Mutant(
        "branch: NaN in the second part of dK is not looked for", "kernels/branch_backward.py",
        "        poisoned = poisoned | any_nan(dk1, live)\n", "        pass\n",
        f"{BRANCH}hidden_values_that_only_the_second_part_of_the_columns_shows",
    ),
    Mutant(
        "branch: NaN in the second part of dV is not looked for", "kernels/branch_backward.py",
        "        poisoned = poisoned | any_nan(dv1, live)\n", "        pass\n",
        f"{BRANCH}hidden_values_that_only_the_second_part_of_the_columns_shows",
    ),
    Mutant(
        "launch: the grid is the plan's tile, however few rows there are", "kernels/launch.py",
        "tiles = triton.cdiv(min(arrays.tile_rows, queries) * group, config.wide)",
        "tiles = max(1, min(arrays.tile_rows, queries) * group // config.wide)",
        f"{K}attention_shapes {K}hidden_values",
    ),
]  # fmt: skip
