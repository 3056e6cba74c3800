// Linear layers over whole tensors: x brought into the kernel's form once, then blocks of output columns, each by
// whichever thread is free.
#include "cpu/attention.hpp"
#include "cpu/region.hpp"

namespace anabranch::cpu {
namespace {

constexpr int64_t SERIAL_WORK = 1 << 18;  // multiply-adds; below this, waking threads costs more than it brings
constexpr int64_t SERIAL_PACK = 1 << 16;  // elements of x: likewise
constexpr int64_t MOST_ROWS = 256;        // of x at once: widened they stay in the caches while the weights pass
constexpr int64_t BLOCK = 96;             // output columns handed to a thread at once

}  // namespace

void linear(const std::vector<Linear>& layers, int threads) {
  if (layers.empty()) return;
  const Kernels& kernels = active();
  const Linear& any = layers[0];  // rows of x, their packed form and the scratch are the same for all
  const int64_t parts = (any.rows + MOST_ROWS - 1) / MOST_ROWS, most = parts ? (any.rows + parts - 1) / parts : 0;
  std::vector<int64_t> ends;  // of each layer's output columns, one layer behind the other
  for (const Linear& l : layers) ends.push_back((ends.empty() ? 0 : ends.back()) + l.n);
  if (most * ends.back() * any.k < SERIAL_WORK) threads = 1;
  Linear part = any;
  part.rows = most;
  const size_t line = 64, wide = (kernels.linear_wide(part) * 4 + line - 1) / line * line;
  const size_t each = (kernels.linear_scratch(most) + line - 1) / line * line;
  Lease space;
  space->reserve(wide + each * size_t(threads));
  char* scratch = space->data + wide;
  for (int64_t p = 0; p < parts; ++p) {
    const int64_t begin = any.rows * p / parts, end = any.rows * (p + 1) / parts, size = int64_t(size_of(any.type));
    std::vector<Linear> some = layers;
    for (Linear& l : some) {
      l.hop = (threads - 1) * BLOCK;  // where threads that are equally fast take blocks in turn
      l.rows = end - begin;
      l.x = static_cast<const char*>(l.x) + begin * l.x_row * size;
      l.out = static_cast<char*>(l.out) + begin * l.out_row * size;
      l.wide = wide ? reinterpret_cast<float*>(space->data) : nullptr;
    }
    if (wide) {
      const int packing = some[0].rows * any.k < SERIAL_PACK ? 1 : threads;
      for_each(packing, some[0].rows, packing == 1 ? some[0].rows : PACK_ROWS,
               [&](int, int64_t from, int64_t to) { kernels.linear_pack(some[0], from, to); });
    }
    const int64_t block = threads == 1 ? std::max<int64_t>(ends.back(), 1) : BLOCK;
    for_each(threads, ends.back(), block, [&](int thread, int64_t from, int64_t to) {
      for (size_t i = 0; i < some.size(); ++i) {
        const int64_t start = ends[i] - some[i].n, first = std::max(from, start), last = std::min(to, ends[i]);
        if (first < last) kernels.linear(some[i], first - start, last - start, scratch + each * size_t(thread));
      }
    });
  }
}

}  // namespace anabranch::cpu
