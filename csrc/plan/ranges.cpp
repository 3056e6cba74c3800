#include "plan/ranges.hpp"

#include <algorithm>

namespace anabranch {

namespace {

// How a run is cut depends on that run alone, so the result of a branch does not depend on strangers in the batch.
void cut(const Runs& runs, const Absorbed& absorbed, const PlanParams& p, Ranges& ranges) {
  for (i32 r = 0; r < runs.count(); ++r) {
    if (absorbed.absorbed[r]) continue;
    const i64 tiles = (runs.rows[r] + ranges.tile_rows - 1) / ranges.tile_rows;
    const i64 chunks = (absorbed.length[r] + p.chunk - 1) / p.chunk;
    const i64 wanted = (p.parallelism + tiles * p.num_kv_heads - 1) / (tiles * p.num_kv_heads);
    const i64 splits = std::max<i64>(1, std::min(chunks, wanted));
    ranges.split[r] = (chunks + splits - 1) / splits * p.chunk;
    ranges.first[r] = ranges.count;
    ranges.count += (absorbed.length[r] + ranges.split[r] - 1) / ranges.split[r];
    ranges.most_items += splits * tiles;
    ranges.most_entries += splits * runs.rows[r];
  }
}

}  // namespace

Ranges make_ranges(const Runs& runs, const Absorbed& absorbed, const PlanParams& p) {
  Ranges ranges;
  ranges.split.assign(runs.count(), 0);
  ranges.first.assign(runs.count(), 0);
  ranges.tile_rows = std::max(1, p.tile / p.group);
  for (i32 r = 0; r < runs.count(); ++r)
    if (!absorbed.absorbed[r]) ranges.kv_tokens += absorbed.length[r];
  cut(runs, absorbed, p, ranges);
  return ranges;
}

// Ranges of the runs, one after another.
//
// A kernel knows one limit a row: it sees the first so many tokens of an item. So whatever a row must not see has to
// be a suffix of the run, for each visitor of it. It is, since a run's tokens, absorbed ones included, are stored
// in *context order*: what a row must not see is a suffix of its context; every visitor of a run visits all of it,
// what it absorbed included; and all visitors have these pieces in the same order (see Contexts), so the order of
// one is the order of each. Hidden tokens are counted in the run where they are stored (find_hidden).
std::vector<Stored> store_tokens(const Contexts& c, const Runs& runs, const Absorbed& absorbed, const Ranges& ranges,
                                 i32 slack, Strips& strips) {
  std::vector<Stored> stored;
  stored.reserve(static_cast<size_t>(ranges.count));
  std::vector<i32> ids;  // pieces of a run
  std::vector<Strips::Slice> slices;
  for (i32 r = 0; r < runs.count(); ++r) {
    if (absorbed.absorbed[r]) continue;
    ids.clear();
    if (absorbed.length[r] == runs.length[r]) {
      ids.assign(runs.pieces.first(r), runs.pieces.last(r));
    } else {
      const i32 b = *runs.visitors.first(r);  // r ends its context, so what was absorbed from there is in r
      for (i32 i = c.piece_ptr[b]; i < c.piece_ptr[b + 1]; ++i) {
        const i32 run = runs.of_piece[c.piece_ids[i]];
        if (run == r || absorbed.absorbed[run]) ids.push_back(c.piece_ids[i]);
      }
    }
    const bool grows = runs.is_terminal[r] && runs.rows[r] == 1;
    size_t next = 0;
    i32 from = 0;  // in that piece
    for (i64 begin = 0; begin < absorbed.length[r]; begin += ranges.split[r]) {
      const i64 end = std::min(begin + ranges.split[r], absorbed.length[r]);
      slices.clear();
      for (i64 left = end - begin; left > 0;) {
        const Contexts::Piece& piece = c.pieces[ids[next]];
        const i32 count = static_cast<i32>(std::min<i64>(left, piece.length - from));
        slices.push_back({&piece, from, count});
        left -= count;
        from += count;
        if (from == piece.length) {
          from = 0;
          ++next;
        }
      }
      const bool tail = grows && end == absorbed.length[r];
      stored.push_back(strips.store(slices, tail ? slack : 0, tail));
    }
  }
  return stored;
}

}  // namespace anabranch
