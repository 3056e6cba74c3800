"""Mistakes in the tree of spans: pages, reference counts, cuts, splices."""

from __future__ import annotations

from entry import Mutant

TREE = "csrc/tree/tree.cpp"
CACHE = "tests/kv/test_cache.py"
PREFIX = "tests/engine/test_prefix_cache.py"

MUTANTS = [
    Mutant(
        "a page freed within a step is reusable at once", TREE,
        "(in_step_ ? freed_in_step_ : free_pages_).push_back(page);", "free_pages_.push_back(page);", CACHE,
    ),
    Mutant(
        "a page that another's span lies in is written in place", TREE, "return ours == page_refs_[page] ?",
        "return ours <= page_refs_[page] ?", CACHE,
    ),
    Mutant(
        "a full page that is shared is gone on from in place", TREE,
        "return own ? Tail::kInPlace : Tail::kNewSpan;", "return Tail::kInPlace;", CACHE,
    ),
    Mutant(
        "of several that copy a tail in a step, one has left it", TREE, "if (span == id) users -= count;",
        "if (span == id) users -= 1;", CACHE,
    ),
    Mutant(
        "a span of several users within the page is taken for one's own", TREE,
        "if (before.pages.back() != page || before.users.size() != 1) break;",
        "if (before.pages.back() != page) break;", CACHE,
    ),
    Mutant(
        "pages for a copied tail are not counted", TREE, "    if (tails[i] == Tail::kCopyPage) {\n      ++need;\n",
        "    if (tails[i] == Tail::kCopyPage) {\n", CACHE,
    ),
    Mutant(
        "pages that are needed are rounded down", TREE, "(counts[i] - room + page_size_ - 1) / page_size_",
        "(counts[i] - room) / page_size_", CACHE,
    ),
    Mutant(
        "the last position of a step is looked at, not the highest", TREE,
        "*std::max_element(positions[i].begin(), positions[i].end());", "positions[i].back();",
        "tests/kv/test_cache.py::test_steps_that_make_no_sense",
    ),
    Mutant(
        "the highest position is one too high", TREE, "if (last >= kMaxPosition)", "if (last > kMaxPosition)",
        "tests/kv/test_cache.py::test_steps_that_make_no_sense",
    ),
    Mutant(
        "a copied page's last slot is left behind", TREE, "slots.back() % page_size_ + 1;",
        "slots.back() % page_size_;", CACHE,
    ),
    Mutant(
        "a fork of a fork keeps its parent's fork length", TREE, "    kid.fork_length = kid.length;\n", "", CACHE,
    ),
    Mutant(
        "a cut below the fork keeps the fork length", TREE, "  b.fork_length = std::min(b.fork_length, length);\n",
        "", CACHE,
    ),
    Mutant(
        "after a join the position is the last child's, not the highest", TREE,
        "t.position = std::max(t.position, k.position);", "t.position = k.position;", CACHE,
    ),
    Mutant(
        "what is shared with a sibling counts as one's own", TREE, "  b.fork_length = b.length;\n", "", CACHE,
    ),
    Mutant(
        "after a share the position is the last token's, not the highest", TREE,
        "std::max<i64>(b.position, *std::max_element(span.positions.begin(), span.positions.end()) + 1);",
        "span.positions.back() + 1;", CACHE,
    ),
    Mutant(
        "a split page's live holders are not counted", TREE, "    if (head.live > 0) ++page_live_[last_page];\n",
        "", CACHE,
    ),
    Mutant(
        "a page that both halves of a split hold has one holder", TREE, "    ++page_refs_[last_page];\n", "", CACHE,
    ),
    Mutant(
        "a kept branch that is cut takes logical tokens away", TREE, "    if (!b.kept) tokens_logical_ -= n;\n",
        "    tokens_logical_ -= n;\n", PREFIX,
    ),
    Mutant(
        "a kept page is counted once a token", TREE, "if (page != last && page_live_[page] == 0) ++found;",
        "if (page_live_[page] == 0) ++found;",
        f"{CACHE}::test_kept_pages_are_those_that_a_fork_takes",
    ),
    Mutant(
        "kept pages do not count as free", TREE, "static_cast<i64>(free_pages_.size()) + pages_kept_,",
        "static_cast<i64>(free_pages_.size()),", PREFIX,
    ),
]  # fmt: skip
