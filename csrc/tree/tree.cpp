#include "tree/tree.hpp"

#include <algorithm>

namespace anabranch {

namespace {
constexpr i64 kMaxPosition = 2147483647;

std::string pages_message(i64 need, i64 have, i64 total) {
  return "out of pages: " + std::to_string(need) + " needed, " + std::to_string(have) + " of " + std::to_string(total) +
         " free; nothing was changed. Release or truncate branches, or make the cache with a larger num_pages";
}
}  // namespace

Tree::Tree(i32 num_pages, i32 page_size) : num_pages_(num_pages), page_size_(page_size), page_refs_(num_pages, 0), page_live_(num_pages, 0) {
  free_pages_.reserve(num_pages);
  for (i32 p = num_pages - 1; p >= 0; --p) free_pages_.push_back(p);  // page 0 is handed out first
}

BranchState& Tree::get(i32 branch) {
  BranchState& b = branches_.at(branch);
  if (!b.alive) throw DeadBranch("the branch was released or joined; fork or make a new one");
  return b;
}

const BranchState& Tree::at(i32 branch) const { return const_cast<Tree*>(this)->get(branch); }

i32 Tree::take_branch() {
  if (free_branches_.empty()) {
    branches_.emplace_back();
    return static_cast<i32>(branches_.size()) - 1;
  }
  const i32 id = free_branches_.back();
  free_branches_.pop_back();
  return id;
}

i32 Tree::new_branch() {
  const i32 id = take_branch();
  BranchState& b = branches_[id];
  b.alive = true;
  b.serial = next_serial_++;
  b.version = ++clock_;
  return id;
}

std::vector<i32> Tree::fork(i32 branch, i32 n) {
  get(branch);
  std::vector<i32> kids;
  kids.reserve(n);
  for (i32 i = 0; i < n; ++i) {
    const i32 id = take_branch();
    BranchState& kid = branches_[id];
    kid = branches_[branch];
    kid.serial = next_serial_++;
    kid.parent_serial = branches_[branch].serial;
    kid.fork_length = kid.length;
    kid.version = ++clock_;
    kid.kept = false;
    for (i32 s : kid.spans) add_user(s, id);
    tokens_logical_ += kid.length;
    kids.push_back(id);
  }
  ++topology_;
  return kids;
}

i32 Tree::take_page() {
  const i32 page = free_pages_.back();
  free_pages_.pop_back();
  page_refs_[page] = page_live_[page] = 1;
  return page;
}

void Tree::drop_page(i32 page) {
  if (--page_refs_[page] > 0) return;
  --pages_kept_;  // whoever held it last has left before
  (in_step_ ? freed_in_step_ : free_pages_).push_back(page);
}

i32 Tree::new_span() {
  if (free_spans_.empty()) {
    spans_.emplace_back();
    return static_cast<i32>(spans_.size()) - 1;
  }
  const i32 id = free_spans_.back();
  free_spans_.pop_back();
  return id;
}

void Tree::add_user(i32 id, i32 branch) {
  Span& s = spans_[id];
  s.users.push_back(branch);
  if (branches_[branch].kept || s.live++ > 0) return;
  for (i32 page : s.pages)
    if (page_live_[page]++ == 0) --pages_kept_;
  tokens_physical_ += s.length();
}

void Tree::lose_live(i32 id) {
  Span& s = spans_[id];
  if (--s.live > 0) return;
  for (i32 page : s.pages)
    if (--page_live_[page] == 0) ++pages_kept_;
  tokens_physical_ -= s.length();
}

void Tree::drop_user(i32 id, i32 branch) {
  Span& s = spans_[id];
  auto it = std::find(s.users.begin(), s.users.end(), branch);
  *it = s.users.back();
  s.users.pop_back();
  if (!branches_[branch].kept) lose_live(id);
  if (!s.users.empty()) return;
  for (i32 page : s.pages) drop_page(page);
  s = Span();
  free_spans_.push_back(id);
}

void Tree::split(i32 id, i32 at) {
  const i32 rest_id = new_span();
  Span& head = spans_[id];
  Span& rest = spans_[rest_id];
  rest.slots.assign(head.slots.begin() + at, head.slots.end());
  rest.positions.assign(head.positions.begin() + at, head.positions.end());
  rest.users = head.users;
  rest.live = head.live;
  head.slots.resize(at);
  head.positions.resize(at);
  const i32 last_page = head.slots.back() / page_size_;
  const i32 first_page = rest.slots.front() / page_size_;
  const auto last = std::find(head.pages.begin(), head.pages.end(), last_page);
  const auto first = last_page == first_page ? last : last + 1;
  rest.pages.assign(first, head.pages.end());
  head.pages.erase(last + 1, head.pages.end());
  if (last_page == first_page) {  // both halves hold the page they are cut in
    ++page_refs_[last_page];
    if (head.live > 0) ++page_live_[last_page];
  }
  for (i32 user : rest.users) {
    std::vector<i32>& list = branches_[user].spans;
    list.insert(std::find(list.begin(), list.end(), id) + 1, rest_id);
  }
  ++topology_;
}

void Tree::cut_at(i32 branch, i64 length) {
  i64 seen = branches_[branch].length;
  const std::vector<i32>& list = branches_[branch].spans;
  for (i64 i = static_cast<i64>(list.size()) - 1; i >= 0 && seen > length; --i) {
    const i64 begin = seen - spans_[list[i]].length();
    if (begin < length) {
      split(list[i], static_cast<i32>(length - begin));
      return;
    }
    seen = begin;
  }
}

i32 Tree::tail_room(const BranchState& b) const {
  if (b.spans.empty()) return 0;
  return page_size_ - 1 - spans_[b.spans.back()].slots.back() % page_size_;
}

Tree::Tail Tree::tail_of(const BranchState& b, const std::vector<std::pair<i32, i32>>& leaving) const {
  if (b.spans.empty()) return Tail::kInPlace;
  const i32 id = b.spans.back();
  const Span& s = spans_[id];
  // Branches earlier in the same step that will have copied this tail by then no longer share it.
  i32 users = static_cast<i32>(s.users.size());
  for (const auto& [span, count] : leaving)
    if (span == id) users -= count;
  const bool own = users == 1;
  if (tail_room(b) == 0) return own ? Tail::kInPlace : Tail::kNewSpan;
  if (!own) return Tail::kCopyPage;
  // The page is ours alone when every span that holds it is one of ours and nobody else's.
  const i32 page = s.slots.back() / page_size_;
  i32 ours = 1;
  for (i64 i = static_cast<i64>(b.spans.size()) - 2; i >= 0; --i) {
    const Span& before = spans_[b.spans[i]];
    if (before.pages.back() != page || before.users.size() != 1) break;
    ++ours;
  }
  return ours == page_refs_[page] ? Tail::kInPlace : Tail::kCopyPage;
}

StepState Tree::step(const std::vector<i32>& ids, const std::vector<i32>& counts,
                     const std::vector<std::vector<i64>>& positions) {
  const size_t n = ids.size();
  // 1. Decide for all branches, and count pages, before anything changes.
  std::vector<Tail> tails(n);
  std::vector<std::pair<i32, i32>> leaving;  // (shared tail span, branches of this step that copy it); short
  std::vector<i32> leaving_at;               // index into `leaving` by span, sparse: built only when something is copied
  i64 need = 0, rows = 0;
  for (size_t i = 0; i < n; ++i) {
    const BranchState& b = get(ids[i]);
    if (b.kept) throw std::invalid_argument("step: a branch is kept; fork it, and step the fork");
    static const std::vector<std::pair<i32, i32>> kNone;
    const i32 tail_span = b.spans.empty() ? -1 : b.spans.back();
    i32 at = -1;
    if (tail_span >= 0 && static_cast<size_t>(tail_span) < leaving_at.size()) at = leaving_at[tail_span];
    tails[i] = at < 0 ? tail_of(b, kNone) : tail_of(b, {leaving[at]});
    i64 room = tail_room(b);
    if (tails[i] == Tail::kNewSpan) room = 0;
    if (tails[i] == Tail::kCopyPage) {
      ++need;
      if (at < 0) {
        if (leaving_at.size() < spans_.size()) leaving_at.resize(spans_.size(), -1);
        at = leaving_at[tail_span] = static_cast<i32>(leaving.size());
        leaving.emplace_back(tail_span, 0);
      }
      ++leaving[at].second;
    }
    need += std::max<i64>(0, (counts[i] - room + page_size_ - 1) / page_size_);
    rows += counts[i];
    const i64 last = positions[i].empty() ? b.position + counts[i] - 1
                                          : *std::max_element(positions[i].begin(), positions[i].end());
    if (last >= kMaxPosition) throw std::invalid_argument("positions: " + std::to_string(last) + " exceeds 2^31 − 2");
  }
  pages_needed_ = need;
  if (need > static_cast<i64>(free_pages_.size()))
    throw OutOfPages(pages_message(need, static_cast<i64>(free_pages_.size()), num_pages_));

  // 2. Carry it out. A page freed on the way may still be the source of a copy, so it is not handed out in this step.
  in_step_ = true;
  StepState out;
  out.branches = ids;
  out.versions.reserve(n);
  out.row_ptr.reserve(n + 1);
  out.row_ptr.push_back(0);
  out.slots.reserve(rows);
  out.positions.reserve(rows);
  for (size_t i = 0; i < n; ++i) {
    const i32 id = ids[i];
    if (tails[i] == Tail::kCopyPage) {
      // Tokens of the shared page move to the copy: cut the list where that page begins, and leave the old ones behind.
      const i32 old_page = spans_[branches_[id].spans.back()].slots.back() / page_size_;
      const i32 filled = spans_[branches_[id].spans.back()].slots.back() % page_size_ + 1;
      const i32 page = take_page();
      const i32 copy_id = new_span();
      Span copy;
      copy.pages.push_back(page);
      copy.users.push_back(id);
      copy.live = 1;
      for (;;) {
        BranchState& b = branches_[id];
        if (b.spans.empty()) break;
        const i32 last = b.spans.back();
        const std::vector<i32>& slots = spans_[last].slots;
        i32 begin = static_cast<i32>(slots.size());
        while (begin > 0 && slots[begin - 1] / page_size_ == old_page) --begin;
        if (begin == static_cast<i32>(slots.size())) break;
        if (begin > 0) {
          split(last, begin);
          continue;  // the tail is now a span of its own
        }
        const Span& s = spans_[last];
        for (i32 slot : s.slots) copy.slots.push_back(page * page_size_ + slot % page_size_);
        copy.positions.insert(copy.positions.begin(), s.positions.begin(), s.positions.end());
        b.spans.pop_back();
        drop_user(last, id);
      }
      // Spans were taken from the last to the first; within a page the slots of one branch rise in context order.
      std::sort(copy.slots.begin(), copy.slots.end());
      tokens_physical_ += copy.length();
      spans_[copy_id] = std::move(copy);
      branches_[id].spans.push_back(copy_id);
      out.copies.push_back({old_page, page, filled});
      ++pages_copied_;
      ++topology_;
    } else if (tails[i] == Tail::kNewSpan || branches_[id].spans.empty()) {
      const i32 fresh = new_span();
      add_user(fresh, id);
      branches_[id].spans.push_back(fresh);
      ++topology_;
    }
    BranchState& b = branches_[id];
    Span& s = spans_[b.spans.back()];
    // A fresh span, or one whose last page is full, begins on a new page.
    i32 slot = s.slots.empty() ? 0 : s.slots.back() + 1;
    bool fresh_page = s.slots.empty() || slot % page_size_ == 0;
    for (i32 j = 0; j < counts[i]; ++j) {
      if (fresh_page) {
        slot = take_page() * page_size_;
        s.pages.push_back(slot / page_size_);
      }
      const i64 position = positions[i].empty() ? b.position + j : positions[i][j];
      s.slots.push_back(slot);
      s.positions.push_back(static_cast<i32>(position));
      out.slots.push_back(slot);
      out.positions.push_back(position);
      ++slot;
      fresh_page = slot % page_size_ == 0;
    }
    b.length += counts[i];
    b.position = out.positions.back() + 1;
    b.version = ++clock_;
    out.versions.push_back(b.version);
    out.lengths.push_back(b.length);
    out.row_ptr.push_back(out.row_ptr.back() + counts[i]);
  }
  tokens_logical_ += rows;
  tokens_physical_ += rows;
  in_step_ = false;
  free_pages_.insert(free_pages_.end(), freed_in_step_.begin(), freed_in_step_.end());
  freed_in_step_.clear();
  out.topology = topology_;
  return out;
}

void Tree::join(i32 trunk, const std::vector<i32>& kids) {
  if (get(trunk).kept) throw std::invalid_argument("join: the trunk is kept; fork it, and join into the fork");
  for (i32 kid : kids)
    if (get(kid).kept) throw std::invalid_argument("join: a kid is kept; fork it, and join the fork");
  for (i32 kid : kids) {
    cut_at(kid, branches_[kid].fork_length);
    BranchState& t = branches_[trunk];
    BranchState& k = branches_[kid];
    i64 seen = 0;
    for (i32 s : k.spans) {
      const i64 length = spans_[s].length();
      if (seen >= k.fork_length) {
        t.spans.push_back(s);
        t.length += length;
        tokens_logical_ += length;
        add_user(s, trunk);
      }
      seen += length;
    }
    t.position = std::max(t.position, k.position);
    free_branch(kid);
  }
  branches_[trunk].version = ++clock_;
  ++topology_;
}

void Tree::share(i32 branch, i32 sibling, i64 count) {
  if (get(branch).kept) throw std::invalid_argument("share: the branch is kept; fork it, and share into the fork");
  if (get(sibling).kept) throw std::invalid_argument("share: the sibling is kept; fork it, and share the fork");
  const i64 begin = get(sibling).fork_length;
  if (count == 0) return;
  cut_at(sibling, begin);
  cut_at(sibling, begin + count);
  BranchState& b = branches_[branch];
  const BranchState& s = branches_[sibling];
  i64 seen = 0;
  for (i32 id : s.spans) {
    Span& span = spans_[id];
    if (seen >= begin + count) break;
    if (seen >= begin) {
      b.spans.push_back(id);
      add_user(id, branch);
      b.length += span.length();
      b.position = std::max<i64>(b.position, *std::max_element(span.positions.begin(), span.positions.end()) + 1);
    }
    seen += span.length();
  }
  tokens_logical_ += count;
  b.fork_length = b.length;
  b.version = ++clock_;
  ++topology_;
}

void Tree::truncate(i32 branch, i64 length) {
  get(branch);
  if (length >= branches_[branch].length) return;
  cut_at(branch, length);
  BranchState& b = branches_[branch];
  while (b.length > length) {
    const i32 last = b.spans.back();
    const i64 n = spans_[last].length();
    b.length -= n;
    if (!b.kept) tokens_logical_ -= n;
    b.spans.pop_back();
    drop_user(last, branch);
  }
  b.position = b.spans.empty() ? 0 : spans_[b.spans.back()].positions.back() + 1;
  b.fork_length = std::min(b.fork_length, length);
  b.version = ++clock_;
  ++topology_;
}

void Tree::free_branch(i32 branch) {
  BranchState& b = branches_[branch];
  for (auto it = b.spans.rbegin(); it != b.spans.rend(); ++it) drop_user(*it, branch);
  if (!b.kept) tokens_logical_ -= b.length;
  b = BranchState();
  free_branches_.push_back(branch);
  ++topology_;
}

void Tree::release(i32 branch) {
  get(branch);
  free_branch(branch);
}

void Tree::keep(i32 branch) {
  BranchState& b = get(branch);
  if (b.kept) return;
  for (i32 s : b.spans) lose_live(s);
  tokens_logical_ -= b.length;
  b.kept = true;
}

i64 Tree::kept_pages(i32 branch, i64 length) const {
  i64 found = 0, seen = 0;
  i32 last = -1;
  for (i32 id : at(branch).spans) {
    for (i32 slot : spans_[id].slots) {
      if (seen++ == length) return found;
      const i32 page = slot / page_size_;
      if (page != last && page_live_[page] == 0) ++found;
      last = page;
    }
  }
  return found;
}

Usage Tree::usage() const {
  return {num_pages_,       static_cast<i64>(free_pages_.size()) + pages_kept_,
          tokens_logical_,  tokens_physical_,
          pages_copied_,    pages_kept_};
}

std::vector<i32> Tree::slots(i32 branch) const {
  std::vector<i32> out;
  for (i32 s : at(branch).spans) out.insert(out.end(), spans_[s].slots.begin(), spans_[s].slots.end());
  return out;
}

std::vector<i64> Tree::positions(i32 branch) const {
  std::vector<i64> out;
  for (i32 s : at(branch).spans) out.insert(out.end(), spans_[s].positions.begin(), spans_[s].positions.end());
  return out;
}

void Tree::check() const {
  auto require = [](bool ok, const char* what) {
    if (!ok) throw std::logic_error(std::string("cache invariant broken: ") + what);
  };
  std::vector<i32> refs(num_pages_, 0), live(num_pages_, 0), owner(static_cast<size_t>(num_pages_) * page_size_, -1);
  std::vector<std::vector<i32>> users(spans_.size());
  i64 logical = 0, physical = 0;
  for (size_t b = 0; b < branches_.size(); ++b) {
    const BranchState& state = branches_[b];
    require(state.alive || state.spans.empty(), "a dead branch lists spans");
    i64 length = 0;
    for (i32 s : state.spans) {
      users[s].push_back(static_cast<i32>(b));
      length += spans_[s].length();
    }
    require(length == state.length, "a branch's length is not the sum of its spans");
    if (!state.kept) logical += length;
  }
  for (size_t i = 0; i < spans_.size(); ++i) {
    const Span& s = spans_[i];
    std::vector<i32> listed = s.users;
    std::sort(listed.begin(), listed.end());
    require(listed == users[i], "a span's users are not the branches that list it");
    require(listed.empty() == s.slots.empty(), "a span without users holds tokens, or one with users holds none");
    std::vector<i32> pages;
    for (i32 slot : s.slots) {
      require(owner[slot] < 0, "a slot belongs to two spans");
      owner[slot] = static_cast<i32>(i);
      if (pages.empty() || pages.back() != slot / page_size_) pages.push_back(slot / page_size_);
    }
    require(pages == s.pages, "a span's pages are not those of its slots");
    i32 living = 0;
    for (i32 user : s.users) living += branches_[user].kept ? 0 : 1;
    require(living == s.live, "a span's live users are not those that are not kept");
    for (i32 p : pages) {
      ++refs[p];
      if (s.live > 0) ++live[p];
    }
    if (s.live > 0) physical += s.length();
  }
  require(refs == page_refs_, "a page's reference count is not the number of spans that hold it");
  i64 kept = 0;
  for (i32 p = 0; p < num_pages_; ++p) {
    kept += refs[p] > 0 && live[p] == 0 ? 1 : 0;
    require(refs[p] == 0 || live[p] == page_live_[p], "a page's live count is not the number of live spans that hold it");
  }
  require(kept == pages_kept_, "the count of kept pages drifted");
  std::vector<char> is_free(num_pages_, 0);
  for (i32 p : free_pages_) {
    require(!is_free[p], "a page is in the free list twice");
    is_free[p] = 1;
  }
  for (i32 p = 0; p < num_pages_; ++p) require(is_free[p] == (refs[p] == 0), "a page is both free and used, or neither");
  require(logical == tokens_logical_ && physical == tokens_physical_, "token counts drifted");
}

}  // namespace anabranch
