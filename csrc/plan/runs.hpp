// Runs: pieces with the same visitors, put together.
#pragma once

#include <numeric>
#include <vector>

#include "plan/plan.hpp"

namespace anabranch {

// Lists of ints a key, built by counting first and filling second; one allocation for all of them.
struct Lists {
  std::vector<i32> begin, values;
  explicit Lists(size_t keys) : begin(keys + 1, 0) {}
  void count(i32 key) { ++begin[key + 1]; }
  void seal() {
    std::partial_sum(begin.begin(), begin.end(), begin.begin());
    values.resize(begin.back());
    fill_ = begin;
  }
  void add(i32 key, i32 value) { values[fill_[key]++] = value; }
  i32 size(i32 key) const { return begin[key + 1] - begin[key]; }
  const i32* first(i32 key) const { return values.data() + begin[key]; }
  const i32* last(i32 key) const { return values.data() + begin[key + 1]; }

 private:
  std::vector<i32> fill_;
};

// Which pieces make up each run, and which contexts visit it. A context without rows visits nothing.
struct Runs {
  std::vector<i32> of_piece;     // the run of each piece; -1 where nobody sees it
  std::vector<i64> length;       // tokens
  Lists visitors{0};             // contexts, by run
  Lists pieces{0};               // by run, in context order
  std::vector<i64> rows;         // query rows of all visitors
  std::vector<i32> terminal;     // the run that ends each context; -1 where there is none
  std::vector<i32> is_terminal;  // how many contexts each run ends
  i32 count() const { return static_cast<i32>(length.size()); }
};

// merge: pieces with equal visitor sets share a run; else every piece is a run of its own, in the order of the pieces.
Runs make_runs(const Contexts& contexts, bool merge);

}  // namespace anabranch
