#include "plan/table_plans.hpp"

#include <algorithm>

#include "plan/strips.hpp"

namespace anabranch {

bool TablePlans::grow_into(const Tables& now) const {
  const Tables& t = tables_;
  if (now.batch() != t.batch() || now.page_size != t.page_size || now.queries != t.queries) return false;
  for (i64 b = 0; b < t.batch(); ++b)
    if (t.queries[b] > 1 || now.lengths[b] < t.lengths[b] || now.lengths[b] > t.lengths[b] + kSlack) return false;
  for (i64 b = 0; b < t.batch(); ++b)
    if (!std::equal(t.pages.begin() + t.begin[b], t.pages.begin() + t.begin[b + 1], now.pages.begin() + now.begin[b]))
      return false;
  return true;
}

void TablePlans::follow(const TablePlans& before) {
  for (const Kept& old : before.kept_) {
    if (*old.newest != old.age) continue;  // its strips belong to another one by now
    Kept plan = old;
    if (!advance(plan, before.tables_)) continue;
    *plan.newest = ++plan.age;
    plan.followed = true;
    kept_.push_back(std::move(plan));
  }
}

bool TablePlans::advance(Kept& plan, const Tables& before) const {
  PlanData& data = plan.data;
  const i32* items = data.section(kItems);
  for (i64 b = 0; b < tables_.batch(); ++b) {
    const i64 more = tables_.lengths[b] - before.lengths[b];
    if (more == 0) continue;
    const i32 tail = plan.tails.items[b];
    if (tail < 0 || items[tail * kItemFields + kKvLen] + more > plan.tails.capacity[b]) return false;
  }
  const i64 size = data.begin[kSections] - data.begin[kItems];
  const std::shared_ptr<i32[]> work(new i32[static_cast<size_t>(size)]);
  std::copy_n(data.work.get(), size, work.get());
  data.work = work;
  plan.appended.clear();
  i32 *strips = data.section(kKvStrips), *tokens = data.section(kKvSpelled);
  i32 row = 0;
  for (i64 b = 0; b < tables_.batch(); row += static_cast<i32>(tables_.queries[b++])) {
    if (tables_.lengths[b] == before.lengths[b]) continue;
    i32* item = data.section(kItems) + plan.tails.items[b] * kItemFields;
    for (i64 i = before.lengths[b]; i < tables_.lengths[b]; ++i) {
      const i32 page = tables_.pages[tables_.begin[b] + i / tables_.page_size];
      const i32 slot = page * tables_.page_size + static_cast<i32>(i % tables_.page_size);
      const i32* changed = append(strips, tokens, data.strip, static_cast<i64>(item[kKvBegin]) + item[kKvLen]++, slot,
                                  static_cast<i32>(i));
      if (changed) plan.appended.push_back({static_cast<i32>((changed - data.kv.get()) / 2), slot, static_cast<i32>(i)});
    }
    const i32 last = static_cast<i32>(tables_.lengths[b]) - 1;
    data.section(kLimits)[item[kRowBegin]] = item[kKvLen];
    data.section(kRowPositions)[row] = last;
    item[kKvPosMax] = std::max(item[kKvPosMax], last);
    item[kRowPosMin] = last;  // items with several rows keep theirs, which only skips less than it might
  }
  return true;
}

const PlanData& TablePlans::plan(const PlanParams& params) {
  for (const Kept& kept : kept_)
    if (kept.params == params) return kept.data;
  Kept made;
  made.params = params;
  made.newest = std::make_shared<i64>(0);
  made.data = Planner::build(contexts(), params, &made.tails);
  kept_.push_back(std::move(made));
  return kept_.back().data;
}

const std::vector<TablePlans::Appended>* TablePlans::appended(const PlanParams& params) const {
  for (const Kept& kept : kept_)
    if (kept.params == params && kept.followed) return &kept.appended;
  return nullptr;
}

const Contexts& TablePlans::contexts() {
  if (!contexts_) contexts_ = std::make_unique<Contexts>(contexts_of_tables(tables_));
  return *contexts_;
}

}  // namespace anabranch
