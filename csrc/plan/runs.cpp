#include "plan/runs.hpp"

#include <utility>

namespace anabranch {

namespace {

using u64 = std::uint64_t;

u64 mix(u64 x) {  // splitmix64: a visitor's random weight; the weights of a set are added up
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// A run for each piece that somebody sees, in the order of the pieces.
void one_run_per_piece(const Contexts& c, i32 batch, Runs& runs) {
  runs.length.clear();
  runs.of_piece.assign(c.pieces.size(), -1);
  for (i32 b = 0; b < batch; ++b)
    if (c.row_ptr[b] != c.row_ptr[b + 1])
      for (i32 i = c.piece_ptr[b]; i < c.piece_ptr[b + 1]; ++i) runs.of_piece[c.piece_ids[i]] = 0;
  for (size_t piece = 0; piece < c.pieces.size(); ++piece) {
    if (runs.of_piece[piece] < 0) continue;
    runs.of_piece[piece] = runs.count();
    runs.length.push_back(c.pieces[piece].length);
  }
}

void group_by_visitors(const Contexts& c, i32 batch, Runs& runs) {
  const i32 num_pieces = static_cast<i32>(c.pieces.size());
  std::vector<u64> hash(num_pieces, 0);
  for (i32 b = 0; b < batch; ++b) {
    if (c.row_ptr[b] == c.row_ptr[b + 1]) continue;
    const u64 weight = mix(static_cast<u64>(b) + 1);
    for (i32 i = c.piece_ptr[b]; i < c.piece_ptr[b + 1]; ++i) hash[c.piece_ids[i]] += weight;
  }
  runs.of_piece.assign(num_pieces, -1);
  size_t capacity = 16;
  while (capacity < 2 * static_cast<size_t>(num_pieces)) capacity *= 2;
  std::vector<std::pair<u64, i32>> table(capacity, {0, -1});
  for (i32 b = 0; b < batch; ++b) {
    if (c.row_ptr[b] == c.row_ptr[b + 1]) continue;
    for (i32 i = c.piece_ptr[b]; i < c.piece_ptr[b + 1]; ++i) {
      const i32 piece = c.piece_ids[i];
      if (runs.of_piece[piece] >= 0) continue;
      size_t at = hash[piece] & (capacity - 1);
      while (table[at].second >= 0 && table[at].first != hash[piece]) at = (at + 1) & (capacity - 1);
      if (table[at].second < 0) table[at] = {hash[piece], runs.count()};
      const i32 run = table[at].second;
      if (run == runs.count()) runs.length.push_back(0);
      runs.of_piece[piece] = run;
      runs.length[run] += c.pieces[piece].length;
    }
  }
}

// Count who visits each run. False where a run has more visitors than one of its pieces.
bool count_visitors(const Contexts& c, i32 batch, Runs& runs) {
  const i32 n = runs.count();
  runs.visitors = Lists(n);
  std::vector<i32> stamp(n, -1), listed(n, 0), pieces(n, 0);
  for (i32 b = 0; b < batch; ++b) {
    if (c.rows(b) == 0) continue;
    for (i32 i = c.piece_ptr[b]; i < c.piece_ptr[b + 1]; ++i) {
      const i32 r = runs.of_piece[c.piece_ids[i]];
      ++listed[r];
      if (stamp[r] != b) runs.visitors.count(r);
      stamp[r] = b;
    }
  }
  for (i32 r : runs.of_piece)
    if (r >= 0) ++pieces[r];
  runs.visitors.seal();
  bool exact = true;
  for (i32 r = 0; r < n; ++r) exact &= static_cast<i64>(runs.visitors.size(r)) * pieces[r] == listed[r];
  return exact;
}

// The visitors and the pieces of each run, counted before.
void list_visitors_and_pieces(const Contexts& c, i32 batch, Runs& runs) {
  runs.pieces = Lists(runs.count());
  std::vector<i32> stamp(runs.count(), -1);
  std::vector<char> seen(c.pieces.size(), 0);
  for (i32 r : runs.of_piece)
    if (r >= 0) runs.pieces.count(r);
  runs.pieces.seal();
  for (i32 b = 0; b < batch; ++b) {
    if (c.rows(b) == 0) continue;
    for (i32 i = c.piece_ptr[b]; i < c.piece_ptr[b + 1]; ++i) {
      const i32 piece = c.piece_ids[i], r = runs.of_piece[piece];
      if (stamp[r] != b) runs.visitors.add(r, b);
      stamp[r] = b;
      if (!seen[piece]) runs.pieces.add(r, piece);
      seen[piece] = 1;
    }
  }
}

void find_terminals(const Contexts& c, i32 batch, Runs& runs) {
  runs.terminal.assign(batch, -1);
  runs.is_terminal.assign(runs.count(), 0);
  for (i32 b = 0; b < batch; ++b) {
    if (c.rows(b) == 0 || c.piece_ptr[b] == c.piece_ptr[b + 1]) continue;
    runs.terminal[b] = runs.of_piece[c.piece_ids[c.piece_ptr[b + 1] - 1]];
    ++runs.is_terminal[runs.terminal[b]];
  }
}

}  // namespace

Runs make_runs(const Contexts& c, bool merge) {
  const i32 batch = c.batch();
  Runs runs;
  if (merge) group_by_visitors(c, batch, runs);
  // Two different sets whose weights add up alike (never seen; 1 in 2^64) would show as a run with more visitors than
  // one of its pieces has: then nothing is merged.
  if (!merge || !count_visitors(c, batch, runs)) {
    one_run_per_piece(c, batch, runs);
    count_visitors(c, batch, runs);
  }
  list_visitors_and_pieces(c, batch, runs);
  find_terminals(c, batch, runs);
  runs.rows.assign(runs.count(), 0);
  for (i32 r = 0; r < runs.count(); ++r)
    for (const i32* b = runs.visitors.first(r); b != runs.visitors.last(r); ++b) runs.rows[r] += c.rows(*b);
  return runs;
}

}  // namespace anabranch
