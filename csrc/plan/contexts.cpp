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
  c.page_size = tree.page_size();
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
        c.pieces.push_back({span.length(), span.slots.data(), span.positions.data()});
      }
      c.piece_ids.push_back(it->second);
    }
    c.piece_ptr.push_back(static_cast<i32>(c.piece_ids.size()));
  }
  return c;
}

void spell(const Contexts::Piece& piece, i32 page_size, i32* slots, i32* positions) {
  if (piece.pages == nullptr) {
    std::copy_n(piece.slots, piece.length, slots);
    std::copy_n(piece.positions, piece.length, positions);
    return;
  }
  for (i32 i = 0; i < piece.length; ++i) {
    const i32 at = piece.offset + i;
    slots[i] = piece.pages[at / page_size] * page_size + at % page_size;
    positions[i] = piece.position + i;
  }
}

namespace {

// A page in a column, whoever names it there.
struct Entry {
  i32 page, column;
  i32 visitors = 0;
  i32 seen = 0;          // tokens that every visitor sees of it; kDiffers: see `ends`
  i32 before = kNobody;  // the entry that all visitors name in the column before
  i32 piece = -1;  // the first one, of several

  static constexpr i32 kNobody = -1, kDiffers = -2;
};

// Pages are looked up in a plain array where that is not much longer than the tables; a page's entries in further columns,
// which are rare, in a hash table.
class Entries {
 public:
  Entries(size_t named, i32 max_page) {
    if (static_cast<size_t>(max_page) < 4 * named + 1024) first_.assign(static_cast<size_t>(max_page) + 1, -1);
    all.reserve(named);
  }

  i32 find(i32 page, i32 column) {
    i32* id = static_cast<size_t>(page) < first_.size() ? &first_[static_cast<size_t>(page)] : nullptr;
    if (id == nullptr || (*id >= 0 && all[static_cast<size_t>(*id)].column != column))
      id = &others_.try_emplace(static_cast<u64>(page) << 32 | static_cast<u64>(column), -1).first->second;
    if (*id < 0) {
      *id = static_cast<i32>(all.size());
      all.push_back({page, column});
    }
    return *id;
  }

  std::vector<Entry> all;

 private:
  std::vector<i32> first_;
  std::unordered_map<u64, i32> others_;
};

}  // namespace

Contexts contexts_of_tables(const Tables& t) {
  const i32 page_size = t.page_size;
  Contexts c;
  c.page_size = page_size;
  const auto seen_of = [&](i64 b, size_t at) {  // tokens of a page that the sequence sees
    return static_cast<i32>(std::min<i64>(page_size, t.lengths[b] - (static_cast<i64>(at) - t.begin[b]) * page_size));
  };
  // Pass 1: who names each entry, behind which other, and how much of its page is seen.
  Entries entries(t.pages.size(), t.max_page);
  std::vector<i32> ids(t.pages.size());  // entry of each page of each sequence
  std::unordered_map<i32, std::vector<i32>> ends;  // of entries that are seen to different lengths: these, sorted
  for (i64 b = 0; b < t.batch(); ++b) {
    i32 before = Entry::kNobody;
    const size_t first = static_cast<size_t>(t.begin[b]), last = static_cast<size_t>(t.begin[b + 1]);
    for (size_t at = first; at < last; ++at) {
      const i32 seen = seen_of(b, at), id = entries.find(t.pages[at], static_cast<i32>(at - first));
      Entry& entry = entries.all[id];
      if (entry.visitors++ == 0) {
        entry.seen = seen;
        entry.before = before;
      } else {
        if (entry.before != before) entry.before = Entry::kDiffers;
        if (entry.seen != seen) {
          std::vector<i32>& list = ends[id];
          if (list.empty()) list.push_back(entry.seen);
          const auto at = std::lower_bound(list.begin(), list.end(), seen);
          if (at == list.end() || *at != seen) list.insert(at, seen);
          entry.seen = Entry::kDiffers;
        }
      }
      ids[at] = before = id;
    }
  }
  // Pass 2: a piece for neighbouring columns that the same sequences name; of a page that is seen to different lengths, a
  // piece for each stretch between two of them.
  c.piece_ptr.push_back(0);
  c.row_ptr.push_back(0);
  for (i64 b = 0; b < t.batch(); ++b) {
    i32 piece = -1;  // that the page before belongs to
    for (size_t at = static_cast<size_t>(t.begin[b]); at < static_cast<size_t>(t.begin[b + 1]); ++at) {
      const i32* page = t.pages.data() + at;
      const i32 position = (static_cast<i32>(at) - static_cast<i32>(t.begin[b])) * page_size;
      Entry& entry = entries.all[ids[at]];
      if (entry.seen == Entry::kDiffers) {
        const std::vector<i32>& list = ends[ids[at]];
        if (entry.piece < 0) {
          entry.piece = static_cast<i32>(c.pieces.size());
          i32 from = 0;
          for (const i32 to : list) {
            c.pieces.push_back({to - from, nullptr, nullptr, page, from, position + from});
            from = to;
          }
        }
        for (size_t i = 0; i < list.size() && list[i] <= seen_of(b, at); ++i)
          c.piece_ids.push_back(entry.piece + static_cast<i32>(i));
        piece = -1;
        continue;
      }
      if (entry.piece < 0) {
        // The same visitors: as many, and all of this one's come from that one.
        const bool same = piece >= 0 && entry.before == ids[at - 1] &&
                          entries.all[ids[at - 1]].visitors == entry.visitors;
        if (same) {
          c.pieces[piece].length += entry.seen;
          entry.piece = piece;
        } else {
          entry.piece = static_cast<i32>(c.pieces.size());
          c.pieces.push_back({entry.seen, nullptr, nullptr, page, 0, position});
        }
      }
      if (entry.piece != piece) c.piece_ids.push_back(entry.piece);
      piece = entry.piece;
    }
    c.piece_ptr.push_back(static_cast<i32>(c.piece_ids.size()));
    c.row_ptr.push_back(c.row_ptr.back() + static_cast<i32>(t.queries[b]));
    for (i64 j = 0; j < t.queries[b]; ++j) c.row_positions.push_back(t.lengths[b] - t.queries[b] + j);
  }
  return c;
}

}  // namespace anabranch
