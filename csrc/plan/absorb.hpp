// Short runs that are cheaper to read several times than to have partial results of their own.
#pragma once

#include "plan/subtrees.hpp"

namespace anabranch {

struct Absorbed {
  std::vector<char> absorbed;  // by run: it is read as part of the runs that end its visitors' contexts
  std::vector<i64> length;     // by run: tokens, with those of the runs it absorbed
  i64 count = 0;
};

Absorbed absorb(const Runs& runs, const Subtrees& subtrees, const PlanParams& params);

}  // namespace anabranch
