// The planner: contexts (lists of token pieces) → work items for the kernels.
//
// Pieces with the same visitors are put into one *run*, wherever they stand in the contexts: fewer, longer runs make
// fewer partial results. A run keeps its tokens in context order, so that what a row must not see yet is a suffix. It is
// cut into items: a tile of the rows that see it × a range of its tokens. Linear in pieces listed + pages + rows of
// all runs. (A tree's spans know each token's slot and position, which are read once.)
//
// The tokens of an item lie in strips (strips.hpp): a page's tokens that lie side by side take one entry.
//
// The layout of the arrays is the contract in docs/kernel_contract.md.
#pragma once

#include <memory>
#include <vector>

#include "plan/layout.hpp"
#include "tree/tree.hpp"

namespace anabranch {

// What the planner is told: B contexts, each a list of pieces and its number of query rows. The rows of a context are
// its last tokens: row j of n sees everything but the last n − 1 − j tokens.
//
// The planner relies on this: a context lists a piece once, and two contexts list the pieces they share in the same
// order. Block tables: pieces come by column, then by place in the page. Trees: a list grows at its end only, and a span
// enters it in one of three ways: with the step that makes it, by a fork (a copy of the list), or by the join of the one
// branch whose own it is, in that branch's order, after which that branch is gone. (tests/test_plan_fuzz.py: same_order)
// Order matters for what a row must not see yet. A context of one row sees all of itself, so its order is free: views
// (csrc/plan/views.cpp) are contexts of one row.
struct Contexts {
  // Tokens that are seen together. Either the slot and the position of each are given, or pages: token i lies in page
  // pages[(offset + i) / page_size], and its position is `position` + i.
  struct Piece {
    i32 length;
    const i32 *slots, *positions;
    const i32* pages = nullptr;
    i32 offset = 0, position = 0;
  };
  i32 page_size = 1;
  std::vector<Piece> pieces;
  std::vector<i32> piece_ptr;    // [B + 1]
  std::vector<i32> piece_ids;    // piece_ids[piece_ptr[b] : piece_ptr[b+1]] in context order
  std::vector<i32> row_ptr;      // [B + 1]
  std::vector<i64> row_positions;  // [rows]
  // A row that reads spans under several position offsets is several query rows here, one an offset. Both are empty where
  // no row does; else the row of the step that query row i belongs to, and how many positions it is turned on.
  std::vector<i32> row_of;
  std::vector<i64> row_offsets;
  i32 num_out() const { return row_of.empty() ? row_ptr.back() : row_of.back() + 1; }
  i32 out_of(i32 row) const { return row_of.empty() ? row : row_of[row]; }
  i32 batch() const { return static_cast<i32>(row_ptr.size()) - 1; }
  i32 rows(i32 b) const { return row_ptr[b + 1] - row_ptr[b]; }
};

struct PlanParams {
  i32 group;         // query heads a KV head
  i32 tile;          // packed rows (rows × group) an item
  i32 chunk;         // grain of token ranges
  i32 parallelism;   // items × KV heads a run should at least be split into
  i32 num_kv_heads;
  i32 elem_size;     // bytes of one KV element
  i32 narrow = 0;    // items of at most this many packed rows come after all others (0: one order for all)
  i32 subtree = 0;     // packed rows of an item that holds a subtree, at most (0: there are no such items)
  i32 parts = 0;       // of such an item, at most (0: any number)
  bool fixed = false;  // a row's token ranges depend on its own context alone: borders at multiples of `chunk`
  bool operator==(const PlanParams& o) const {
    return group == o.group && tile == o.tile && chunk == o.chunk && parallelism == o.parallelism &&
           num_kv_heads == o.num_kv_heads && elem_size == o.elem_size && narrow == o.narrow && subtree == o.subtree &&
           parts == o.parts && fixed == o.fixed;
  }
};

// Slots and positions of a piece's tokens, one by one.
void spell(const Contexts::Piece& piece, i32 page_size, i32* slots, i32* positions);

// The same contexts, cut at multiples of `grain` tokens; pieces are in the order of those borders.
struct FixedContexts {
  Contexts contexts;
  std::vector<i32> slots, positions;  // what the pieces point into
};
FixedContexts fixed_pieces(const Contexts& contexts, i32 grain);

struct PlanData {
  std::shared_ptr<i32[]> kv, work;  // sections before kItems, and the others; not initialised where nothing is written
  i64 begin[kSections + 1];  // where each section begins, were `work` behind `kv`
  i32 strip = 1;             // tokens of a strip
  i32* section(Section s) const { return s < kItems ? kv.get() + begin[s] : work.get() + begin[s] - begin[kItems]; }
  i64 num_items = 0, num_partials = 0, num_merge = 0, tile_rows = 0, num_runs = 0, num_absorbed = 0, kv_tokens = 0,
      num_rows = 0, num_wide = 0, most_parts = 0;
};

constexpr i32 kSlack = 64;  // tokens that a tail may grow by in place

// Where each context's next token goes in a plan.
struct Tails {
  std::vector<i32> items;     // −1 where there is none
  std::vector<i32> capacity;  // the kv_len up to which the item may grow in place
};

class Planner {
 public:
  // Free places are left behind the tokens of single-row tails, so that tokens can be appended.
  static PlanData build(const Contexts& contexts, const PlanParams& params, Tails* tails);
};

// A plan that is kept while the topology stays: each further decode step appends one token to each tail.
class LivePlan {
 public:
  // True when `data` now describes `step`.
  bool advance(const StepState& step, const PlanParams& params);
  void rebuild(const Tree& tree, const StepState& step, const PlanParams& params);
  const PlanData& data() const { return data_; }
  const PlanParams& params() const { return params_; }
  i64 build = 0, advances = 0;  // build: set by the owner, a number for each rebuild

 private:
  PlanParams params_{};
  PlanData data_;
  std::vector<i32> branches_;
  std::vector<i64> lengths_;
  i64 topology_ = -1;
  Tails tails_;
};

Contexts contexts_of(const Tree& tree, const StepState& step);
Contexts contexts_of_views(const Tree& tree, const StepState& step);  // of a step with `read_ptr`

// Sequences in a user's own page pool, their pages one after another.
struct Tables {
  std::vector<i32> pages;
  std::vector<i64> begin;  // [batch + 1]: sequence b has pages[begin[b] : begin[b + 1]]
  std::vector<i64> lengths, queries;  // [batch], tokens and query rows
  i32 page_size = 1, max_page = -1;
  i64 batch() const { return static_cast<i64>(lengths.size()); }
};
// Sharing is found from the tables: the same page in the same column is the same tokens. The pieces point into them.
Contexts contexts_of_tables(const Tables& tables);

}  // namespace anabranch
