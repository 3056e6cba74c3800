// The tokens of one pass on their way into the ring, one group of asynchronous copies a tile: K₀ V₀ K₁ V₁ …
//
// Where a token lies is worked out once (slot → two addresses), some blocks ahead of its copies, so that no copy waits for
// an address. A thread has the same tokens and columns of every tile, so its part of both addresses never changes. The
// address of a token is kept low half first; −1: no token there, zeros instead.
#pragma once

#include "cuda/shape.cuh"

namespace anabranch::cuda {

// Slot and position of a token: of the strip that holds its place, and of the place in it (csrc/plan/strips.hpp).
ANABRANCH_DEVICE Int2 strip_at(const Attention& a, u32 place) {
  return ptx::load(reinterpret_cast<const Int2*>(a.kv_strips) + (place >> a.strip_shift));
}
ANABRANCH_DEVICE Int2 token_of(const Attention& a, const Int2& strip, u32 place) {
  const i32 within = static_cast<i32>(place & a.strip_mask);
  if (strip.x < 0) return ptx::load(reinterpret_cast<const Int2*>(a.kv_spelled) + (~strip.x + within));
  return Int2{strip.x + within, strip.y + within};
}

ANABRANCH_DEVICE i32 position_at(const Attention& a, u32 place) { return token_of(a, strip_at(a, place), place).y; }

template <class T, int D>
struct Stream {
  using S = Shape<T, D>;
  const Attention& a;
  char* ring;
  u32 kv_begin;           // where the item begins in the strips
  int head, first_block, end, row_pos_min;
  int tiles;              // of the pass: two a block
  int tile;               // the round
  int due, freed;         // where in the ring its tile is, and the one that is used up; bytes
  // This thread's token of the next block to be published, and the strip of the one after that. Each is loaded a block
  // before it is looked at, so that nothing waits for a load.
  Int2 token, strip;

  // Threads 0 … kBlock − 1 work out where a block's K lies, the next kBlock where V does; float32 needs no more.
  static constexpr bool kAllFetch = 2 * S::kBlock == kThreads;
  static_assert(2 * S::kBlock <= kThreads && (kAhead & (kAhead - 1)) == 0 && kAhead >= (kMaxRing + 1) / 2, "ring");
  static_assert((kAheadPositions & (kAheadPositions - 1)) == 0 && kAheadPositions > (kMaxRing + 1) / 2, "ring");
  static ANABRANCH_DEVICE int entry(int block) {
    return (block & (kAhead - 1)) * 2 * S::kBlock + ptx::thread();
  }

  // This thread's token of a block, counted from the item's first. Past the end: the strip is the last one.
  ANABRANCH_DEVICE int number(int block) const {
    return (first_block + block) * S::kBlock + (ptx::thread() & (S::kBlock - 1));
  }
  ANABRANCH_DEVICE Int2 fetch(int block) const {
    if (!kAllFetch && ptx::thread() >= 2 * S::kBlock) return Int2{0, 0};
    return strip_at(a, kv_begin + static_cast<u32>(smaller(number(block), end - 1)));
  }
  // The same, of the first blocks, whose strips were looked up ahead.
  ANABRANCH_DEVICE Int2 fetch_early(int block) const {
    const u32 place = kv_begin + static_cast<u32>(smaller(number(block), end - 1));
    const u32 entry = (place >> a.strip_shift) - (kv_begin >> a.strip_shift);
    return entry < kStrips ? ptx::load(S::front().ahead.strips + entry) : fetch(block);
  }
  // Blocks are whole strips: a thread's place in its strip is ever the same.
  ANABRANCH_DEVICE Int2 spell(const Int2& of) const {
    return token_of(a, of, kv_begin + static_cast<u32>(ptx::thread() & (S::kBlock - 1)));
  }
  ANABRANCH_DEVICE void publish(int block, const Int2& which) const {
    if (!kAllFetch && ptx::thread() >= 2 * S::kBlock) return;
    const bool is_v = ptx::thread() >= S::kBlock;
    // What nobody sees may be gone.
    const bool there = number(block) < end && !(a.windowed && row_pos_min - which.y >= a.window);
    const u32 slot = static_cast<u32>(which.x);
    const u32 page = a.page_shift >= 0 ? slot >> a.page_shift : slot / static_cast<u32>(a.page_size);
    const u32 within = slot - page * static_cast<u32>(a.page_size);
    const Pages& pages = is_v ? a.v : a.k;
    i64 place = reinterpret_cast<i64>(pages.data) + page * pages.page + within * pages.slot + head * pages.head;
    if (!there) place = -1;
    ptx::store(&S::front().places[0][0][0] + entry(block), Int2{static_cast<i32>(place), static_cast<i32>(place >> 32)});
    if (a.windowed && !is_v) ptx::store(S::front().positions[block & (kAheadPositions - 1)] + ptx::thread(), which.y);
  }

  // Starts the copies of a tile (even: K, odd: V of block tile / 2) to a place in the ring.
  ANABRANCH_DEVICE void issue(int which_tile, int where) const {
    if (which_tile < tiles) {
      const int token = S::first_row(ptx::thread(), S::kTokens), column = ptx::thread() & (S::kLanes - 1);
      const Int2* from = &S::front().places[0][0][0] + (which_tile & (2 * kAhead - 1)) * S::kBlock + token;
      char* const to = ring + where + token * S::kPitch + column * 16;
      Int2 place[S::kTokens];
      if constexpr (S::kTokens == 1) {
        place[0] = ptx::load(from);
      } else {
        ANABRANCH_UNROLL
        for (int i = 0; i < S::kTokens; i += 2) {
          const Int4 two = ptx::load(reinterpret_cast<const Int4*>(from + i));
          place[i] = Int2{two.x, two.y};
          place[i + 1] = Int2{two.z, two.w};
        }
      }
      const int used = a.head_dim / S::kGranule;
      ANABRANCH_UNROLL
      for (int i = 0; i < S::kTokens; ++i) {
        const char* const at = ptx::pointer(place[i], static_cast<u32>(column));
        ANABRANCH_UNROLL
        for (int c = 0; c < S::kColumns; ++c)
          ptx::copy_async(to + i * S::kPitch + c * S::kLanes * 16, at + c * S::kLanes * 16,
                          place[i].y >= 0 && column + c * S::kLanes < used ? 16 : 0);
      }
    }
    ptx::copy_commit();  // an empty group counts too, so that waits can count groups
  }

  // Before the first round: the addresses of the first blocks, as many as the ring takes tiles of.
  ANABRANCH_DEVICE void prepare() {
    constexpr int most = (kMaxRing + 1) / 2;
    Int2 ahead[most];
    const int prepared = (a.ring + 1) / 2;
    ANABRANCH_UNROLL
    for (int b = 0; b < most; ++b)
      if (b < prepared) ahead[b] = fetch_early(b);
    token = fetch_early(prepared);
    strip = fetch_early(prepared + 1);
    ANABRANCH_UNROLL
    for (int b = 0; b < most; ++b)
      if (b < prepared) ahead[b] = spell(ahead[b]);
    token = spell(token);
    ANABRANCH_UNROLL
    for (int b = 0; b < most; ++b)
      if (b < prepared) publish(b, ahead[b]);
  }
  ANABRANCH_DEVICE void fill() const {
    ANABRANCH_NO_UNROLL
    for (int t = 0; t < a.ring - 1; ++t) issue(t, t * S::kTile);
  }

  // One round: the tile that is due has landed, for everybody, and the next one is on its way to where the tile before
  // this one was. Addresses are published with K, a round or two before they are used.
  template <bool KEYS>
  ANABRANCH_DEVICE const char* next() {
    ptx::copy_wait(a.ring - 2, Site::tile_landed);
    ptx::sync_block(Site::tile_visible);
    if constexpr (KEYS) {
      const int block = (tile + a.ring + 1) / 2;
      publish(block, token);
      token = spell(strip);
      strip = fetch(block + 2);
    }
    issue(tile + a.ring - 1, freed);
    ++tile;
    freed = due;
    due = due == (a.ring - 1) * S::kTile ? 0 : due + S::kTile;
    return ring + freed;
  }
};

}  // namespace anabranch::cuda
