// Contexts of rows that read other branches beside their own: a row of its own for each row of the step, and for each
// position offset under which it reads.
//
// Every row is a context of one row, so nothing in it is hidden and the order of its pieces is free. A piece is a stretch of
// a span between two borders that somebody's view ends at, so rows that read alike still share whole pieces, and with them
// runs: four workers that see one another's tokens read all of them once.
#include <algorithm>
#include <map>
#include <unordered_map>

#include "plan/plan.hpp"

namespace anabranch {

namespace {

// The pieces of all spans that are seen, cut where some row's view of a branch ends.
class Pieces {
 public:
  explicit Pieces(const Tree& tree) : tree_(tree) {}

  // Somebody's view of the branch begins or ends at `length` tokens.
  void border(i32 branch, i64 length) { borders_[branch].push_back(length); }

  void cut(std::vector<Contexts::Piece>& pieces) {
    std::map<i32, std::vector<i32>> ends;  // within each span
    for (auto& [branch, lengths] : borders_) {
      std::sort(lengths.begin(), lengths.end());
      i64 begin = 0;
      auto at = lengths.begin();
      for (i32 s : tree_.peek(branch).spans) {
        const i64 end = begin + tree_.span(s).length();
        std::vector<i32>& list = ends[s];
        for (; at != lengths.end() && *at <= end; ++at)
          if (*at > begin) list.push_back(static_cast<i32>(*at - begin));
        begin = end;
      }
    }
    for (auto& [s, list] : ends) {
      const Span& span = tree_.span(s);
      list.push_back(span.length());
      std::sort(list.begin(), list.end());
      list.erase(std::unique(list.begin(), list.end()), list.end());
      first_[s] = {static_cast<i32>(pieces.size()), static_cast<i32>(list.size())};
      i32 from = 0;
      for (i32 to : list) {
        pieces.push_back({to - from, span.slots.data() + from, span.positions.data() + from});
        from = to;
      }
    }
  }

  // The pieces of tokens [start, stop) of a branch, in context order; both are borders.
  void list(i32 branch, i64 start, i64 stop, const std::vector<Contexts::Piece>& pieces, std::vector<i32>& out) const {
    i64 seen = 0;
    for (i32 s : tree_.peek(branch).spans) {
      if (seen >= stop) return;
      const auto [first, count] = first_.at(s);
      for (i32 p = first; p < first + count && seen < stop; ++p) {
        if (seen >= start) out.push_back(p);
        seen += pieces[p].length;
      }
    }
  }

 private:
  const Tree& tree_;
  std::map<i32, std::vector<i64>> borders_;  // by branch; in order, so that equal steps give equal plans
  std::unordered_map<i32, std::pair<i32, i32>> first_;  // span → its first piece, and how many
};

}  // namespace

Contexts contexts_of_views(const Tree& tree, const StepState& step) {
  const size_t batch = step.branches.size();
  std::vector<char> single(batch, 0);  // rows are contexts of their own
  for (size_t b = 0; b < batch; ++b) {
    const bool reads = step.read_ptr[step.row_ptr[b]] != step.read_ptr[step.row_ptr[b + 1]];
    const bool is_read = std::count(step.read_branches.begin(), step.read_branches.end(), step.branches[b]) != 0;
    single[b] = reads || is_read;
  }
  Pieces pieces(tree);
  for (size_t b = 0; b < batch; ++b) {
    const i32 n = step.row_ptr[b + 1] - step.row_ptr[b];
    for (i32 j = single[b] ? 1 : n; j <= n; ++j) pieces.border(step.branches[b], step.lengths[b] - n + j);
  }
  for (const Read& read : step.reads) {
    pieces.border(read.branch, read.start);
    pieces.border(read.branch, read.stop);
  }
  Contexts c;
  c.page_size = tree.page_size();
  pieces.cut(c.pieces);

  c.piece_ptr.push_back(0);
  c.row_ptr.push_back(0);
  std::vector<i32> stamp(c.pieces.size(), -1);  // the row that listed a piece last: nobody sees a token twice
  std::vector<i32> own, seen;
  std::vector<std::pair<i64, std::vector<i32>>> groups;  // pieces by offset
  bool plain = true;
  const auto close = [&](const std::vector<i32>& list, i32 rows) {
    c.piece_ids.insert(c.piece_ids.end(), list.begin(), list.end());
    c.piece_ptr.push_back(static_cast<i32>(c.piece_ids.size()));
    c.row_ptr.push_back(c.row_ptr.back() + rows);
  };
  const auto query = [&](i32 row, i64 offset) {
    c.row_positions.push_back(step.positions[row] + offset);
    c.row_of.push_back(row);
    c.row_offsets.push_back(offset);
    plain &= offset == 0;
  };
  for (size_t b = 0; b < batch; ++b) {
    const i32 first = step.row_ptr[b], n = step.row_ptr[b + 1] - first;
    if (!single[b]) {
      own.clear();
      pieces.list(step.branches[b], 0, step.lengths[b], c.pieces, own);
      close(own, n);
      for (i32 j = 0; j < n; ++j) query(first + j, 0);
      continue;
    }
    for (i32 row = first; row < first + n; ++row) {
      own.clear();
      pieces.list(step.branches[b], 0, step.lengths[b] - n + 1 + (row - first), c.pieces, own);
      for (i32 piece : own) stamp[piece] = row;
      groups.clear();
      const auto group = [&](i64 offset) -> std::vector<i32>& {
        for (auto& [at, list] : groups)
          if (at == offset) return list;
        return groups.emplace_back(offset, std::vector<i32>()).second;
      };
      for (i32 r = step.read_ptr[row]; r < step.read_ptr[row + 1]; ++r) {
        seen.clear();
        pieces.list(step.reads[r].branch, step.reads[r].start, step.reads[r].stop, c.pieces, seen);
        std::vector<i32>& list = group(step.reads[r].offset);
        for (i32 piece : seen) {
          if (stamp[piece] == row) continue;
          stamp[piece] = row;
          list.push_back(piece);
        }
      }
      std::vector<i32>& last = group(0);
      last.insert(last.end(), own.begin(), own.end());
      for (const auto& [offset, list] : groups) {
        if (list.empty()) continue;
        close(list, 1);
        query(row, offset);
      }
    }
  }
  if (plain) {  // one query a row: rows and queries are the same
    c.row_of.clear();
    c.row_offsets.clear();
  }
  return c;
}

}  // namespace anabranch
