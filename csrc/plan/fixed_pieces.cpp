// Pieces whose borders depend on each context alone: a context is cut at multiples of `grain` tokens, counted from its
// beginning, and two contexts share a piece where they hold the same slots between the same two borders. A run of such a
// piece is one item's range for every row that sees it, so the partial results of a row, and the order in which they are
// merged, depend on its own context and not on who else is in the plan.
#include <algorithm>
#include <unordered_map>

#include "plan/plan.hpp"

namespace anabranch {

namespace {

using u64 = std::uint64_t;

u64 hash_of(const i32* slots, i64 n, u64 seed) {
  u64 h = seed * 0x9e3779b97f4a7c15ull + static_cast<u64>(n);
  for (i64 i = 0; i < n; ++i) h = (h ^ static_cast<u64>(static_cast<std::uint32_t>(slots[i]))) * 0x100000001b3ull;
  return h;
}

}  // namespace

FixedContexts fixed_pieces(const Contexts& c, i32 grain) {
  const i32 batch = static_cast<i32>(c.row_ptr.size()) - 1;
  FixedContexts out;
  out.contexts.page_size = c.page_size;
  out.contexts.row_ptr = c.row_ptr;
  out.contexts.row_positions = c.row_positions;
  out.contexts.row_of = c.row_of;
  out.contexts.row_offsets = c.row_offsets;
  // All tokens, context by context; a piece points into them.
  std::vector<i64> begin{0};
  for (i32 b = 0; b < batch; ++b) {
    i64 length = 0;
    if (c.row_ptr[b] != c.row_ptr[b + 1])  // nobody looks at the others
      for (i32 i = c.piece_ptr[b]; i < c.piece_ptr[b + 1]; ++i) length += c.pieces[c.piece_ids[i]].length;
    begin.push_back(begin.back() + length);
  }
  out.slots.resize(begin.back());
  out.positions.resize(begin.back());
  i64 longest = 0;
  for (i32 b = 0; b < batch; ++b) {
    i64 at = begin[b];
    for (i32 i = c.piece_ptr[b]; at < begin[b + 1] && i < c.piece_ptr[b + 1]; ++i) {
      const Contexts::Piece& piece = c.pieces[c.piece_ids[i]];
      spell(piece, c.page_size, out.slots.data() + at, out.positions.data() + at);
      at += piece.length;
    }
    longest = std::max(longest, begin[b + 1] - begin[b]);
  }
  // Border by border, so that numbers of pieces rise along every context: a row's partials are merged in that order.
  std::vector<std::vector<i32>> ids(batch);
  for (i64 from = 0; from < longest; from += grain) {
    std::unordered_multimap<u64, i32> found;
    for (i32 b = 0; b < batch; ++b) {
      const i64 left = begin[b + 1] - begin[b] - from;
      if (left <= 0) continue;
      const i32 length = static_cast<i32>(std::min<i64>(left, grain));
      const i32* slots = out.slots.data() + begin[b] + from;
      const u64 hash = hash_of(slots, length, static_cast<u64>(from));
      i32 id = -1;
      const auto [first, last] = found.equal_range(hash);
      for (auto it = first; it != last && id < 0; ++it) {
        const Contexts::Piece& other = out.contexts.pieces[it->second];
        if (other.length == length && std::equal(slots, slots + length, other.slots)) id = it->second;
      }
      if (id < 0) {
        id = static_cast<i32>(out.contexts.pieces.size());
        out.contexts.pieces.push_back({length, slots, out.positions.data() + begin[b] + from});
        found.emplace(hash, id);
      }
      ids[b].push_back(id);
    }
  }
  out.contexts.piece_ptr.push_back(0);
  for (const std::vector<i32>& list : ids) {
    out.contexts.piece_ids.insert(out.contexts.piece_ids.end(), list.begin(), list.end());
    out.contexts.piece_ptr.push_back(static_cast<i32>(out.contexts.piece_ids.size()));
  }
  return out;
}

}  // namespace anabranch
