// A plan kept and advanced in place while the topology stays.
#include <algorithm>

#include "plan/plan.hpp"

namespace anabranch {

namespace {
constexpr i32 kSlack = 64;  // steps a steady plan lasts
}

void LivePlan::rebuild(const Tree& tree, const StepState& step, const PlanParams& params) {
  data_ = Planner::build(contexts_of(tree, step), params, kSlack, &tail_items_, &tail_capacity_);
  params_ = params;
  branches_ = step.branches;
  lengths_ = step.lengths;
  topology_ = step.read_ptr.empty() ? step.topology : -1;  // a plan of views is never advanced
}

bool LivePlan::advance(const StepState& step, const PlanParams& params) {
  const size_t n = step.branches.size();
  if (!step.read_ptr.empty() || step.topology != topology_ || !(params == params_) || step.branches != branches_ ||
      step.slots.size() != n)
    return false;
  i32* base = data_.buffer.get();
  i32* items = base + data_.begin[kItems];
  for (size_t b = 0; b < n; ++b) {
    const i32 tail = tail_items_[b];
    if (tail < 0 || step.lengths[b] != lengths_[b] + 1 || items[tail * kItemFields + kKvLen] >= tail_capacity_[b])
      return false;
    // Items with several rows keep their row_pos_min: while positions rise, an old one only skips less than it might.
    if (step.positions[b] < base[data_.begin[kRowPositions] + static_cast<i64>(b)]) return false;
  }
  for (size_t b = 0; b < n; ++b) {
    i32* item = items + tail_items_[b] * kItemFields;
    const i32 position = static_cast<i32>(step.positions[b]);
    const i64 at = static_cast<i64>(item[kKvBegin]) + item[kKvLen]++;
    base[data_.begin[kKvSlots] + at] = step.slots[b];
    base[data_.begin[kKvPositions] + at] = position;
    base[data_.begin[kLimits] + item[kRowBegin]] = item[kKvLen];
    base[data_.begin[kRowPositions] + static_cast<i64>(b)] = position;
    item[kKvPosMax] = std::max(item[kKvPosMax], position);
    item[kRowPosMin] = position;
  }
  lengths_ = step.lengths;
  ++advances;
  return true;
}

}  // namespace anabranch
