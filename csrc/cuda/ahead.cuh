// What a block looks up before it can copy any token of a unit (item × KV head), and looks up ahead of time.
//
// All else of a unit is found through its item: its rows, what they see, where their results go, the strips that its first
// tokens lie in. Loaded one after another between two units, each would be waited for with nothing else to do. So the item
// is on its way to shared memory two units ahead, and what is found through it one unit ahead, beside the copies of tiles.
#pragma once

#include "cuda/params.hpp"
#include "cuda/ptx.cuh"

namespace anabranch::cuda {

// Which units are this block's: back and forth over all of them, which are sorted by cost, so that the block that had the
// costliest of one round has the cheapest of the next.
struct Units {
  u32 count, heads;
  // The block's unit of a round; from `count` on: there is none, nor in any later round.
  ANABRANCH_DEVICE u32 at(int round) const {
    const u32 place = round & 1 ? ptx::blocks() - 1 - ptx::block() : ptx::block();
    return static_cast<u32>(round) * ptx::blocks() + place;
  }
};

// Packed rows that are computed at once, of one (item × KV head), from its first token to its last.
struct Pass {
  Int4 kv, seen;  // the item
  int head, packed_begin, rows, warps_m;
  // Of the block over the units; the item's last word is free for it.
  ANABRANCH_DEVICE int& round() { return seen.w; }
  ANABRANCH_DEVICE int round() const { return seen.w; }
  ANABRANCH_DEVICE void load(const Int4* at, int of_head) {
    const int kept = round();
    kv = ptx::load(at);
    seen = ptx::load(at + 1);
    round() = kept;
    head = of_head;
    packed_begin = 0;
  }
  ANABRANCH_DEVICE int packed(const Attention& a) const { return kv.w * a.group; }
  ANABRANCH_DEVICE bool last(const Attention& a, int most) const { return packed_begin + most >= packed(a); }
  // Kept in shared memory while tiles are computed, which want the registers.
  ANABRANCH_DEVICE void keep(Int4* at) const {
    ptx::store(at, kv);
    ptx::store(at + 1, seen);
    ptx::store(at + 2, Int4{head, packed_begin, rows, warps_m});
  }
  ANABRANCH_DEVICE void restore(const Int4* at) {
    kv = ptx::load(at);
    seen = ptx::load(at + 1);
    const Int4 rest = ptx::load(at + 2);
    head = rest.x, packed_begin = rest.y, rows = rest.z, warps_m = rest.w;
  }
};

constexpr u32 kStrips = kThreads / 2;  // of an item's first tokens: 1,024 at 16 a strip

template <int ROWS>
struct Ahead {
  Int4 items[2][2];  // of units of even and of odd rounds
  Int2 strips[kStrips];
  i32 limits[ROWS];                 // of the item's first rows
  i32 rows[2][ROWS], dest[2][ROWS];  // of items of even and of odd rounds: these are needed to a unit's end
  u32 units;

  ANABRANCH_DEVICE void copy_item(const Attention& a, const Units& all, int round) {
    const int word = ptx::thread_anew();  // of two numbers
    const u32 unit = all.at(round);
    if (word < 4 && unit < all.count)
      ptx::copy_async_8(reinterpret_cast<Int2*>(items[round & 1]) + word,
                        reinterpret_cast<const Int2*>(a.items) + 4 * static_cast<i64>(unit / all.heads) + word);
  }
  // The item of that round has landed, for everybody.
  ANABRANCH_DEVICE void copy_rest(const Attention& a, int round) {
    const Int4 kv = ptx::load(items[round & 1]);
    const int entry = ptx::thread_anew();
    if (entry < ROWS && entry < kv.w) {
      ptx::copy_async_4(rows[round & 1] + entry, a.rows + kv.z + entry);
      ptx::copy_async_4(dest[round & 1] + entry, a.dest + kv.z + entry);
      ptx::copy_async_4(limits + entry, a.limits + kv.z + entry);
    }
    const u32 begin = static_cast<u32>(kv.x), first = begin >> a.strip_shift;
    const u32 strip = static_cast<u32>(kThreads - 1 - entry);  // other threads than those of rows
    if (strip < kStrips && kv.y > 0 && first + strip <= (begin + static_cast<u32>(kv.y) - 1) >> a.strip_shift)
      ptx::copy_async_8(strips + strip, reinterpret_cast<const Int2*>(a.kv_strips) + first + strip);
  }

  // At the kernel's begin there is no unit before: all of it is waited for.
  ANABRANCH_DEVICE void begin(const Attention& a, const Units& all) {
    if (ptx::thread() == 0) ptx::store(&units, all.count);
    copy_item(a, all, 0);
    copy_item(a, all, 1);
    wait();
    copy_rest(a, 0);
    wait();
  }
  // The unit after the one of this round, and the item of the one after that; with the next group of copies.
  ANABRANCH_DEVICE void look_ahead(const Attention& a, int round) {
    const Units all{ptx::load(&units), static_cast<u32>(a.num_kv_heads)};
    if (all.at(round + 1) >= all.count) return;
    copy_rest(a, round + 1);
    copy_item(a, all, round + 2);
  }
  static ANABRANCH_DEVICE void wait() {
    ptx::copy_commit();
    ptx::copy_wait<0>(0, Site::ahead_landed);
    ptx::sync_block(Site::ahead_visible);
  }

  // Of an item's row, in the plan's order: what lies beyond the first ROWS (a plan for another tile) was not copied.
  ANABRANCH_DEVICE i32 row(const Attention& a, const Pass& pass, int i) const {
    return i < ROWS ? ptx::load(rows[pass.round() & 1] + i) : ptx::load(a.rows + pass.kv.z + i);
  }
  ANABRANCH_DEVICE i32 destination(const Attention& a, const Pass& pass, int i) const {
    return i < ROWS ? ptx::load(dest[pass.round() & 1] + i) : ptx::load(a.dest + pass.kv.z + i);
  }
  ANABRANCH_DEVICE i32 limit(const Attention& a, const Pass& pass, int i) const {
    return i < ROWS ? ptx::load(limits + i) : ptx::load(a.limits + pass.kv.z + i);
  }
};

}  // namespace anabranch::cuda
