// Contexts out of a tree's branches, and out of block tables.
#include <algorithm>
#include <unordered_map>

#include "plan/plan.hpp"

namespace anabranch {

namespace {
using u64 = std::uint64_t;
}

Contexts contexts_of(const Tree& tree, const StepState& step) {
  if (!step.read_ptr.empty()) return contexts_of_views(tree, step);
  Contexts c;
  c.row_ptr = step.row_ptr;
  c.row_positions = step.positions;
  c.piece_ptr.push_back(0);
  std::unordered_map<i32, i32> local;  // span id → piece
  local.reserve(2 * step.branches.size());
  for (i32 b : step.branches) {
    for (i32 s : tree.peek(b).spans) {
      const auto [it, fresh] = local.try_emplace(s, static_cast<i32>(c.pieces.size()));
      if (fresh) {
        const Span& span = tree.span(s);
        c.pieces.push_back({span.slots.data(), span.positions.data(), span.length()});
      }
      c.piece_ids.push_back(it->second);
    }
    c.piece_ptr.push_back(static_cast<i32>(c.piece_ids.size()));
  }
  return c;
}

PagedContexts contexts_of_tables(const i32* tables, i64 batch, i64 columns, const i64* lengths, const i64* queries,
                                 i32 page_size) {
  PagedContexts out;
  Contexts& c = out.contexts;
  // Pass 1: for each (page, column) the distinct numbers of its slots that somebody sees; nearly always just one.
  std::unordered_map<u64, std::vector<i32>> ends;
  const auto key_of = [&](i64 b, i64 column) {
    return static_cast<u64>(tables[b * columns + column]) << 32 | static_cast<u64>(column);
  };
  const auto seen_of = [&](i64 b, i64 column) {
    return static_cast<i32>(std::min<i64>(page_size, lengths[b] - column * page_size));
  };
  for (i64 b = 0; b < batch; ++b) {
    for (i64 k = 0; k * page_size < lengths[b]; ++k) {
      std::vector<i32>& list = ends[key_of(b, k)];
      const i32 seen = seen_of(b, k);
      const auto at = std::lower_bound(list.begin(), list.end(), seen);
      if (at == list.end() || *at != seen) list.insert(at, seen);
      out.max_page = std::max(out.max_page, tables[b * columns + k]);
    }
  }
  // Pass 2: a piece for each stretch between two such numbers.
  std::unordered_map<u64, i32> first_piece;
  first_piece.reserve(ends.size());
  c.piece_ptr.push_back(0);
  c.row_ptr.push_back(0);
  std::vector<std::pair<i64, i32>> stretches;  // (offset into slots, length)
  for (i64 b = 0; b < batch; ++b) {
    for (i64 k = 0; k * page_size < lengths[b]; ++k) {
      const u64 key = key_of(b, k);
      const std::vector<i32>& list = ends[key];
      const auto [it, fresh] = first_piece.try_emplace(key, static_cast<i32>(stretches.size()));
      if (fresh) {
        i32 from = 0;
        for (i32 to : list) {
          stretches.emplace_back(static_cast<i64>(out.slots.size()), to - from);
          for (; from < to; ++from) {
            out.slots.push_back(tables[b * columns + k] * page_size + from);
            out.positions.push_back(static_cast<i32>(k * page_size + from));
          }
        }
      }
      const i32 seen = seen_of(b, k);
      for (size_t i = 0; i < list.size() && list[i] <= seen; ++i)
        c.piece_ids.push_back(it->second + static_cast<i32>(i));
    }
    c.piece_ptr.push_back(static_cast<i32>(c.piece_ids.size()));
    c.row_ptr.push_back(c.row_ptr.back() + static_cast<i32>(queries[b]));
    for (i64 j = 0; j < queries[b]; ++j) c.row_positions.push_back(lengths[b] - queries[b] + j);
  }
  for (const auto& [at, length] : stretches)
    c.pieces.push_back({out.slots.data() + at, out.positions.data() + at, length});
  return out;
}

}  // namespace anabranch
