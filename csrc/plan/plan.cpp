// Contexts → runs → absorb → ranges → strips and items, and all of it into two buffers.
#include "plan/plan.hpp"

#include <algorithm>

#include "plan/items.hpp"

namespace anabranch {

PlanData Planner::build(const Contexts& given, const PlanParams& p, Tails* tails) {
  const FixedContexts recut = p.fixed ? fixed_pieces(given, p.chunk) : FixedContexts();
  const Contexts& c = p.fixed ? recut.contexts : given;
  const i32 batch = c.batch(), num_rows = c.row_ptr.back();
  const Runs runs = make_runs(c, !p.fixed);
  const Subtrees subtrees = find_subtrees(c, runs, p);
  const Absorbed absorbed = absorb(runs, subtrees, p);
  const Ranges ranges = make_ranges(runs, absorbed, p);
  const i32 slack = tails == nullptr ? 0 : kSlack;
  Strips strips(c.page_size, ranges.count, ranges.kv_tokens + static_cast<i64>(batch) * slack);
  const std::vector<Stored> stored = store_tokens(c, runs, absorbed, ranges, slack, strips);

  PlanData out;
  const Items made = make_items(c, runs, absorbed, subtrees, ranges, p, stored, strips);
  const std::vector<Item>& items = made.items;
  const Destinations to = make_destinations(c, made);

  // Most expensive first, so that what is left at the end is small; ties keep their order.
  std::vector<i32> heads, order, place(items.size());
  for (size_t i = 0; i < items.size(); ++i)
    if (items[i].parts != kPart) heads.push_back(static_cast<i32>(i));
  // With `narrow`, the items of few rows follow in an order of their own: a GPU runs them with smaller tiles.
  const auto wide = [&](i32 i) { return static_cast<i64>(items[i].row_count) * p.group > p.narrow; };
  std::stable_sort(heads.begin(), heads.end(), [&](i32 a, i32 b) {
    return wide(a) != wide(b) ? wide(a) : items[a].cost > items[b].cost;
  });
  order.reserve(items.size());
  for (i32 head : heads)
    for (i32 i = head; i <= head + items[head].parts; ++i) {
      place[i] = static_cast<i32>(order.size());
      order.push_back(i);
    }
  if (tails != nullptr) {
    tails->items.assign(batch, -1);
    tails->capacity.assign(batch, 0);
    for (i32 b = 0; b < batch; ++b) {
      if (made.tails[b] < 0) continue;
      tails->items[b] = place[made.tails[b]];
      const i32 end = items[made.tails[b]].kv_len + slack;
      tails->capacity[b] = p.fixed ? std::min(end, p.chunk) : end;
    }
  }

  const i64 sizes[kSections] = {strips.tokens_at(),
                                strips.end() - strips.tokens_at(),
                                static_cast<i64>(items.size()) * kItemFields,
                                static_cast<i64>(made.rows.size()),
                                static_cast<i64>(made.rows.size()),
                                static_cast<i64>(made.rows.size()),
                                num_rows,
                                static_cast<i64>(to.merge_rows.size()),
                                static_cast<i64>(to.merge_ptr.size())};
  out.begin[0] = 0;
  for (int s = 0; s < kSections; ++s) out.begin[s + 1] = out.begin[s] + (sizes[s] + 3) / 4 * 4;  // 16 bytes
  out.kv = strips.buffer();
  out.strip = strips.size();
  out.work = std::shared_ptr<i32[]>(new i32[static_cast<size_t>(out.begin[kSections] - out.begin[kItems])]);
  for (size_t i = 0; i < order.size(); ++i) {
    const Item& item = items[order[i]];
    i32* field = out.section(kItems) + static_cast<i64>(i) * kItemFields;
    field[kKvBegin] = static_cast<i32>(item.kv_begin);
    field[kKvLen] = item.kv_len;
    field[kRowBegin] = item.row_begin;
    field[kRowCount] = item.row_count;
    field[kMasked] = item.masked;
    field[kKvPosMax] = item.kv_pos_max;
    field[kRowPosMin] = item.row_pos_min;
    field[kParts] = item.parts;
  }
  std::copy(made.rows.begin(), made.rows.end(), out.section(kRows));
  std::copy(made.limits.begin(), made.limits.end(), out.section(kLimits));
  std::copy(to.dest.begin(), to.dest.end(), out.section(kDest));
  for (i32 row = 0; row < num_rows; ++row)
    out.section(kRowPositions)[row] = static_cast<i32>(c.row_positions[row]);
  std::copy(to.merge_rows.begin(), to.merge_rows.end(), out.section(kMergeRows));
  std::copy(to.merge_ptr.begin(), to.merge_ptr.end(), out.section(kMergePtr));
  out.num_items = static_cast<i64>(items.size());
  out.num_partials = to.num_partials;
  out.num_merge = static_cast<i64>(to.merge_rows.size());
  out.tile_rows = ranges.tile_rows;
  out.num_runs = runs.count();
  out.num_absorbed = absorbed.count;
  out.kv_tokens = ranges.kv_tokens;
  out.num_rows = num_rows;
  out.most_parts = p.subtree > 0 ? p.parts : 0;
  out.num_wide = std::count_if(order.begin(), order.end(), wide);
  return out;
}

}  // namespace anabranch
