"""Mistakes in the planner: absorbing, cutting, limits, tables, views, plans that are advanced."""

from __future__ import annotations

from entry import Mutant

PLAN = "csrc/plan/"
FUZZ = "tests/plan/test_plan_fuzz.py::test_arrays_of_"
TESTS = f"tests/plan/test_plan.py {FUZZ}known_batches {FUZZ}random_batches {FUZZ}random_steps"
VIEWS = "tests/kv/test_views.py"

MUTANTS = [
    Mutant(
        "absorb: every run counts as contained", f"{PLAN}absorb.cpp",
        "contained &= times[t] == runs.visitors.size(t);", "contained &= times[t] > 0;", TESTS,
    ),
    Mutant(
        "absorb: a run that ends somebody's context is absorbed", f"{PLAN}absorb.cpp",
        "    if (runs.is_terminal[r]) continue;\n", "", TESTS,
    ),
    Mutant(
        "absorb: what is read once is paid for as well", f"{PLAN}absorb.cpp",
        "once * (static_cast<i64>(ends.size()) - 1) > partials", "once * static_cast<i64>(ends.size()) > partials",
        "tests/plan/test_plan.py::test_a_run_is_read_again_where_that_costs_no_more_than_its_partials",
    ),
    Mutant(
        "tables: pages are told apart without their column", f"{PLAN}contexts.cpp",
        '|| (*id >= 0 && all[static_cast<size_t>(*id)].column != column))', ')', TESTS,
    ),
    Mutant(
        "tables: a page is seen whole by all once somebody sees it whole", f"{PLAN}contexts.cpp",
        "if (at == list.end() || *at != seen) list.insert(at, seen);",
        "if (at == list.end()) list.assign(1, seen);", TESTS,
    ),
    Mutant(
        "tables: the first query of several stands one too late", f"{PLAN}contexts.cpp",
        'push_back(t.lengths[b] - t.queries[b] + j);',
        'push_back(t.lengths[b] - t.queries[b] + j + (t.queries[b] > 1));', TESTS,
    ),
    Mutant(
        "slack of a tail is one place short", f"{PLAN}ranges.cpp", 'strips.store(slices, tail ? slack : 0, tail)',
        'strips.store(slices, tail && slack ? slack - 1 : 0, tail)', TESTS,
    ),
    Mutant(
        "an absorbed run's tokens are not stored in context order", f"{PLAN}ranges.cpp",
        '      for (i32 i = c.piece_ptr[b]; i < c.piece_ptr[b + 1]; ++i) {\n        const i32 run',
        '      for (i32 i = c.piece_ptr[b + 1] - 1; i >= c.piece_ptr[b]; --i) {\n        const i32 run', TESTS,
    ),
    Mutant(
        "a row sees the token behind it", f"{PLAN}items.cpp", "hidden.tokens[*h].after <= behind) --limit;",
        "hidden.tokens[*h].after < behind) --limit;", TESTS,
    ),
    Mutant(
        "the last but one row's own token is not hidden from those before it", f"{PLAN}items.cpp",
        "after < c.rows(b) - 1; --i", "after < c.rows(b) - 2; --i", TESTS,
    ),
    Mutant(
        "the latest row stands for the earliest", f"{PLAN}items.cpp",
        "item.row_pos_min = std::min(item.row_pos_min,", "item.row_pos_min = std::max(item.row_pos_min,", TESTS,
    ),
    Mutant(
        "the last token's position stands for the highest", f"{PLAN}items.cpp",
        'item.kv_pos_max = item.kv_len == end - begin ? range->max_position',
        'item.kv_pos_max = item.kv_len <= end - begin ? range->max_position', TESTS,
    ),
    Mutant(
        "a query row is taken for the output row of its number", f"{PLAN}items.cpp",
        "if (direct && items.partials_of[row] == 1) continue;", "if (items.partials_of[row] == 1) continue;", VIEWS,
    ),
    Mutant(
        "items are sorted by their number of rows", f"{PLAN}plan.cpp", "wide(a) : items[a].cost > items[b].cost;",
        "wide(a) : items[a].row_count > items[b].row_count;", TESTS,
    ),
    Mutant(
        "a group that fills the narrow tile is wide", f"{PLAN}plan.cpp", "* p.group > p.narrow; };",
        "* p.group >= p.narrow; };",
        "tests/kernels/test_triton_kernels.py::test_planner_parts_wide_and_narrow_items",
    ),
    Mutant(
        "weights of visitors are their numbers", f"{PLAN}runs.cpp",
        "const u64 weight = mix(static_cast<u64>(b) + 1);", "const u64 weight = static_cast<u64>(b) + 1;", TESTS,
    ),
    Mutant(
        "a plan is advanced though the tree has changed", f"{PLAN}live_plan.cpp",
        "step.topology != topology_ || !(params", "!(params", TESTS,
    ),
    Mutant(
        "a plan is advanced though a branch moved on without it", f"{PLAN}live_plan.cpp",
        ' || step.lengths[b] != lengths_[b] + 1) return false;', ') return false;',
        f"{TESTS} tests/kv/test_cache.py",
    ),
    Mutant(
        "a plan is advanced though positions fall", f"{PLAN}live_plan.cpp",
        '    if (position < row_positions[b]) return false;\n', '', TESTS,
    ),
    Mutant(
        "a plan is advanced one step too far", f"{PLAN}live_plan.cpp", 'if (item[kKvLen] >= tails_.capacity[b] ||',
        'if (item[kKvLen] > tails_.capacity[b] ||', TESTS,
    ),
    Mutant(
        "a plan of one way to cut is advanced for another", f"{PLAN}live_plan.cpp", "!(params == params_) || ", "",
        TESTS,
        equivalent="Cache::plan picks the kept plan by its params, so those of the plan it advances are equal already",
    ),
    Mutant(
        "a plan of views is advanced", f"{PLAN}live_plan.cpp", "step.read_ptr.empty() ? step.topology : -1;",
        "step.topology;", VIEWS,
    ),
    Mutant(
        "views: a token that a row reads twice counts twice", f"{PLAN}views.cpp",
        "          if (stamp[piece] == row) continue;\n", "", VIEWS,
    ),
    Mutant(
        "views: a read's begin is no border", f"{PLAN}views.cpp", "    pieces.border(read.branch, read.start);\n",
        "", VIEWS,
    ),
    Mutant(
        "views: a branch that is read but reads nothing is one context", f"{PLAN}views.cpp",
        "single[b] = reads || is_read;", "single[b] = reads;", VIEWS,
    ),
    Mutant(
        "views: one's own tokens are read under the last offset", f"{PLAN}views.cpp",
        "std::vector<i32>& last = group(0);",
        "std::vector<i32>& last = groups.empty() ? group(0) : groups.back().second;", VIEWS,
    ),
    Mutant(
        "fixed pieces: contexts are cut as far as the last one goes", f"{PLAN}fixed_pieces.cpp",
        "longest = std::max(longest, begin[b + 1] - begin[b]);", "longest = begin[b + 1] - begin[b];",
        "tests/runner/test_batch_invariant.py",
    ),
    Mutant(
        "fixed pieces: those of equal length and first slot are the same", f"{PLAN}fixed_pieces.cpp",
        "std::equal(slots, slots + length, other.slots)", "slots[0] == other.slots[0]",
        "tests/runner/test_batch_invariant.py",
        equivalent="the hash of all slots is the same already; two pieces of one hash are not met in 2^64 tries",
    ),
    Mutant(
        "a tail may grow past its fixed piece", f"{PLAN}plan.cpp", "p.fixed ? std::min(end, p.chunk) : end;",
        "end;", f"{TESTS} tests/runner/test_batch_invariant.py",
    ),
    Mutant(
        "the cost of an item forgets its tokens", f"{PLAN}items.cpp",
        "item.cost = static_cast<i64>(item.kv_len) * (8 +", "item.cost = (8 +", TESTS,
    ),
]  # fmt: skip
