"""Mistakes in the CPU kernels: attention of few and of many rows, writes, copies, scores, branch masks."""

from __future__ import annotations

from entry import Mutant

CPU = "csrc/cpu/"
TESTS = "tests/kernels/test_cpu_kernels.py"
OPTIONS = f"{TESTS}::test_options {TESTS}::test_long_runs_of_whole_pages"
HIDDEN = f"{TESTS}::test_what_a_row_does_not_see_cannot_reach_it {TESTS}::test_nan_in_visible_keys_is_not_hidden"
FUZZ = "tests/plan/test_plan_fuzz.py::test_known_batches tests/plan/test_plan_fuzz.py::test_random_batches"
FAR = "tests/kernels/test_cpu_offsets.py"
PARTIALS = "tests/kernels/test_cpu_extremes.py::test_partials_beyond_32_bits"
SCORES = "tests/runner/test_scores.py"
BRANCH = "tests/attention/test_branch_attention.py"
ALONE = f"{BRANCH}::test_bad_tokens_leave_those_that_do_not_see_them_alone"

MUTANTS = [
    Mutant(
        "unit: the earliest row stands for the latest", f"{CPU}unit.hpp", "if (p > row_pos_max) row_pos_max = p;",
        "row_pos_max = smaller(row_pos_max, p);", f"{OPTIONS} {FUZZ}",
    ),
    Mutant(
        "unit: a tile that ends at the least limit counts as cut, one behind it does not", f"{CPU}unit.hpp",
        "limited = u.masked && first + count > u.least;", "limited = u.masked && first + count > u.least + 1;",
        f"{OPTIONS} {FUZZ}",
    ),
    Mutant(
        "unit: a tile is hidden by its first position, not its highest", f"{CPU}unit.hpp", "if (p > hi) hi = p;",
        "(void)hi;", f"{OPTIONS} {FUZZ}",
    ),
    Mutant(
        "unit: a window that a tile just touches is taken for one that it does not", f"{CPU}unit.hpp",
        "windowed = int64_t(u.row_pos_max) - lo >= a.window;", "windowed = int64_t(u.row_pos_max) - lo > a.window;",
        f"{OPTIONS} {FUZZ}",
    ),
    Mutant(
        "unit: page offsets in 32 bits", f"{CPU}unit.hpp",
        "+ p.page * pool.page + p.offset * pool.slot + head * pool.head;",
        "+ int32_t(p.page * pool.page + p.offset * pool.slot + head * pool.head);", FAR,
    ),
    Mutant(
        "unit: a sink of −inf counts", f"{CPU}unit.hpp", "if (a.sinks && a.sinks[h] != -INF) {", "if (a.sinks) {",
        f"{OPTIONS} {TESTS}::test_hostile_scores",
    ),
    Mutant(
        "unit: where a partial lies in 32 bits", f"{CPU}unit.hpp", "memcpy(a.part_acc + p * a.v_dim, acc,",
        "memcpy(a.part_acc + int32_t(p * a.v_dim), acc,", PARTIALS,
    ),
    Mutant(
        "stream: surplus scores become −softcap", f"{CPU}stream.hpp",
        "  for (int j = tile.n; j < end; ++j) s[j] = -INF;  // the cap made −softcap of them\n", "",
        f"{OPTIONS} {FUZZ}",
    ),
    Mutant(
        "stream: a row's limit is the row before's in a group", f"{CPU}stream.hpp",
        "if (tile.begin + j >= u.limits[r]) s[j] = -INF;",
        "if (tile.begin + j >= u.limits[r > 0 ? r - 1 : 0]) s[j] = -INF;", FUZZ,
    ),
    Mutant(
        "stream: NaN of V reaches rows that do not see it", f"{CPU}stream.hpp",
        "if (tile.cut() && !all_finite(v, tile.n, dv)) {", "if (tile.limited && !all_finite(v, tile.n, dv)) {",
        HIDDEN,
    ),
    Mutant(
        "stream: a hidden tile's rows are those that are read next", f"{CPU}stream.hpp",
        "    locate(begin + STREAM_TILE, STREAM_TILE - half);\n    if (tile.hidden) continue;\n",
        "    if (tile.hidden) continue;\n    locate(begin + STREAM_TILE, STREAM_TILE - half);\n",
        f"{OPTIONS} {FUZZ}",
    ),
    Mutant(
        "stream: a factor of NaN reaches rows that do not see its token", f"{CPU}stream.hpp",
        "store(p + j, x == 0 ? x : x * load(factors + j));", "store(p + j, x * load(factors + j));",
        "tests/kernels/test_kv_formats.py::test_cpu_a_nan_reaches_the_rows_that_see_it_and_no_others",
    ),
    Mutant(
        "stream: heads of an item use the first one's factors", f"{CPU}stream.hpp",
        "v_scale[j] = scale_at<S>(a.v, a, u.head, slots[j]);", "v_scale[j] = scale_at<S>(a.v, a, 0, slots[j]);",
        "tests/kernels/test_kv_formats.py",
    ),
    Mutant(
        "packed: a panel is cut at its first row's limit", f"{CPU}packed.hpp",
        "for (int i = from; i < to; ++i) most = w.limit[row + i] > most ? w.limit[row + i] : most;",
        "most = w.limit[row];", f"{OPTIONS} {FUZZ}",
    ),
    Mutant(
        "packed: an empty past counts once something is seen", f"{CPU}packed.hpp",
        "base[i] = top[i] == -INF ? (vf){} : top[i];", "base[i] = top[i];", f"{OPTIONS} {FUZZ} {HIDDEN}",
    ),
    Mutant(
        "packed: the odd last token of a tile is left out of pairs", f"{CPU}packed.hpp",
        "j + 1 < tile.n ? value(j + 1) : nullptr", "j + 2 < tile.n ? value(j + 1) : nullptr", f"{OPTIONS} {FUZZ}",
    ),
    Mutant(
        "packed: NaN of the second of a pair is not looked for", f"{CPU}packed.hpp",
        "bad += low(load(panel + i)) * 0.0f + high(load(panel + i)) * 0.0f;", "bad += low(load(panel + i)) * 0.0f;",
        HIDDEN,
    ),
    Mutant(
        "merge: the maximum is taken over the first 32 partials", f"{CPU}kernels.cpp",
        "++p) m = larger(m, a.part_m[int64_t(p) * heads + h]);",
        "++p) if (p < a.merge_ptr[i] + 32) m = larger(m, a.part_m[int64_t(p) * heads + h]);",
        "tests/kernels/test_cpu_extremes.py::test_late_maxima",
    ),
    Mutant(
        "merge: an empty partial is read", f"{CPU}kernels.cpp",
        "      if (a.part_m[at] == -INF) continue;  // an empty partial\n", "", f"{TESTS} {FUZZ}",
    ),
    Mutant(
        "merge: where partials lie in 32 bits", f"{CPU}kernels.cpp", "const float* from = a.part_acc + at * d;",
        "const float* from = a.part_acc + int32_t(at * d);", PARTIALS,
    ),
    Mutant(
        "write: places in 32 bits", f"{CPU}attention.cpp", "(page * w->dst.page + offset * w->dst.slot) * size;",
        "int32_t(page * w->dst.page + offset * w->dst.slot) * size;", FAR,
    ),
    Mutant(
        "copy: destinations in 32 bits", f"{CPU}attention.cpp",
        "std::memcpy(base + c.dst[i] * c.page + h * c.head, base",
        "std::memcpy(base + int32_t(c.dst[i] * c.page) + h * c.head, base", FAR,
    ),
    Mutant(
        "copy: factors of the filled slots but one", f"{CPU}attention.cpp", "size_t(c.filled[i]) * sizeof(float));",
        "size_t(c.filled[i] - 1) * sizeof(float));",
        "tests/kernels/test_kv_formats.py::test_pages_and_factors_are_copied_together",
    ),
    Mutant(
        "quantise: what is not finite is the largest", f"{CPU}quantise.hpp",
        'finite ? most / LARGEST<S> : __builtin_nanf("");', "most / LARGEST<S>;",
        "tests/kernels/test_kv_formats.py::test_cpu_writes_the_bits_that_torch_writes",
    ),
    Mutant(
        "scores: equal scores at the k-th place are taken for decided", f"{CPU}scores.cpp",
        "if (cut && n.tokens.back().score == least) return -1;", "(void)cut;", SCORES,
    ),
    Mutant(
        "scores: a nucleus may end without a token", f"{CPU}scores.cpp",
        "n.kept < size && (n.kept == 0 || mass < top_p * all); ++n.kept",
        "n.kept < size && mass < top_p * all; ++n.kept", SCORES,
    ),
    Mutant(
        "scores: the last block of a row is read as a whole one", f"{CPU}scores.cpp",
        "const int64_t begin = (block - peaks.begin()) * SCORE_BLOCK, end = std::min(begin + SCORE_BLOCK, s.size);",
        "const int64_t begin = (block - peaks.begin()) * SCORE_BLOCK, end = begin + SCORE_BLOCK;", SCORES,
    ),
    Mutant(
        "scores: of equal bests the last is taken", f"{CPU}scores.cpp",
        "std::find(peaks.begin(), peaks.end(), best[r]);",
        "std::find(peaks.rbegin(), peaks.rend(), best[r]).base() - 1;", SCORES,
    ),
    Mutant(
        "branch: a row does not see itself", f"{CPU}branch.hpp",
        "x = splat(column) <= load(w.row + lane + i * W) ? x : splat(-INF);",
        "x = splat(column) < load(w.row + lane + i * W) ? x : splat(-INF);", f"{BRANCH}::test_cpu",
    ),
    Mutant(
        "branch: a block that the window leaves whole to the latest row alone is skipped", f"{CPU}branch.hpp",
        "if (least_ - p >= a_.window) continue;", "if (most_ - p >= a_.window) continue;", f"{BRANCH}::test_cpu",
    ),
    Mutant(
        "branch: the first panel of lanes has no causal mask", f"{CPU}branch.hpp",
        "limited = w_.column[n - 1] > r_.begin;", "limited = w_.column[n - 1] > r_.begin + r_.tokens - 1;",
        f"{BRANCH}::test_cpu {BRANCH}::test_cpu_shapes {ALONE}",
    ),
    Mutant(
        "branch: NaN reaches rows that a bit hides it from", f"{CPU}branch.hpp",
        "const bool cut = c.limited || c.parted || c.windowed, exact = cut &&",
        "const bool cut = c.limited || c.windowed, exact = cut &&",
        f"{BRANCH}::test_a_bad_branch_leaves_the_others_alone {ALONE}",
    ),
    Mutant(
        "a team of OpenMP's that is larger than the region works as a whole", f"{CPU}parallel.cpp",
        "if (thread >= threads_) return;", "", "tests/kernels/test_openmp_threads.py",
    ),
    Mutant(
        "OpenMP's threads are taken while they sleep", f"{CPU}openmp.cpp",
        "least * 100 > (now - since_) * HELD", "least >= 0", "tests/kernels/test_openmp_threads.py",
    ),
]  # fmt: skip
