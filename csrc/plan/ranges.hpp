// How each run is cut into ranges of tokens, and where those are stored.
#pragma once

#include "plan/absorb.hpp"
#include "plan/strips.hpp"

namespace anabranch {

struct Ranges {
  std::vector<i64> split;  // by run: tokens of a range
  std::vector<i64> first;  // by run: its first range
  i64 count = 0;           // ranges
  i64 kv_tokens = 0;       // tokens of all of them
  i64 most_items = 0, most_entries = 0;  // bounds on the items, and on the rows of all items
  i32 tile_rows = 1;
};

Ranges make_ranges(const Runs& runs, const Absorbed& absorbed, const PlanParams& params);

// Writes the tokens of every range, in context order; `slack` free places behind those of a tail.
std::vector<Stored> store_tokens(const Contexts& contexts, const Runs& runs, const Absorbed& absorbed,
                                 const Ranges& ranges, i32 slack, Strips& strips);

}  // namespace anabranch
