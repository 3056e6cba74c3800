// Where the tokens of each run are stored, and how the run is cut into ranges of tokens.
#pragma once

#include "plan/absorb.hpp"

namespace anabranch {

struct Ranges {
  std::vector<i64> begin;  // by run: its first place in kv_slots and kv_positions
  std::vector<i64> split;  // by run: tokens of an item
  i64 kv_total = 0;        // places, free ones behind tails included
  i64 kv_tokens = 0;       // tokens stored
  i64 most_items = 0, most_entries = 0;  // bounds on the items, and on the rows of all items
  i32 tile_rows = 1;
};

Ranges make_ranges(const Runs& runs, const Absorbed& absorbed, const PlanParams& params, i32 slack);

// Writes the tokens of every run in context order.
void store_tokens(const Contexts& contexts, const Runs& runs, const Absorbed& absorbed, const Ranges& ranges,
                  i32* kv_slots, i32* kv_positions);

}  // namespace anabranch
