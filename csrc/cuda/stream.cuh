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

ANABRANCH_DEVICE i64 address_of(const Attention& a, const Pages& pages, u32 slot, int head) {
  const u32 page = a.page_shift >= 0 ? slot >> a.page_shift : slot / static_cast<u32>(a.page_size);
  const u32 within = slot - page * static_cast<u32>(a.page_size);
  return reinterpret_cast<i64>(pages.data) + page * pages.page + within * pages.slot + head * pages.head;
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
  int granules;           // of a token of a head
  int tile, out_slot;     // the round, and where in the ring it is read
  // This thread's token of the next block to be published, and the strip of the one after that. Each is loaded a block
  // before it is looked at, so that nothing waits for a load.
  Int2 token, strip;

  // Threads 0 … kBlock − 1 work out where a block's K lies, the next kBlock where V does; float32 needs no more.
  static constexpr bool kAllFetch = 2 * S::kBlock == kThreads;
  static_assert(2 * S::kBlock <= kThreads && (kAhead & (kAhead - 1)) == 0 && kAhead >= (kMaxRing + 1) / 2, "ring");
  static_assert((kAheadPositions & (kAheadPositions - 1)) == 0 && kAheadPositions > (kMaxRing + 1) / 2, "ring");
  static_assert(S::usual_ring() >= 3, "a wait for no groups at all would be the usual one");
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
    i64 place = address_of(a, is_v ? a.v : a.k, static_cast<u32>(which.x), head);
    if (!there) place = -1;
    ptx::store(&S::front().places[0][0][0] + entry(block), Int2{static_cast<i32>(place), static_cast<i32>(place >> 32)});
    if (a.windowed && !is_v) ptx::store(S::front().positions[block & (kAheadPositions - 1)] + ptx::thread(), which.y);
  }

  // Whether a token of a head has that many granules. What is asked of one column alone is best compared with a constant;
  // of several, with a register: the compiler would keep a predicate each, and has none left for tokens.
  ANABRANCH_DEVICE bool there(int granule) const {
    return S::kColumns == 1 ? granule * 16 < a.row_bytes : granule < granules;
  }
  // Starts the copies of a tile (even: K, odd: V of block tile / 2) to a place in the ring.
  ANABRANCH_DEVICE void issue(int which_tile, int slot) const {
    if (which_tile < tiles) {
      const int token = S::first_row(ptx::thread(), S::kTokens), column = ptx::thread() & (S::kLanes - 1);
      const Int2* from = &S::front().places[0][0][0] + (which_tile & (2 * kAhead - 1)) * S::kBlock + token;
      char* const to = ring + slot * S::kTile + token * S::kPitch + column * 16;
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
      ANABRANCH_UNROLL
      for (int i = 0; i < S::kTokens; ++i) {
        const char* const at = ptx::pointer(place[i]) + column * 16;
        ANABRANCH_UNROLL
        for (int c = 0; c < S::kColumns; ++c)
          ptx::copy_async(to + i * S::kPitch + c * S::kLanes * 16, at + c * S::kLanes * 16,
                          place[i].y >= 0 && there(column + c * S::kLanes) ? 16 : 0);
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
    for (int t = 0; t < a.ring - 1; ++t) issue(t, t);
  }

  // One round: the tile that is due has landed, for everybody, and the next one is on its way to where the tile before
  // this one was. Addresses are published with K, a round or two before they are used.
  template <bool KEYS>
  ANABRANCH_DEVICE const char* next() {
    ptx::copy_wait<S::usual_ring() - 2>(a.ring - 2, Site::tile_landed);
    ptx::sync_block(Site::tile_visible);
    if constexpr (KEYS) {
      const int block = (tile + a.ring + 1) / 2;
      publish(block, token);
      token = spell(strip);
      strip = fetch(block + 2);
    }
    issue(tile + a.ring - 1, out_slot == 0 ? a.ring - 1 : out_slot - 1);
    ++tile;
    const char* due = ring + out_slot * S::kTile;
    out_slot = out_slot + 1 == a.ring ? 0 : out_slot + 1;
    return due;
  }
};

// Brings the first tokens of the block's next unit to the second-level cache, as many as its ring will ask for at once:
// on their way while results are written and the next pass is set up, which is when no tile is.
template <class T, int D>
ANABRANCH_DEVICE void fetch_next_to_cache(const Attention& a, int round) {
  using S = Shape<T, D>;
  auto& ahead = S::front().ahead;
  const Units units{ptx::load(&ahead.units), static_cast<u32>(a.num_kv_heads)};
  const u32 unit = units.at(round + 1);
  const int thread = ptx::thread_anew();
  if (unit >= units.count || thread >= 2 * S::kBlock) return;
  const Int4 kv = ptx::load(ahead.items[(round + 1) & 1]), seen = ptx::load(ahead.items[(round + 1) & 1] + 1);
  const Pages& pages = thread >= S::kBlock ? a.v : a.k;
  const u32 begin = static_cast<u32>(kv.x);
  ANABRANCH_NO_UNROLL
  for (int block = 0; block < (a.ring + 1) / 2; ++block) {
    const int number = block * S::kBlock + (thread & (S::kBlock - 1));
    const u32 place = begin + static_cast<u32>(number), entry = (place >> a.strip_shift) - (begin >> a.strip_shift);
    if (number >= kv.y || entry >= kStrips) return;
    const Int2 strip = ptx::load(ahead.strips + entry);
    const i32 within = static_cast<i32>(place & a.strip_mask);
    // What nobody sees may be gone; what is spelled out would have to be looked up first.
    if (strip.x < 0 || (a.windowed && seen.z - (strip.y + within) >= a.window)) continue;
    ptx::fetch_to_cache(ptx::pointer(address_of(a, pages, static_cast<u32>(strip.x + within), static_cast<int>(unit % units.heads))),
                        a.head_dim * static_cast<int>(sizeof(T)));
  }
}

}  // namespace anabranch::cuda
