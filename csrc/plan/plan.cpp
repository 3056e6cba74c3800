// Contexts → runs → absorb → ranges → items, and all of it into one buffer.
#include "plan/plan.hpp"

#include <algorithm>
#include <numeric>

#include "plan/items.hpp"

namespace anabranch {

PlanData Planner::build(const Contexts& given, const PlanParams& p, i32 slack, std::vector<i32>* tail_items,
                        std::vector<i32>* tail_capacity) {
  const FixedContexts recut = p.fixed ? fixed_pieces(given, p.chunk) : FixedContexts();
  const Contexts& c = p.fixed ? recut.contexts : given;
  const i32 batch = c.batch(), num_rows = c.row_ptr.back();
  const Runs runs = make_runs(c, !p.fixed);
  const Absorbed absorbed = absorb(runs, p);
  const Ranges ranges = make_ranges(runs, absorbed, p, slack);

  PlanData out;
  const auto aligned = [](i64 n) { return (n + 3) / 4 * 4; };  // 16 bytes
  const i64 capacity = 2 * aligned(ranges.kv_total) + aligned(ranges.most_items * kItemFields) +
                       3 * aligned(ranges.most_entries) + 2 * aligned(num_rows) + aligned(num_rows + 1);
  out.buffer = std::shared_ptr<i32[]>(new i32[capacity]);
  i32* const base = out.buffer.get();
  i32* const kv_slots = base;
  i32* const kv_positions = base + aligned(ranges.kv_total);
  store_tokens(c, runs, absorbed, ranges, kv_slots, kv_positions);
  const Items made = make_items(c, runs, absorbed, ranges, p, kv_positions);
  const std::vector<Item>& items = made.items;
  const Destinations to = make_destinations(c, made);

  // Most expensive first, so that what is left at the end is small; ties keep their order.
  std::vector<i32> order(items.size()), place(items.size());
  std::iota(order.begin(), order.end(), 0);
  // With `narrow`, the items of few rows follow in an order of their own: a GPU runs them with smaller tiles.
  const auto wide = [&](i32 i) { return static_cast<i64>(items[i].row_count) * p.group > p.narrow; };
  std::stable_sort(order.begin(), order.end(), [&](i32 a, i32 b) {
    return wide(a) != wide(b) ? wide(a) : items[a].cost > items[b].cost;
  });
  for (size_t i = 0; i < order.size(); ++i) place[order[i]] = static_cast<i32>(i);
  if (tail_items != nullptr) {
    tail_items->assign(batch, -1);
    tail_capacity->assign(batch, 0);
    for (i32 b = 0; b < batch; ++b) {
      if (made.tails[b] < 0) continue;
      (*tail_items)[b] = place[made.tails[b]];
      const i32 end = items[made.tails[b]].kv_len + slack;
      (*tail_capacity)[b] = p.fixed ? std::min(end, p.chunk) : end;
    }
  }

  const i64 sizes[kSections] = {ranges.kv_total,
                                ranges.kv_total,
                                static_cast<i64>(items.size()) * kItemFields,
                                static_cast<i64>(made.rows.size()),
                                static_cast<i64>(made.rows.size()),
                                static_cast<i64>(made.rows.size()),
                                num_rows,
                                static_cast<i64>(to.merge_rows.size()),
                                static_cast<i64>(to.merge_ptr.size())};
  out.begin[0] = 0;
  for (int s = 0; s < kSections; ++s) out.begin[s + 1] = out.begin[s] + aligned(sizes[s]);
  for (size_t i = 0; i < order.size(); ++i) {
    const Item& item = items[order[i]];
    i32* field = base + out.begin[kItems] + static_cast<i64>(i) * kItemFields;
    field[kKvBegin] = static_cast<i32>(item.kv_begin);
    field[kKvLen] = item.kv_len;
    field[kRowBegin] = item.row_begin;
    field[kRowCount] = item.row_count;
    field[kMasked] = item.masked;
    field[kKvPosMax] = item.kv_pos_max;
    field[kRowPosMin] = item.row_pos_min;
    field[kRowPosMin + 1] = 0;
  }
  std::copy(made.rows.begin(), made.rows.end(), base + out.begin[kRows]);
  std::copy(made.limits.begin(), made.limits.end(), base + out.begin[kLimits]);
  std::copy(to.dest.begin(), to.dest.end(), base + out.begin[kDest]);
  for (i32 row = 0; row < num_rows; ++row)
    base[out.begin[kRowPositions] + row] = static_cast<i32>(c.row_positions[row]);
  std::copy(to.merge_rows.begin(), to.merge_rows.end(), base + out.begin[kMergeRows]);
  std::copy(to.merge_ptr.begin(), to.merge_ptr.end(), base + out.begin[kMergePtr]);
  out.num_items = static_cast<i64>(items.size());
  out.num_partials = to.num_partials;
  out.num_merge = static_cast<i64>(to.merge_rows.size());
  out.tile_rows = ranges.tile_rows;
  out.num_runs = runs.count();
  out.num_absorbed = absorbed.count;
  out.kv_tokens = ranges.kv_tokens;
  out.num_rows = num_rows;
  out.num_wide = std::count_if(order.begin(), order.end(), wide);
  return out;
}

}  // namespace anabranch
