"""Mistakes in the CUDA kernels, which the emulator runs on the host."""

from __future__ import annotations

from entry import Mutant

CUDA = "csrc/cuda/"
K = "tests/emulator/test_kernels.py::test_"
FAULTS = "tests/emulator/test_faults.py::test_with_all_of_them_no_seed_differs"
BACKEND = "tests/emulator/test_backend.py"

MUTANTS = [
    Mutant(
        "write: where a row goes in 32 bits", f"{CUDA}pages.cuh",
        "static_cast<char*>(to.data) + page * to.page + within * to.slot + head * to.head + column;",
        "static_cast<char*>(to.data) + static_cast<i32>(page * to.page + within * to.slot + head * to.head + "
        "" "column);",
        f"{K}writes_beyond_32_bits",
    ),
    Mutant(
        "write: where a row comes from in 32 bits", f"{CUDA}pages.cuh",
        "static_cast<const char*>(from) + row * from_row + head * from_head + column;",
        "static_cast<const char*>(from) + static_cast<i32>(row * from_row + head * from_head + column);",
        f"{K}writes_beyond_32_bits",
    ),
    Mutant(
        "copy: a destination in 32 bits", f"{CUDA}pages.cuh",
        "reinterpret_cast<V*>(base + target * c.page + within)",
        "reinterpret_cast<V*>(base + static_cast<i32>(target * c.page) + within)", f"{K}copies_beyond_32_bits",
    ),
    Mutant(
        "copy: a source in 32 bits", f"{CUDA}pages.cuh", "(base + source * c.page + within)",
        "(base + static_cast<i32>(source * c.page) + within)", f"{K}copies_beyond_32_bits",
    ),
    Mutant(
        "copy: planes and heads in 32 bits", f"{CUDA}pages.cuh", "c.pool + plane * c.plane + head * c.head;",
        "c.pool + static_cast<i32>(plane * c.plane + head * c.head);", f"{K}copies_beyond_32_bits",
    ),
    Mutant(
        "copy: slots within a page in 32 bits", f"{CUDA}pages.cuh",
        "const i64 within = at / c.vectors * c.slot + at % c.vectors * sizeof(V);",
        "const i64 within = static_cast<i32>(at / c.vectors * c.slot + at % c.vectors * sizeof(V));",
        f"{K}copies_beyond_32_bits",
    ),
    Mutant(
        "write: a row without a slot ends all that its thread has to do", f"{CUDA}pages.cuh",
        "if (slot < 0) continue;", "if (slot < 0) return;", f"{K}rows_without_a_slot_among_many_of_one_thread",
    ),
    Mutant(
        "advance: the latest position of an item is its last", f"{CUDA}pages.cuh",
        "latest > position ? latest : position", "position", f"{BACKEND}::test_plans_advance_on_the_device",
        equivalent="a tail's row stands at the new position: its distance to the latest is at most 0, in any window",
    ),
    Mutant(
        "advance: a row keeps its limit", f"{CUDA}pages.cuh", "    ptx::store(a.limits + row, length + 1);\n", "",
        f"{BACKEND}::test_plans_advance_on_the_device",
    ),
    Mutant(
        "merge: the maximum is taken over the first 32 partials", f"{CUDA}merge.cuh",
        '    for (int p = begin + lane + 32; p < end; p += 32) m = larger(m, stat_of(p).x);\n', '',
        f"{K}merges_of_many_partials",
    ),
    Mutant(
        "merge: the maximum of half a warp", f"{CUDA}merge.cuh", "for (int d = 16; d > 0; d >>= 1)",
        "for (int d = 8; d > 0; d >>= 1)", f"{K}merges_of_many_partials",
    ),
    Mutant(
        "merge: partials in 32 bits", f"{CUDA}merge.cuh",
        '(static_cast<i64>(batch) * a.num_q_heads + q_head) * a.head_dim + column;',
        'static_cast<i32>((static_cast<i64>(batch) * a.num_q_heads + q_head) * a.head_dim + column);',
        f"{K}partials_beyond_32_bits",
    ),
    Mutant(
        "merge: an empty partial is read", f"{CUDA}merge.cuh", '            if (w < 0) continue;\n', '',
        f"{K}merges_of_many_partials",
    ),
    Mutant(
        "merge: the true number of merges is that of partials", f"{CUDA}merge.cuh", "ptx::load(a.counts + 2)",
        "ptx::load(a.counts + 1)", f"{K}a_grid_larger_than_the_work",
    ),
    Mutant(
        "launch: whatever is set last is what a kernel may have of shared memory", f"{CUDA}launch.cuh",
        "if (shared > known.allowed) {", "if (shared != known.allowed) {", f"{K}a_large_ring_after_a_small_one",
    ),
    Mutant(
        "launch: copies are as wide as K allows", f"{CUDA}launch.cu",
        "address(w.k_pages.data), address(w.v_pages.data),", "address(w.k_pages.data),",
        f"{K}write_kv_at_any_address",
    ),
    Mutant(
        "launch: the stride of V's heads is forgotten", f"{CUDA}launch.cu",
        "w.k_pages.head,\n                                   w.v_pages.page, w.v_pages.slot, w.v_pages.head});",
        "w.k_pages.head,\n                                   w.v_pages.page, w.v_pages.slot});",
        f"{K}write_kv_at_any_address",
    ),
    Mutant(
        "attention: places of K and V in 32 bits", f"{CUDA}stream.cuh",
        '+ page * pages.page + within * pages.slot + head * pages.head;',
        '+ static_cast<i32>(page * pages.page + within * pages.slot + head * pages.head);',
        f"{K}offsets_beyond_32_bits",
    ),
    Mutant(
        "attention: a partial in 32 bits", f"{CUDA}results.cuh", '(a.part_acc + part * a.head_dim + column), acc);',
        '(a.part_acc + static_cast<i32>(part * a.head_dim + column)), acc);', f"{K}partials_beyond_32_bits",
    ),
    Mutant(
        "attention: a row of the output in 32 bits", f"{CUDA}results.cuh",
        'store_columns(static_cast<T*>(a.out) + row * a.head_dim + column,',
        'store_columns(static_cast<T*>(a.out) + static_cast<i32>(row * a.head_dim + column),',
        f"{K}rows_beyond_32_bits",
    ),
    Mutant(
        "attention: a query row in 32 bits", f"{CUDA}attention.cuh",
        'from += S::front().ahead.row(a, pass, row) * a.q_row +',
        'from += static_cast<i32>(S::front().ahead.row(a, pass, row) * a.q_row) +', f"{K}rows_beyond_32_bits",
    ),
    Mutant(
        "attention: what is looked up ahead is that of this unit", f"{CUDA}ahead.cuh", "copy_rest(a, round + 1);",
        "copy_rest(a, round);", "tests/emulator/test_between_units.py",
    ),
    Mutant(
        "merge: a partial is read before the attention kernel has ended", f"{CUDA}merge.cuh",
        "  ptx::wait_for_launch_before(Site::launch_before);\n", "", "tests/emulator/test_dependent_launch.py",
    ),
    Mutant(
        "attention: the merge begins when all has ended", f"{CUDA}attention.cuh", "  ptx::allow_next_launch();\n", "",
        "tests/emulator/test_dependent_launch.py::test_the_merge_begins_beside_the_items",
    ),
    Mutant(
        "attention: the next unit's tokens are fetched to the cache whether somebody sees them or not",
        f"{CUDA}stream.cuh", "strip.x < 0 || (a.windowed && seen.z - (strip.y + within) >= a.window)", "strip.x < 0",
        "tests/emulator/test_between_units.py::test_tokens_outside_of_every_window_are_not_fetched_to_the_cache",
    ),
    Mutant(
        "attention: an item more is looked up than there is", f"{CUDA}ahead.cuh",
        "if (word < 4 && unit < all.count)", "if (word < 4)", "tests/emulator/test_between_units.py",
    ),
    Mutant(
        "attention: rows beyond those looked up are read from behind them", f"{CUDA}ahead.cuh",
        "return i < ROWS ? ptx::load(rows[pass.round() & 1] + i) : ptx::load(a.rows + pass.kv.z + i);",
        "return ptx::load(rows[pass.round() & 1] + i);",
        "tests/emulator/test_between_units.py::test_items_of_more_rows_than_were_looked_up",
    ),
    Mutant(
        "attention: tokens that nobody sees are read", f"{CUDA}stream.cuh",
        'number(block) < end && !(a.windowed && row_pos_min - which.y >= a.window);', 'number(block) < end;',
        f"{K}slots_that_slid_out_of_every_window_are_not_looked_up",
    ),
    Mutant(
        "attention: a row whose limit is one short of a block's end sees the last token", f"{CUDA}attention.cuh",
        'else if (begin + S::kBlock > sight.least)', 'else if (begin + S::kBlock > sight.least + 1)',
        f"{K}shapes {K}rings",
    ),
    Mutant(
        "attention: the least limit of half the rows", f"{CUDA}attention.cuh",
        'for (int d = 4; d < 32; d <<= 1) sight.least', 'for (int d = 4; d < 16; d <<= 1) sight.least',
        f"{K}shapes {K}rings",
    ),
    Mutant(
        "attention: what was summed is scaled where the first row's maximum moves", f"{CUDA}tile.cuh",
        'if (ptx::any(alpha[0] != 1 || alpha[1] != 1)) {', 'if (ptx::any(alpha[0] != 1)) {', f"{K}shapes {K}rings",
    ),
    Mutant(
        "attention: the second row of a lane is guarded by the first's weight", f"{CUDA}tile.cuh",
        'if (!GUARDED || p1 != 0) {', 'if (!GUARDED || p0 != 0) {', f"{K}hidden_values {K}seen_infinities",
    ),
    Mutant(
        "attention: infinities in every fourth word of V are overlooked", f"{CUDA}tile.cuh",
        'zeros = ptx::plus_zero_times(T{}, zeros, static_cast<u32>(x.w));', '',
        f"{K}infinities_in_one_column_of_values",
    ),
    Mutant(
        "attention: a sink of −inf counts", f"{CUDA}results.cuh", 'if (sink != minus_infinity()) {',
        'if (sink == sink) {', f"{K}sinks_of_minus_infinity_are_no_sinks {K}all_rows_empty",
    ),
    Mutant(
        "attention: one group of copies too few is waited for", f"{CUDA}stream.cuh",
        '(a.ring - 2, Site::tile_landed);', '(a.ring - 1, Site::tile_landed);', FAULTS,
    ),
    Mutant(
        "attention: queries are not waited for", f"{CUDA}attention.cuh",
        "(a.ring - 1, Site::queries_landed);", "(a.ring, Site::queries_landed);", FAULTS,
    ),
    Mutant(
        "attention: addresses of one block too few are prepared", f"{CUDA}stream.cuh",
        'const int prepared = (a.ring + 1) / 2;', 'const int prepared = a.ring / 2;', f"{K}rings {FAULTS}",
    ),
]  # fmt: skip
