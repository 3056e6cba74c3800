// Attention of an item that holds a subtree: its parts one after another, each for the rows that see it, with the rows'
// queries and sums in the second-level cache from the first part to the last.
//
// A part of few packed rows (a leaf) reads K and V straight from their pages as stream.hpp does, one of many (what leaves
// have in common) packs them as packed.hpp does; both add to the same sums. The heads take turns at every tile, so K and V
// are each read in long runs.
#pragma once

#include "cpu/packed.hpp"
#include "cpu/stream.hpp"

namespace anabranch::cpu {
namespace {

template <class E>
struct SubtreeScratch {
  PackedScratch<E> wide;    // of these two only what a tile needs is used
  StreamScratch<E> narrow;
  int rows;                 // packed, padded to vectors
  E *panels, *queries;      // of each head: Q as packed.hpp and as stream.hpp want it
  float *o, *m, *l;         // of each head

  SubtreeScratch(void* base, int packed, int d, int v_dim, int heads, size_t* bytes = nullptr)
      : wide(base, packed, d, v_dim, bytes), narrow(base, d, v_dim, 1) {
    size_t first, second;
    PackedScratch<E>(nullptr, packed, d, v_dim, &first);
    StreamScratch<E>(nullptr, d, v_dim, 1, &second);
    narrow = StreamScratch<E>(static_cast<char*>(base) + first, d, v_dim, 1);
    Scratch take(static_cast<char*>(base) + first + second);
    rows = wide.rows;  // (both pad V alike)
    panels = take.take<E>(size_t(heads) * rows * d / STEP<E>);
    queries = take.take<E>(size_t(heads) * rows * narrow.dk / STEP<E>);
    o = take.take<float>(size_t(heads) * rows * narrow.dv);
    m = take.take<float>(size_t(heads) * rows);
    l = take.take<float>(size_t(heads) * rows);
    if (bytes) *bytes = size_t(take.next - static_cast<char*>(base));
  }
};

// Tokens of a part that are worked on together.
struct Stride {
  const Attention* a;
  int item, parts, index;  // of the part; index == parts: behind the last one
  Unit unit;
  int lane = 0;  // the part's first packed row
  int begin = 0, n = 0;
  bool wide = false;
  int32_t slots[TILE];
  const char *k[TILE], *v[TILE];  // for the first head

  Stride(const Attention& a, int item, int head)
      : a(&a), item(item), parts(parts_of(a, item)), index(-1), unit(a, item, head) {}  // before the first one

  // Becomes the one behind `from`.
  template <class S>
  void follow(const Stride& from) {
    index = from.index;
    unit = from.unit;
    lane = from.lane;
    wide = from.wide;
    begin = from.begin + from.n;
    while (begin >= unit.n) {
      if (++index >= parts) {
        n = 0;
        return;
      }
      const int32_t first = a->items[8 * int64_t(item) + 2];
      unit = Unit(*a, item + 1 + index, unit.head);
      lane = (a->items[8 * int64_t(item + 1 + index) + 2] - first) * a->group;
      wide = unit.packed > STREAM_ROWS;
      begin = 0;
    }
    n = smaller(wide ? TILE : STREAM_TILE, unit.n - begin);
    unit.slots(begin, n, slots);
    for (int j = 0; j < n; ++j) {
      k[j] = reinterpret_cast<const char*>(at<S>(a->k, *a, unit.head, slots[j]));
      v[j] = reinterpret_cast<const char*>(at<S>(a->v, *a, unit.head, slots[j]));
    }
  }
  template <class S>
  const S* key(int j, int64_t head) const {
    return reinterpret_cast<const S*>(k[j]) + head * a->k.head;
  }
  template <class S>
  const S* value(int j, int64_t head) const {
    return reinterpret_cast<const S*>(v[j]) + head * a->v.head;
  }
};

// A subtree's item for KV heads [begin, end).
template <class T, class E, class S = T>
void subtree_unit(const Attention& a, int item, int begin, int end, void* scratch) {
  const int d = a.head_dim, heads = end - begin;
  Unit rows(a, item, begin);
  const SubtreeScratch<E> w(scratch, rows.packed, d, a.v_dim, heads);
  PackedScratch<E> wide = w.wide;
  const int64_t panels = int64_t(w.rows) * d / STEP<E>, dk = w.narrow.dk, dv = w.narrow.dv,
                queries = int64_t(w.rows) * dk / STEP<E>, sums = int64_t(w.rows) * dv;
  const auto turn = [&](int h) {
    wide.q = w.panels + h * panels;
    wide.o = w.o + h * sums;
    wide.m = w.m + h * w.rows;
    wide.l = w.l + h * w.rows;
  };
  for (int h = 0; h < heads; ++h) {
    rows.head = begin + h;
    turn(h);
    pack_queries<T, E>(a, rows, wide);
    stream_queries<T, E>(a, rows, int(dk), w.queries + h * queries);
    start_rows(a, rows, wide);
  }
  memset(w.narrow.zeros, 0, size_t(dv) * sizeof(S));
  const void* fetched[2 * TILE];
  StreamRows<S> at_rows;
  Stride first(a, item, begin), second(a, item, begin), *here = &first, *next = &second;
  here->template follow<S>(second);
  for (; here->n > 0; std::swap(here, next)) {
    next->template follow<S>(*here);
    Unit& u = here->unit;
    const Tile tile(a, u, here->begin, here->n, wide.positions);
    if (tile.hidden) continue;
    const StreamBlocks<S, E> blocks(here->wide ? 1 : u.packed);
    for (int h = 0; h < heads; ++h) {
      const bool last = h + 1 == heads;  // what is read next: the next head of these tokens, or the first of the next
      const Stride& coming = last && next->n > 0 ? *next : *here;
      const int64_t coming_head = last ? 0 : h + 1;
      u.head = begin + h;
      turn(h);
      if (here->wide) {
        for (int j = 0; j < here->n; ++j) {
          wide.here[j] = here->template key<S>(j, h);
          wide.here[TILE + j] = here->template value<S>(j, h);
          wide.slots[j] = here->slots[j];
        }
        for (int j = here->n; j < TILE; ++j) wide.here[j] = wide.here[0];  // surplus keys of the last block
        int count = 0;
        for (int j = 0; j < coming.n; ++j) fetched[count++] = coming.template key<S>(j, coming_head);
        for (int j = 0; j < coming.n; ++j) fetched[count++] = coming.template value<S>(j, coming_head);
        const int panels = (here->lane + u.packed - 1) / PANEL - here->lane / PANEL + 1;
        const int steps = fetch_steps<E>(d, panels) * round_up(tile.n, LONG) / TILE;
        Fetcher fetcher(fetched, count, d * int(sizeof(S)), steps > 1 ? steps : 1);
        packed_tile<E, S>(a, u.head, tile, wide, here->lane, here->lane + u.packed, fetcher);
        continue;
      }
      for (int j = 0; j < STREAM_TILE; ++j) {
        const int real = j < here->n ? j : 0, ahead = j < coming.n ? j : 0;
        at_rows.k[j] = here->template key<S>(real, h);
        at_rows.v[j] = j < here->n ? here->template value<S>(j, h) : static_cast<const S*>(w.narrow.zeros);
        at_rows.next_k[j] = coming.template key<S>(ahead, coming_head);
        at_rows.next_v[j] = coming.template value<S>(ahead, coming_head);
      }
      stream_tile(a, u, tile, blocks, at_rows, here->slots, w.narrow, w.queries + h * queries + here->lane * dk / STEP<E>,
                  wide.o + here->lane * dv, wide.m + here->lane, wide.l + here->lane);
    }
    u.head = begin;  // where the next tokens of the part are looked up
  }
  for (int h = 0; h < heads; ++h) {
    rows.head = begin + h;
    turn(h);
    for (int row = 0; row < rows.packed; ++row) emit<T>(a, rows, row, wide.m[row], wide.l[row], wide.o + row * dv);
  }
}

}  // namespace
}  // namespace anabranch::cpu
