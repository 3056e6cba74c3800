// Linear layers over whole tensors: x widened once, then blocks of output columns, each by whichever thread is free.
#include "cpu/attention.hpp"
#include "cpu/region.hpp"

namespace anabranch::cpu {
namespace {

constexpr int64_t SERIAL_WORK = 1 << 18;  // multiply-adds; below this, waking threads costs more than it brings
constexpr int64_t MOST_ROWS = 256;        // of x at once: widened they stay in the caches while the weights pass
constexpr int64_t BLOCK = 96;             // output columns handed to a thread at once

}  // namespace

void linear(Linear& all, int threads) {
  const Kernels& kernels = active();
  const int64_t parts = (all.rows + MOST_ROWS - 1) / MOST_ROWS, most = parts ? (all.rows + parts - 1) / parts : 0;
  if (most * all.n * all.k < SERIAL_WORK) threads = 1;
  const size_t line = 64, wide = (kernels.linear_wide(most, all.k) * 4 + line - 1) / line * line;
  const size_t each = (kernels.linear_scratch(most) + line - 1) / line * line;
  Lease space;
  space->reserve(wide + each * size_t(threads));
  char* scratch = space->data + wide;
  for (int64_t p = 0; p < parts; ++p) {
    const int64_t begin = all.rows * p / parts, end = all.rows * (p + 1) / parts, size = int64_t(size_of(all.type));
    Linear l = all;
    l.rows = end - begin;
    l.x = static_cast<const char*>(all.x) + begin * all.x_row * size;
    l.out = static_cast<char*>(all.out) + begin * all.out_row * size;
    l.wide = reinterpret_cast<float*>(space->data);
    kernels.linear_pack(l);
    for_each(threads, l.n, threads == 1 ? std::max<int64_t>(l.n, 1) : BLOCK, [&](int thread, int64_t from, int64_t to) {
      kernels.linear(l, from, to, scratch + each * size_t(thread));
    });
  }
}

}  // namespace anabranch::cpu
