// Tree attention: a persistent grid over (work item × KV head), most expensive first.
//
// A block is four warps. A warp owns 16 packed query rows (row of the item × query head of the group) and a share of the
// tokens; how many warps go which way follows from the item: a leaf of few rows has its tokens split over all four warps
// (their results meet in shared memory), 64 rows give each warp 16 rows and all tokens. Registers are the same in every
// layout, so one kernel serves root and leaf, in one launch.
//
// K and V come through a ring of tiles in shared memory (stream.cuh). How many steps of a tile are a warp's is a template
// parameter, so that its products are one run of instructions without a branch. 16-bit types multiply on tensor cores;
// float32 by FMA, in the same register layout.
//
// Which block computes what is fixed by the plan and the grid alone: no atomics, nothing to reset between replays.
#pragma once

#include "cuda/results.cuh"
#include "cuda/stream.cuh"
#include "cuda/tile.cuh"

namespace anabranch::cuda {

// The item's tokens that the pass sees: [first, end), and what a lane's rows see of them.
struct Range {
  int first;
  Sight sight;
};

template <class T, int D>
ANABRANCH_DEVICE Range range_of(const Attention& a, const Pass& pass) {
  auto& front = Shape<T, D>::front();
  const Int4 &kv = pass.kv, &seen = pass.seen;
  const int thread = ptx::thread_anew(), lane = thread & 31, warp = thread / 32;
  const bool masked = seen.x != 0;
  int end = kv.y;
  if (masked) {
    end = 0;
    const int last = (pass.packed_begin + pass.rows - 1) / a.group;
    for (int i = pass.packed_begin / a.group + lane; i <= last; i += 32)
      end = larger(end, front.ahead.limit(a, pass, i));
    ANABRANCH_UNROLL
    for (int d = 16; d > 0; d >>= 1) end = larger(end, ptx::shuffle_xor(end, d));
  }
  int first = 0;
  if (a.windowed) {
    // What the earliest row cannot see, none can: the first and the last visible token bound the stream.
    int last = 0;
    first = end;
    if (seen.z - seen.y < a.window)
      for (int n = thread; n < end; n += kThreads)
        if (seen.z - position_at(a, static_cast<u32>(kv.x + n)) < a.window) {
          first = smaller(first, n);
          last = n + 1;
        }
    ANABRANCH_UNROLL
    for (int d = 16; d > 0; d >>= 1) {
      first = smaller(first, ptx::shuffle_xor(first, d));
      last = larger(last, ptx::shuffle_xor(last, d));
    }
    if (lane == 0) ptx::store(front.ends + warp, Int2{first, last});
    ptx::sync_block(Site::window_reduced);
    ANABRANCH_UNROLL
    for (int w = 0; w < kWarps; ++w) {
      const Int2 other = ptx::load(front.ends + w);
      first = smaller(first, other.x);
      last = larger(last, other.y);
    }
    end = last;
  }
  Range range{first, {end, {end, end}, {0, 0}, 0, a.window}};
  Sight& sight = range.sight;
  ANABRANCH_UNROLL
  for (int i = 0; i < 2; ++i) {
    // A row past the last sees all: nobody asks it.
    const int r = pass.packed_begin + warp % pass.warps_m * 16 + lane / 4 + 8 * i;
    if (r >= pass.packed(a)) continue;
    if (masked) sight.limit[i] = smaller(end, front.ahead.limit(a, pass, r / a.group));
    if (a.windowed) sight.position[i] = ptx::load(a.row_positions + front.ahead.row(a, pass, r / a.group));
  }
  sight.least = smaller(sight.limit[0], sight.limit[1]);
  ANABRANCH_UNROLL
  for (int d = 4; d < 32; d <<= 1) sight.least = smaller(sight.least, ptx::shuffle_xor(sight.least, d));
  return range;
}

// The pass's queries, zeros where there are none: 16 rows a warp.
template <class T, int D>
ANABRANCH_DEVICE void copy_queries(const Attention& a, const Pass& pass, char* queries) {
  using S = Shape<T, D>;
  const int thread = ptx::thread_anew(), column = thread % S::kLanes;
  ANABRANCH_NO_UNROLL
  for (int r = S::first_row(thread, 1); r < pass.warps_m * 16; r += kThreads / S::kLanes) {
    const T* from = static_cast<const T*>(a.q);
    const bool there = r < pass.rows;
    if (there) {
      const int packed = pass.packed_begin + r, row = packed / a.group;
      from += S::front().ahead.row(a, pass, row) * a.q_row +
              (pass.head * a.group + packed - row * a.group) * a.q_head + column * S::kGranule;
    }
    ANABRANCH_UNROLL
    for (int c = 0; c < S::kColumns; ++c)
      ptx::copy_async(queries + r * S::kPitch + (column + c * S::kLanes) * 16, from + c * S::kLanes * S::kGranule,
                      there && (column + c * S::kLanes) * 16 < a.row_bytes ? 16 : 0);
  }
  ptx::copy_commit();
}

template <class T, int D, int STEPS>
ANABRANCH_DEVICE void attend(const Attention& a, Pass& pass, const Range& range) {
  using S = Shape<T, D>;
  typename S::Front& front = S::front();
  char* const ring = ptx::shared_memory() + S::kRing;
  const int thread = ptx::thread(), lane = thread & 31, warp = thread / 32;
  constexpr int warps_n = STEPS == 1 ? 4 : STEPS == 2 ? 2 : 1;
  const Sight& sight = range.sight;
  Tile<T, D, STEPS> tile;
  tile.warp_m = warp % pass.warps_m;
  tile.first_key = warp / pass.warps_m * STEPS * S::kKeys;
  const bool working = STEPS < 4 || warp < pass.warps_m;  // three warps of rows leave the fourth idle
  const int first_block = range.first / S::kBlock;
  const int tiles = sight.end > range.first ? 2 * ((sight.end + S::kBlock - 1) / S::kBlock - first_block) : 0;
  Stream<T, D> stream{a, ring, static_cast<u32>(pass.kv.x), pass.head, first_block, sight.end, pass.seen.z,
                      tiles, ptx::in_register(a.head_dim / S::kGranule), 0, 0, {}, {}};
  if (tiles > 0) stream.prepare();
  ptx::sync_block(Site::places_visible);
  if (thread == 0) pass.keep(front.kept);
  if (pass.last(a, S::kRows)) front.ahead.look_ahead(a, pass.round());
  if (tiles > 0) {
    // Queries: into the ring's last tile, from where they go to registers before that tile is needed, or to their own.
    char* const queries = ring + (S::kKeepQ ? (a.ring - 1) * S::kTile : a.ring * S::kTile);
    copy_queries<T, D>(a, pass, queries);
    stream.fill();
    if constexpr (S::kKeepQ) {
      ptx::copy_wait<S::usual_ring() - 1>(a.ring - 1, Site::queries_landed);
      ptx::sync_block(Site::queries_visible);
      tile.load_queries(queries);
    }

    tile.clear();
    const bool capped = a.softcap > 0;
    const float factor = capped ? a.scale / a.softcap : a.scale * kLog2e, cap = a.softcap * kLog2e;
    ANABRANCH_NO_UNROLL
    while (stream.tile < tiles) {
      const int block = stream.tile / 2, begin = (first_block + block) * S::kBlock;
      const i32* const at = front.positions[block & (kAheadPositions - 1)];
      const char* keys = stream.template next<true>();
      bool hidden = false;  // some row of this warp does not see some token
      if (working) {
        typename Tile<T, D, STEPS>::Scores s;
        tile.multiply_keys(s, keys, queries);
        tile.scale(s, factor, capped, cap);
        if (a.windowed)
          hidden = tile.template mask<true>(s, sight, begin, at);
        else if (begin + S::kBlock > sight.least)
          hidden = tile.template mask<false>(s, sight, begin, at);
        tile.online_softmax(s);
      }
      const char* values = stream.template next<false>();
      if (!working) continue;
      if constexpr (S::kHalf) {
        if (hidden && tile.holds_infinities(values))
          tile.add_seen_values(values, sight, a.windowed, begin, at);
        else
          tile.template add_values<false>(values);
      } else {
        if (hidden)
          tile.template add_values<true>(values);
        else
          tile.template add_values<false>(values);
      }
    }
  } else {
    tile.clear();
    ptx::copy_commit();
    ptx::copy_wait<0>(0, Site::ahead_landed);
  }

  ptx::sync_block(Site::ring_done);
  pass.restore(front.kept);
  if (pass.last(a, S::kRows)) fetch_next_to_cache<T, D>(a, pass.round());
  float* const results = reinterpret_cast<float*>(ring);
  ANABRANCH_UNROLL
  for (int r = 0; r < 2; ++r) {
    tile.l[r] += ptx::shuffle_xor(tile.l[r], 1);
    tile.l[r] += ptx::shuffle_xor(tile.l[r], 2);
  }
  if (working) {
    ANABRANCH_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int at = warp * 16 + lane / 4 + 8 * r;
      if ((lane & 3) == 0) ptx::store(front.stats + at, Float2{tile.m[r], tile.l[r]});
      ANABRANCH_UNROLL
      for (int i = 0; i < D / 8; ++i)
        ptx::store(reinterpret_cast<Float2*>(results + at * S::kAccPitch + i * 8 + 2 * (lane & 3)),
                   Float2{tile.acc[i][2 * r], tile.acc[i][2 * r + 1]});
    }
  }
  ptx::sync_block(Site::results_visible);
  emit<T, D>(a, results, pass, warps_n);
}

template <class T, int D>
ANABRANCH_KERNEL(kThreads, (Shape<T, D>::kBlocks))
void attention_kernel(const Attention a) {
  using S = Shape<T, D>;
  ptx::allow_next_launch();
  // Heads of an item are neighbours: they read the same slots and rows.
  const u32 heads = static_cast<u32>(a.num_kv_heads);
  const Units units{static_cast<u32>(a.counts == nullptr ? a.num_items : ptx::load(a.counts)) * heads, heads};
  if (units.at(0) >= units.count) return;
  auto& ahead = S::front().ahead;
  ahead.begin(a, units);
  Pass pass{};
  for (u32 unit; (unit = units.at(pass.round())) < units.count; ++pass.round()) {
    pass.load(ahead.items[pass.round() & 1], static_cast<int>(unit % heads));
    for (; pass.packed_begin < pass.packed(a); pass.packed_begin += S::kRows) {
      pass.rows = smaller(pass.packed(a) - pass.packed_begin, S::kRows);
      pass.warps_m = (pass.rows + 15) / 16;
      const Range range = range_of<T, D>(a, pass);
      // The fewer warps the rows take, the more share the tokens of a tile.
      if (S::kMostSteps == 1 || pass.warps_m == 1)
        attend<T, D, 1>(a, pass, range);
      else if (S::kMostSteps == 2 || pass.warps_m == 2)
        attend<T, D, S::kMostSteps < 2 ? 1 : 2>(a, pass, range);
      else
        attend<T, D, S::kMostSteps>(a, pass, range);
    }
  }
}

}  // namespace anabranch::cuda
