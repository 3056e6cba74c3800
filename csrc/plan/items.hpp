// Work items: tiles of the rows that see a run × ranges of its tokens; and where their results go.
#pragma once

#include "plan/ranges.hpp"
#include "plan/subtrees.hpp"

namespace anabranch {

constexpr i32 kPart = -1;

struct Item {
  i64 kv_begin;
  i32 kv_len, row_begin, row_count, masked, kv_pos_max, row_pos_min;
  i32 parts;  // so many items behind this one are parts of it; kPart: it is one
  i64 cost;
};

struct Items {
  std::vector<Item> items;
  std::vector<i32> rows, limits;  // of all items: a query row, and how many of the item's tokens it sees
  std::vector<i32> partials_of;   // [rows of the output]: items that the row is in
  std::vector<i32> tails;         // by context: the item that its next token goes to; -1 where there is none
};

Items make_items(const Contexts& contexts, const Runs& runs, const Absorbed& absorbed, const Subtrees& subtrees,
                 const Ranges& ranges, const PlanParams& params, const std::vector<Stored>& stored, const Strips& strips);

// A row with one partial is written out directly; the partials of any other row are neighbours.
struct Destinations {
  std::vector<i32> merge_rows, merge_ptr{0};
  std::vector<i32> dest;  // by entry of Items::rows: the partial it writes; -1: the output itself
  i32 num_partials = 0;
};

Destinations make_destinations(const Contexts& contexts, const Items& items);

}  // namespace anabranch
