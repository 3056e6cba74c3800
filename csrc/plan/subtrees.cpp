#include "plan/subtrees.hpp"

#include <algorithm>

namespace anabranch {

namespace {

constexpr i32 kNone = -1;

// Tokens of a run that may be a part: of a longer run a partial result is a small share, and longer runs are what a plan
// balances processors with.
constexpr i64 kShort = 128;

// The cost model: a tree is fused where that spares a partial result for each so many products of a row and a token, or
// more. A partial result (written, read, merged, and the row's queries packed once more) costs as much as ten or twenty
// of them, so what is won where this is just reached is a tenth: more than what may be lost to a worse balance.
constexpr i64 kProducts = 128;

// Which runs each context sees, from the one with the most visitors to its own; only of contexts with one row, whose runs
// form a tree: what comes before a run is the same for each of its visitors. (Joins and block tables can be otherwise.)
struct Chains {
  std::vector<i32> ptr{0}, runs;
  std::vector<i32> above;  // by run: the one before it
  std::vector<char> fit;   // by context

  const i32* begin(i32 b) const { return runs.data() + ptr[b]; }
  const i32* end(i32 b) const { return runs.data() + ptr[b + 1]; }
};

Chains find_chains(const Contexts& c, const Runs& runs) {
  Chains out;
  const i32 batch = c.batch();
  std::vector<i32> stamp(runs.count(), kNone);
  for (i32 b = 0; b < batch; ++b) {
    if (c.rows(b) == 1)
      for (i32 i = c.piece_ptr[b]; i < c.piece_ptr[b + 1]; ++i) {
        const i32 r = runs.of_piece[c.piece_ids[i]];
        if (stamp[r] == b) continue;
        stamp[r] = b;
        // Mostly in order already.
        out.runs.push_back(r);
        const auto before = [&](i32 x, i32 y) {
          const i32 m = runs.visitors.size(x), n = runs.visitors.size(y);
          return m != n ? m > n : x < y;
        };
        for (size_t at = out.runs.size() - 1; at > static_cast<size_t>(out.ptr[b]) && before(r, out.runs[at - 1]); --at)
          std::swap(out.runs[at], out.runs[at - 1]);
      }
    out.ptr.push_back(static_cast<i32>(out.runs.size()));
  }
  constexpr i32 kUnknown = -2;
  out.above.assign(runs.count(), kUnknown);
  std::vector<char> odd(runs.count(), 0);
  for (i32 b = 0; b < batch; ++b) {
    i32 before = kNone;
    for (const i32* r = out.begin(b); r != out.end(b); before = *r++) {
      odd[*r] |= out.above[*r] != kUnknown && out.above[*r] != before;
      out.above[*r] = before;
    }
  }
  out.fit.assign(batch, 0);
  for (i32 b = 0; b < batch; ++b)
    out.fit[b] = out.begin(b) != out.end(b) && std::none_of(out.begin(b), out.end(b), [&](i32 r) { return odd[r]; });
  return out;
}

// Runs that are short, see only fit contexts, and stand beside another such run in one of them. `some`: contexts with any.
std::vector<char> find_candidates(const Runs& runs, const Chains& chains, i64 most, std::vector<char>& some) {
  const i32 n = runs.count(), batch = static_cast<i32>(chains.fit.size());
  std::vector<char> may(n, 0), candidate(n, 0);
  for (i32 r = 0; r < n; ++r)
    may[r] = runs.length[r] <= most && std::all_of(runs.visitors.first(r), runs.visitors.last(r),
                                                   [&](i32 b) { return chains.fit[b] != 0; });
  for (i32 b = 0; b < batch; ++b) {
    if (!chains.fit[b]) continue;
    if (std::count_if(chains.begin(b), chains.end(b), [&](i32 r) { return may[r] != 0; }) < 2) continue;
    for (const i32* r = chains.begin(b); r != chains.end(b); ++r) candidate[*r] |= may[*r];
  }
  some.assign(batch, 0);
  for (i32 b = 0; b < batch; ++b)
    some[b] = chains.fit[b] && std::any_of(chains.begin(b), chains.end(b), [&](i32 r) { return candidate[r] != 0; });
  return candidate;
}

// The runs of those contexts as trees, children and contexts in the order in which they came.
struct Trees {
  std::vector<i32> roots, child, last_child, sibling;  // by run
  std::vector<i32> leaf, last_leaf;                    // by run: contexts that it ends
  std::vector<i32> next_leaf;                          // by context

  Trees(const Chains& chains, i32 num_runs, const std::vector<char>& some)
      : child(num_runs, kNone), last_child(num_runs, kNone), sibling(num_runs, kNone), leaf(num_runs, kNone),
        last_leaf(num_runs, kNone), next_leaf(some.size(), kNone) {
    std::vector<char> seen(num_runs, 0);
    for (i32 b = 0; b < static_cast<i32>(some.size()); ++b) {
      if (!some[b]) continue;
      for (const i32* r = chains.begin(b); r != chains.end(b); ++r) {
        if (seen[*r]) continue;
        seen[*r] = 1;
        const i32 above = chains.above[*r];
        if (above == kNone) {
          roots.push_back(*r);
          continue;
        }
        (last_child[above] == kNone ? child[above] : sibling[last_child[above]]) = *r;
        last_child[above] = *r;
      }
      const i32 end = chains.end(b)[-1];
      (last_leaf[end] == kNone ? leaf[end] : next_leaf[last_leaf[end]]) = b;
      last_leaf[end] = b;
    }
  }
};

}  // namespace

Subtrees find_subtrees(const Contexts& c, const Runs& runs, const PlanParams& p) {
  Subtrees out;
  out.fused.assign(runs.count(), 0);
  const i32 most = p.subtree / p.group;
  if (most < 2 || p.fixed || !c.row_of.empty()) return out;
  const Chains chains = find_chains(c, runs);
  std::vector<char> some;
  const std::vector<char> candidate = find_candidates(runs, chains, std::min<i64>(kShort, p.chunk), some);
  const Trees trees(chains, runs.count(), some);
  std::vector<i32> first(runs.count()), last(runs.count());  // of a run's visitors, in `contexts`
  std::vector<i32> order;                                    // candidates of a tree, ancestors first
  const i32 wanted = (p.parallelism + p.num_kv_heads - 1) / p.num_kv_heads;
  for (const i32 root : trees.roots) {
    const i32 begin = static_cast<i32>(out.contexts.size());
    order.clear();
    i64 results = 0, products = 0;  // of the tree's short runs, were they items of their own
    for (i32 r = root; r != kNone;) {
      first[r] = static_cast<i32>(out.contexts.size());
      if (candidate[r]) order.push_back(r);
      for (i32 b = trees.leaf[r]; b != kNone; b = trees.next_leaf[b]) out.contexts.push_back(b);
      i32 next = trees.child[r];
      for (; next == kNone; r = chains.above[r]) {
        last[r] = static_cast<i32>(out.contexts.size());
        if (candidate[r]) {
          results += last[r] - first[r];
          products += (last[r] - first[r]) * runs.length[r];
        }
        if (r == root) break;
        next = trees.sibling[r];
      }
      r = next;
    }
    // How a tree is dealt to tiles depends on that tree alone.
    const i32 rows = static_cast<i32>(out.contexts.size()) - begin, each = std::min(most, rows / wanted);
    if (each < 2 || (results - rows) * kProducts < products) {
      out.contexts.resize(begin);
      continue;
    }
    std::vector<i32> count((rows + each - 1) / each, 0);  // parts, by tile
    const auto each_tile = [&](i32 r, auto&& visit) {
      for (i32 t = (first[r] - begin) / each; t <= (last[r] - 1 - begin) / each; ++t) visit(t);
    };
    for (const i32 r : order) each_tile(r, [&](i32 t) { ++count[t]; });
    if (p.parts > 0 && *std::max_element(count.begin(), count.end()) > p.parts) {
      out.contexts.resize(begin);
      continue;
    }
    const size_t tiles = out.tiles.size();
    for (i32 at = begin; at < begin + rows; at += each) out.tiles.push_back({at, std::min(at + each, begin + rows)});
    for (const i32 r : order) out.fused[r] = 1;
    for (const i32 n : count) out.part_ptr.push_back(out.part_ptr.back() + n);
    out.parts.resize(out.part_ptr.back());
    std::vector<i32> at(out.part_ptr.begin() + tiles, out.part_ptr.end() - 1);
    for (const i32 r : order)
      each_tile(r, [&](i32 t) {
        const Subtrees::Tile& tile = out.tiles[tiles + t];
        out.parts[at[t]++] = {r, std::max(first[r], tile.begin), std::min(last[r], tile.end)};
      });
  }
  return out;
}

}  // namespace anabranch
