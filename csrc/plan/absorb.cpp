#include "plan/absorb.hpp"

namespace anabranch {

// The absorb rule, in bytes (head_dim cancels). A run of L tokens seen by R rows costs, as an item of its own, one
// partial a row and query head: about 8·R·group written and read. Read again inside each of the T runs that end
// its visitors' contexts it costs 2·elem_size·L·(T − 1) more than once.
Absorbed absorb(const Runs& runs, const Subtrees& subtrees, const PlanParams& p) {
  const i32 n = runs.count();
  Absorbed out{std::vector<char>(n, 0), runs.length};
  if (p.fixed) return out;
  std::vector<i32> times(n, 0);
  std::vector<i32> ends;
  for (i32 r = 0; r < n; ++r) {
    if (runs.is_terminal[r]) continue;
    if (subtrees.fused[r]) continue;
    const i64 once = 2ll * p.elem_size * runs.length[r], partials = 8ll * runs.rows[r] * p.group;
    if (once > partials) continue;
    ends.clear();
    for (const i32* b = runs.visitors.first(r); b != runs.visitors.last(r); ++b)
      if (times[runs.terminal[*b]]++ == 0) ends.push_back(runs.terminal[*b]);
    bool contained = true;  // every visitor of such a run visits the absorbed one too
    for (i32 t : ends) contained &= times[t] == runs.visitors.size(t);
    for (i32 t : ends) contained &= !subtrees.fused[t];
    for (i32 t : ends) times[t] = 0;
    if (!contained || once * (static_cast<i64>(ends.size()) - 1) > partials) continue;
    out.absorbed[r] = 1;
    ++out.count;
    for (i32 t : ends) out.length[t] += runs.length[r];
  }
  return out;
}

}  // namespace anabranch
