// A plan kept and advanced in place while the topology stays.
#include <algorithm>

#include "plan/strips.hpp"

namespace anabranch {

void LivePlan::rebuild(const Tree& tree, const StepState& step, const PlanParams& params) {
  data_ = Planner::build(contexts_of(tree, step), params, &tails_);
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
  i32 *items = data_.section(kItems), *strips = data_.section(kKvStrips), *tokens = data_.section(kKvSpelled);
  i32* row_positions = data_.section(kRowPositions);
  const auto next = [](const i32* item) { return static_cast<i64>(item[kKvBegin]) + item[kKvLen]; };
  for (size_t b = 0; b < n; ++b) {
    const i32 tail = tails_.items[b];
    if (tail < 0 || step.lengths[b] != lengths_[b] + 1) return false;
    const i32* item = items + tail * kItemFields;
    const i32 position = static_cast<i32>(step.positions[b]);
    if (item[kKvLen] >= tails_.capacity[b] || !may_append(strips, data_.strip, next(item), step.slots[b], position))
      return false;
    // Items with several rows keep their row_pos_min: while positions rise, an old one only skips less than it might.
    if (position < row_positions[b]) return false;
  }
  for (size_t b = 0; b < n; ++b) {
    i32* item = items + tails_.items[b] * kItemFields;
    const i32 position = static_cast<i32>(step.positions[b]);
    append(strips, tokens, data_.strip, next(item), step.slots[b], position);
    data_.section(kLimits)[item[kRowBegin]] = ++item[kKvLen];
    row_positions[b] = position;
    item[kKvPosMax] = std::max(item[kKvPosMax], position);
    item[kRowPosMin] = position;
  }
  lengths_ = step.lengths;
  ++advances;
  return true;
}

}  // namespace anabranch
