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
    ranges.most_items += splits * tiles;
    ranges.most_entries += splits * runs.rows[r];
  }
}

}  // namespace

// Tokens of the runs, one after another; a steady tail gets `slack` free places behind it.
//
// A kernel knows one limit a row: it sees the first so many tokens of an item. So whatever a row must not see has to
// be a suffix of the run, for each visitor of it. It is, since a run's tokens, absorbed ones included, are stored
// in *context order*: what a row must not see is a suffix of its context; every visitor of a run visits all of it,
// what it absorbed included; and all visitors have these pieces in the same order (see Contexts), so the order of
// one is the order of each. Hidden tokens are counted in the run where they are stored (find_hidden).
Ranges make_ranges(const Runs& runs, const Absorbed& absorbed, const PlanParams& p, i32 slack) {
  Ranges ranges;
  ranges.begin.assign(runs.count(), 0);
  ranges.split.assign(runs.count(), 0);
  ranges.tile_rows = std::max(1, p.tile / p.group);
  for (i32 r = 0; r < runs.count(); ++r) {
    if (absorbed.absorbed[r]) continue;
    ranges.begin[r] = ranges.kv_total;
    ranges.kv_tokens += absorbed.length[r];
    ranges.kv_total += absorbed.length[r];
    if (runs.is_terminal[r] && runs.rows[r] == 1) ranges.kv_total += slack;
  }
  cut(runs, absorbed, p, ranges);
  return ranges;
}

void store_tokens(const Contexts& c, const Runs& runs, const Absorbed& absorbed, const Ranges& ranges, i32* kv_slots,
                  i32* kv_positions) {
  for (i32 r = 0; r < runs.count(); ++r) {
    if (absorbed.absorbed[r]) continue;
    i64 at = ranges.begin[r];
    const auto put = [&](i32 id) {
      const Contexts::Piece& piece = c.pieces[id];
      std::copy_n(piece.slots, piece.length, kv_slots + at);
      std::copy_n(piece.positions, piece.length, kv_positions + at);
      at += piece.length;
    };
    if (absorbed.length[r] == runs.length[r]) {
      std::for_each(runs.pieces.first(r), runs.pieces.last(r), put);
      continue;
    }
    const i32 b = *runs.visitors.first(r);  // r ends its context, so what was absorbed from there is in r
    for (i32 i = c.piece_ptr[b]; i < c.piece_ptr[b + 1]; ++i) {
      const i32 run = runs.of_piece[c.piece_ids[i]];
      if (run == r || absorbed.absorbed[run]) put(c.piece_ids[i]);
    }
  }
}

}  // namespace anabranch
