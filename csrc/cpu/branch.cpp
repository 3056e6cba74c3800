// Branch attention over whole tensors: tiles from the mask, units to threads, sums of dK and dV and their memory.
#include <algorithm>
#include <numeric>

#include "cpu/attention.hpp"
#include "cpu/region.hpp"

namespace anabranch::cpu {
namespace {

constexpr int64_t SERIAL_WORK = 1 << 17;     // multiply-adds; below this, waking threads costs more than it brings
constexpr size_t KEPT_BYTES = size_t(1) << 26;  // sums larger than this are not kept from call to call
constexpr int MOST_PARTS = 8;                // each costs up to T rows of sums a KV head

struct Prepared {
  BranchPlan plan;
  std::vector<int64_t> cost, latest;
  int64_t work = 0;
};

// Tiles for this call, and what `b` says about them.
Prepared prepare(Branch& b, const BranchMaskView& mask, const Kernels& kernels) {
  Prepared p;
  const int wish = kernels.branch_lanes(std::max(b.head_dim, b.v_dim)), tokens = std::max(1, wish / b.group);
  b.chunks = (b.group + wish - 1) / wish;
  p.plan = BranchPlanner(mask, tokens, b.group, kernels.branch_pad).run();
  b.tiles = p.plan.tiles.data();
  b.pieces = p.plan.pieces.data();
  b.lanes = 1;
  const int heads = (b.group + b.chunks - 1) / b.chunks;
  for (const BranchTile& t : p.plan.tiles) {
    b.lanes = std::max(b.lanes, (t.end - t.begin) * heads);
    int64_t columns = 0;
    for (int i = t.piece_begin; i < t.piece_end; ++i) columns += b.pieces[i].end - b.pieces[i].begin;
    p.cost.push_back((t.end - t.begin) * columns);
    p.work += p.cost.back() * b.num_q_heads * (b.head_dim + b.v_dim) / 2;
  }
  if (b.windowed) {
    const int64_t total = mask.segments ? mask.starts[mask.segments] : 0;
    for (int64_t t = 0; t < total; t += BRANCH_BLOCK)
      p.latest.push_back(*std::max_element(b.positions + t, b.positions + std::min(t + BRANCH_BLOCK, total)));
    b.latest = p.latest.data();
  }
  return p;
}

size_t line(size_t bytes) { return (bytes + 63) / 64 * 64; }

// Row tiles in ranges of about equal cost.
std::vector<BranchPart> cut(const Branch& b, const Prepared& p, int wanted) {
  const int64_t all = std::accumulate(p.cost.begin(), p.cost.end(), int64_t(0));
  std::vector<BranchPart> parts;
  int64_t done = 0;
  for (int i = 0; i < int(p.cost.size()); ++i) {
    if (parts.empty() || done * wanted >= all * int64_t(parts.size())) parts.push_back({i, i, INT32_MAX, 0, nullptr});
    BranchPart& part = parts.back();
    part.tile_end = i + 1;
    for (int j = b.tiles[i].piece_begin; j < b.tiles[i].piece_end; ++j) {
      part.column_begin = std::min(part.column_begin, b.pieces[j].begin);
      part.column_end = std::max(part.column_end, b.pieces[j].end);
    }
    done += p.cost[size_t(i)];
  }
  return parts;
}

}  // namespace

void branch_forward(Branch& b, const BranchMaskView& mask, int threads) {
  const Kernels& kernels = active();
  const Prepared p = prepare(b, mask, kernels);
  if (p.work * 2 < SERIAL_WORK) threads = 1;
  std::vector<int> order(p.cost.size());  // long ones first
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int x, int y) { return p.cost[size_t(x)] > p.cost[size_t(y)]; });
  const size_t each = line(kernels.branch_scratch(b.lanes, b.head_dim, b.v_dim, false));
  Lease space;
  space->reserve(each * size_t(threads));
  const int units = b.num_kv_heads * b.chunks;
  for_each(threads, int64_t(order.size()) * units, 1, [&](int thread, int64_t u, int64_t) {
    const int unit = int(u % units);
    kernels.branch_forward(b, order[size_t(u / units)], unit / b.chunks, unit % b.chunks,
                           space->data + each * size_t(thread));
  });
}

void branch_backward(Branch& b, const BranchMaskView& mask, int threads) {
  const Kernels& kernels = active();
  const Prepared p = prepare(b, mask, kernels);
  if (p.work * 5 < SERIAL_WORK) threads = 1;
  // Units enough for every thread to take two, so that a slow core does not hold up the others for long.
  const int wanted = threads == 1 ? 1 : std::min(MOST_PARTS, (2 * threads + b.num_kv_heads - 1) / b.num_kv_heads);
  std::vector<BranchPart> parts = cut(b, p, wanted);
  const size_t row = size_t(kernels.branch_row_bytes(b.head_dim, b.v_dim));
  size_t sums = 0;
  for (const BranchPart& part : parts) sums += line(size_t(part.column_end - part.column_begin) * row * b.num_kv_heads);
  const size_t each = line(kernels.branch_scratch(b.lanes, b.head_dim, b.v_dim, true));
  Lease space;
  Workspace own;
  space->reserve(each * size_t(threads) + (sums <= KEPT_BYTES ? sums : 0));
  if (sums > KEPT_BYTES) own.reserve(sums);
  char* next = sums > KEPT_BYTES ? own.data : space->data + each * size_t(threads);
  for (BranchPart& part : parts) {
    part.sums = reinterpret_cast<float*>(next);
    next += line(size_t(part.column_end - part.column_begin) * row * b.num_kv_heads);
  }
  b.parts = parts.data();
  b.num_parts = int(parts.size());
  const int heads = b.num_kv_heads;
  for_each(threads, int64_t(parts.size()) * heads, 1, [&](int thread, int64_t u, int64_t) {
    const BranchPart& part = parts[size_t(u / heads)];
    const size_t head = size_t(u % heads) * size_t(part.column_end - part.column_begin) * row;
    kernels.branch_backward(b, part, int(u % heads), part.sums + head / 4, space->data + each * size_t(thread));
  });
  const int64_t total = mask.segments ? mask.starts[mask.segments] : 0;
  for_each(threads, total, 64, [&](int, int64_t begin, int64_t end) { kernels.branch_reduce(b, begin, end); });
}

}  // namespace anabranch::cpu
