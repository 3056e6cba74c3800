// Moving KV: a step's rows into their slots, and whole pages for copy-on-write. Values are moved, never computed with,
// in vectors V of 16, 4 or 2 bytes, whatever the strides allow. And a kept plan's advance. For launch.cu alone.
#pragma once

#include "cuda/params.hpp"
#include "cuda/ptx.cuh"

namespace anabranch::cuda {

// Strides in bytes here. K and V in one launch.
template <class V>
ANABRANCH_KERNEL(kThreads, 4)
void write_kv_kernel(const WriteKv w) {
  const i64 total = static_cast<i64>(w.rows) * w.num_kv_heads * w.vectors;
  for (i64 at = static_cast<i64>(ptx::block()) * kThreads + ptx::thread(); at < total;
       at += static_cast<i64>(ptx::blocks()) * kThreads) {
    const i64 token = at / w.vectors, row = token / w.num_kv_heads, head = token % w.num_kv_heads;
    const int slot = ptx::load(w.slots + row);
    if (slot < 0) continue;  // rows that only fill up a captured graph
    const i64 page = slot / w.page_size, within = slot % w.page_size, column = at % w.vectors * sizeof(V);
    const auto move = [&](const void* from, i64 from_row, i64 from_head, const Pages& to) {
      const char* source = static_cast<const char*>(from) + row * from_row + head * from_head + column;
      char* target = static_cast<char*>(to.data) + page * to.page + within * to.slot + head * to.head + column;
      ptx::store(reinterpret_cast<V*>(target), ptx::load(reinterpret_cast<const V*>(source)));
    };
    move(w.k, w.k_row, w.k_head, w.k_pages);
    move(w.v, w.v_row, w.v_head, w.v_pages);
  }
}

// A block a (copy, plane, head): the first filled slots only, K and V of every layer in one launch. A destination was
// free a moment ago, so it is nobody's source: the copies need no order among themselves.
template <class V>
ANABRANCH_KERNEL(kThreads, 4)
void copy_pages_kernel(const CopyPages c) {
  const i64 units = static_cast<i64>(c.count) * c.planes * c.heads;
  for (i64 unit = ptx::block(); unit < units; unit += ptx::blocks()) {
    const i64 head = unit % c.heads, plane = unit / c.heads % c.planes, copy = unit / c.heads / c.planes;
    const i64 source = ptx::load(c.copies + copy), target = ptx::load(c.copies + c.count + copy);
    const int filled = ptx::load(c.copies + 2 * c.count + copy);
    char* const base = c.pool + plane * c.plane + head * c.head;
    for (int at = ptx::thread(); at < filled * c.vectors; at += kThreads) {
      const i64 within = at / c.vectors * c.slot + at % c.vectors * sizeof(V);
      ptx::store(reinterpret_cast<V*>(base + target * c.page + within),
                 ptx::load(reinterpret_cast<const V*>(base + source * c.page + within)));
    }
  }
}

// What LivePlan::advance (csrc/plan/live_plan.cpp) does on the host. A tail has one row, so no two threads meet.
ANABRANCH_KERNEL(kThreads, 4)
void advance_kernel(const Advance a) {
  for (int b = ptx::block() * kThreads + ptx::thread(); b < a.branches; b += ptx::blocks() * kThreads) {
    const auto tail = ptx::load(a.tails + b);
    if (tail < 0) continue;  // a row that only fills up a captured graph
    i32* const item = a.items + 8 * tail;
    const i32 begin = ptx::load(item), length = ptx::load(item + 1), row = ptx::load(item + 2);
    const i32 position = static_cast<i32>(ptx::load(a.positions + b)), latest = ptx::load(item + 5);
    const i32 place = begin + length, within = place & ((1 << a.strip_shift) - 1);
    Int2* const strip = reinterpret_cast<Int2*>(a.kv_strips) + (place >> a.strip_shift);
    const Int2 token{ptx::load(a.slots + b), position};
    if (within == 0) {
      ptx::store(strip, token);
    } else {
      const i32 entry = ptx::load(strip).x;  // not below 0: the token lies side by side with the one before
      if (entry < 0) ptx::store(reinterpret_cast<Int2*>(a.kv_spelled) + (~entry + within), token);
    }
    ptx::store(a.limits + row, length + 1);
    ptx::store(a.row_positions + b, position);
    ptx::store(item + 1, length + 1);
    ptx::store(item + 5, latest > position ? latest : position);
    ptx::store(item + 6, position);
  }
}

}  // namespace anabranch::cuda
