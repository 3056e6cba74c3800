// The tree of spans behind TreeCache: who sees which tokens, and in which page slots they lie.
//
// A span is an append-only run of tokens. A branch is an ordered list of whole spans; branches forked from one another
// list the same spans. Whenever two branches would come to see different parts of one span (copy-on-write of a tail
// page, truncation, the own part of a kid at a join), the span is split in two, for every branch that lists it. So a
// span is seen whole or not at all, and the planner never has to cut.
//
// Only metadata lives here: no KV, no device, no model.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace anabranch {

using i32 = std::int32_t;
using i64 = std::int64_t;

struct OutOfPages : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct DeadBranch : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Span {
  std::vector<i32> slots;      // page · page_size + offset of each token
  std::vector<i32> positions;  // logical position of each token
  std::vector<i32> pages;      // distinct pages the slots lie in, in order; each counted once in page_refs
  std::vector<i32> users;      // branches that list this span
  i32 live = 0;                // those of them that are not merely kept
  i32 length() const { return static_cast<i32>(slots.size()); }
};

struct BranchState {
  std::vector<i32> spans;
  i64 length = 0;
  i64 position = 0;     // of the next token
  i64 fork_length = 0;  // context length at its fork: what lies beyond is its own
  i64 serial = -1;        // which branch this is: ids are reused, serials never
  i64 parent_serial = -1;
  i64 version = 0;  // changes, to a value never used before, whenever the context does: older steps are then stale
  bool alive = false;
  bool kept = false;  // only to be forked from later: what it alone holds counts as free (see Tree::keep)
};

// A shared tail page copied to a fresh one: slots [0, filled) of every layer, K and V.
struct PageCopy {
  i32 src, dst, filled;
};

// Part of what a row sees beside its own branch: tokens [start, stop) of another branch, this step's included. The row
// reads them as if it stood `offset` positions further on.
struct Read {
  i32 branch;
  i64 start, stop, offset;
};

// What one step reserved. Rows follow the order of `branches`.
struct StepState {
  std::vector<i32> branches;
  std::vector<i64> versions;  // of the branches, right after the step
  std::vector<i64> lengths;   // likewise
  std::vector<i32> row_ptr;   // [branches + 1]
  std::vector<i32> slots;     // [rows]
  std::vector<i64> positions;  // [rows]
  std::vector<PageCopy> copies;
  i64 topology = 0;  // Tree::topology() right after the step
  // Views: what row i reads is reads[read_ptr[i] : read_ptr[i + 1]]. Both are empty where no row reads another branch.
  std::vector<i32> read_ptr;
  std::vector<Read> reads;
  std::vector<i32> read_branches;  // those that are read, once each
  std::vector<i64> read_versions;  // right after the step
};

// What live branches hold. Pages that only kept branches hold count as free; `pages_kept` says how many these are.
struct Usage {
  i64 pages_total, pages_free, tokens_logical, tokens_physical, pages_copied, pages_kept;
};

class Tree {
 public:
  Tree(i32 num_pages, i32 page_size);

  i32 new_branch();
  std::vector<i32> fork(i32 branch, i32 n);
  // counts[i] new rows for branches[i]; positions[i] is empty (go on from the branch's position) or counts[i] long.
  StepState step(const std::vector<i32>& branches, const std::vector<i32>& counts,
                 const std::vector<std::vector<i64>>& positions);
  void join(i32 trunk, const std::vector<i32>& kids);
  // `branch`, which has written nothing since its fork, sees the first `count` of a sibling's own tokens as well; they
  // are shared like what it was forked with.
  void share(i32 branch, i32 sibling, i64 count);
  void truncate(i32 branch, i64 length);
  void release(i32 branch);
  // From now on the branch is there to be forked from, truncated or released, and takes no rows.
  void keep(i32 branch);
  // Of the pages that hold a branch's first `length` tokens, those that count as free: forking from there takes them.
  i64 kept_pages(i32 branch, i64 length) const;
  // Pages that the last step needed which ran out of them.
  i64 pages_needed() const { return pages_needed_; }

  const BranchState& at(i32 branch) const;  // throws DeadBranch
  const BranchState& peek(i32 branch) const { return branches_[branch]; }
  const Span& span(i32 id) const { return spans_[id]; }
  i64 topology() const { return topology_; }
  i32 page_size() const { return page_size_; }
  i32 num_pages() const { return num_pages_; }
  Usage usage() const;
  std::vector<i32> slots(i32 branch) const;      // context order
  std::vector<i64> positions(i32 branch) const;  // likewise
  // Throws std::logic_error unless reference counts, free list, spans and branches agree.
  void check() const;

 private:
  // How a branch gets its next slot.
  enum class Tail : std::uint8_t {
    kInPlace,   // go on in the last span, whose page is its own (or full, or the branch is empty)
    kNewSpan,   // last span is shared but its page is full: a fresh page, nothing copied
    kCopyPage,  // last span's page is part-filled and shared: copy it, then go on in the copy
  };
  Tail tail_of(const BranchState& b, const std::vector<std::pair<i32, i32>>& leaving) const;
  i32 tail_room(const BranchState& b) const;  // free slots after the last token in its page
  i32 take_page();
  void drop_page(i32 page);
  i32 new_span();
  void add_user(i32 span, i32 branch);
  void drop_user(i32 span, i32 branch);
  void lose_live(i32 span);  // one live user less
  void split(i32 span, i32 at);              // [0, at) keeps the id; every user lists the rest right behind it
  void cut_at(i32 branch, i64 length);       // makes `length` a span boundary of the branch
  i32 take_branch();
  void free_branch(i32 branch);
  BranchState& get(i32 branch);

  i32 num_pages_, page_size_;
  std::vector<i32> page_refs_;   // number of spans that hold the page
  std::vector<i32> page_live_;   // number of spans with live users that hold the page
  std::vector<i32> free_pages_;  // a stack
  std::vector<i32> freed_in_step_;  // not handed out before the step's page copies have been read
  bool in_step_ = false;
  std::vector<Span> spans_;
  std::vector<i32> free_spans_;
  std::vector<BranchState> branches_;
  std::vector<i32> free_branches_;
  i64 next_serial_ = 0;
  i64 clock_ = 0;
  i64 topology_ = 0;                   // rises whenever a plan may no longer just be advanced
  i64 pages_copied_ = 0;
  i64 pages_kept_ = 0;    // held by spans without live users alone
  i64 pages_needed_ = 0;
  i64 tokens_logical_ = 0;
  i64 tokens_physical_ = 0;
};

}  // namespace anabranch
