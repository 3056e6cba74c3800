// Tiles of a branch mask: which runs of the other axis a group of neighbouring tokens touches, and who sees each run.
//
// A mask has S segments of consecutive tokens; segment s sees whole intervals outside itself and, causally, itself. A
// tile is a few consecutive tokens: part of one long segment, or several short ones where that wastes little. Its
// pieces are the sorted, disjoint runs of tokens on the other axis that some of it sees, each with one bit a token of
// the tile. Bits tell visibility up to causality: a row of the tile sees token j of a piece if its bit is set and
// j ≤ row (a tile of columns: and row ≥ j). No other tokens are ever touched. Linear in what it returns, times a
// logarithm where a tile holds several segments.
//
// A tile never spans trees that are blind to one another: how a tree is cut, and so the order of its sums, does not
// depend on the strangers packed in its row.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace anabranch {

constexpr int kTileTokens = 128;  // at most, in a tile: the bits of a piece

struct BranchTile {
  int32_t begin, end;              // tokens
  int32_t piece_begin, piece_end;  // its pieces
};

struct BranchPiece {
  int32_t begin, end;  // tokens of the other axis
  int32_t whole;       // every token of the tile sees it (up to causality)
  int32_t unused;
  uint32_t bits[4];    // bit t % 32 of word t / 32: token tile.begin + t
};

struct BranchPlan {
  std::vector<BranchTile> tiles;
  std::vector<BranchPiece> pieces;
};

struct BranchMaskView {
  const int64_t* starts;     // [segments + 1]
  const int32_t* ptr;        // [segments + 1]
  const int32_t* intervals;  // [n, 2]: row form (columns a segment sees) or column form (rows that see a segment)
  int64_t segments;
  bool columns;  // the column form: tiles are of columns, pieces of rows
};

class BranchPlanner {
 public:
  // `lanes` are what a token costs (query heads packed with it), in vectors of `pad`; `most` tokens a tile at most.
  BranchPlanner(const BranchMaskView& mask, int most, int lanes, int pad)
      : m_(mask), most_(std::min(most, kTileTokens)), lanes_(lanes), pad_(pad) {}

  BranchPlan run() {
    find_trees();
    for (int64_t s = 0; s < m_.segments; ++s) {
      if (tree_begins_[s]) flush();
      const int64_t begin = m_.starts[s], size = m_.starts[s + 1] - begin;
      const int64_t cuts = (size + most_ - 1) / most_;
      for (int64_t c = 0; c < cuts; ++c)
        add(int32_t(s), int32_t(begin + size * c / cuts), int32_t(begin + size * (c + 1) / cuts));
    }
    flush();
    return std::move(plan_);
  }

 private:
  using Runs = std::vector<std::pair<int32_t, int32_t>>;
  struct Part {
    int32_t segment, begin, end;
  };

  // Segment s begins a tree if nothing from it on and nothing before it see one another.
  void find_trees() {
    tree_begins_.assign(m_.segments, true);
    if (m_.columns) {  // intervals are of rows, all of them behind the segment
      int64_t reach = 0;
      for (int64_t s = 0; s < m_.segments; ++s) {
        tree_begins_[s] = reach <= m_.starts[s];
        for (int32_t i = m_.ptr[s]; i < m_.ptr[s + 1]; ++i) reach = std::max<int64_t>(reach, m_.intervals[2 * i + 1]);
      }
    } else {  // of columns, before it
      int64_t reach = m_.starts[m_.segments];
      for (int64_t s = m_.segments - 1; s >= 0; --s) {
        for (int32_t i = m_.ptr[s]; i < m_.ptr[s + 1]; ++i) reach = std::min<int64_t>(reach, m_.intervals[2 * i]);
        tree_begins_[s] = reach >= m_.starts[s];
      }
    }
  }

  // What tokens [begin, end) of a segment see on the other axis, sorted, neighbours merged.
  void see(const Part& p, Runs& runs) const {
    runs.clear();
    const auto push = [&](int32_t b, int32_t e) {
      if (b >= e) return;
      if (!runs.empty() && runs.back().second == b)
        runs.back().second = e;
      else
        runs.emplace_back(b, e);
    };
    if (m_.columns) push(p.begin, int32_t(m_.starts[p.segment + 1]));
    for (int32_t i = m_.ptr[p.segment]; i < m_.ptr[p.segment + 1]; ++i) push(m_.intervals[2 * i], m_.intervals[2 * i + 1]);
    if (!m_.columns) push(int32_t(m_.starts[p.segment]), p.end);
  }

  static int64_t length(const Runs& runs) {
    int64_t n = 0;
    for (const auto& r : runs) n += r.second - r.first;
    return n;
  }

  static void unite(const Runs& a, const Runs& b, Runs& out) {
    out.clear();
    for (size_t i = 0, j = 0; i < a.size() || j < b.size();) {
      const auto& r = j == b.size() || (i < a.size() && a[i].first <= b[j].first) ? a[i++] : b[j++];
      if (!out.empty() && r.first <= out.back().second)
        out.back().second = std::max(out.back().second, r.second);
      else
        out.push_back(r);
    }
  }

  // Work of a tile: its padded lanes and a few more for reading the other axis' tokens at all.
  int64_t cost(int64_t tokens, int64_t others) const {
    return ((tokens * lanes_ + pad_ - 1) / pad_ * pad_ + 8) * others;
  }

  void add(int32_t segment, int32_t begin, int32_t end) {
    const Part part{segment, begin, end};
    see(part, fresh_);
    const int64_t alone = cost(end - begin, length(fresh_));
    if (!parts_.empty() && end - parts_.front().begin <= most_ && parts_.back().segment != segment) {
      unite(seen_, fresh_, both_);
      const int64_t together = cost(end - parts_.front().begin, length(both_));
      if (together <= cost_ + alone) {
        parts_.push_back(part);
        seen_.swap(both_);
        cost_ = together;
        return;
      }
    }
    flush();
    parts_.push_back(part);
    seen_.swap(fresh_);
    cost_ = alone;
  }

  void flush() {
    if (parts_.empty()) return;
    BranchTile tile{parts_.front().begin, parts_.back().end, int32_t(plan_.pieces.size()), 0};
    const int tokens = tile.end - tile.begin;
    if (parts_.size() == 1) {
      for (const auto& r : seen_) put(r.first, r.second, mask(0, tokens), tokens);
    } else {
      events_.clear();
      for (const Part& p : parts_) {
        see(p, both_);  // not fresh_: that is the next tile's
        for (const auto& r : both_) {
          events_.push_back({r.first, p.begin - tile.begin, p.end - tile.begin});
          events_.push_back({r.second, p.begin - tile.begin, p.end - tile.begin});
        }
      }
      std::sort(events_.begin(), events_.end(), [](const Event& a, const Event& b) { return a.at < b.at; });
      Bits bits{};
      for (size_t i = 0; i < events_.size();) {  // a part's runs are disjoint and not neighbours: each event flips it
        const int32_t at = events_[i].at;
        for (; i < events_.size() && events_[i].at == at; ++i) {
          const Bits flip = mask(events_[i].first, events_[i].last);
          for (int w = 0; w < 4; ++w) bits.word[w] ^= flip.word[w];
        }
        if (i < events_.size()) put(at, events_[i].at, bits, tokens);
      }
    }
    tile.piece_end = int32_t(plan_.pieces.size());
    plan_.tiles.push_back(tile);
    parts_.clear();
  }

  struct Event {
    int32_t at, first, last;
  };
  struct Bits {
    uint32_t word[4];
  };

  static Bits mask(int first, int last) {  // bits [first, last)
    Bits b{};
    for (int w = 0; w < 4; ++w) {
      const int lo = std::max(first - 32 * w, 0), hi = std::min(last - 32 * w, 32);
      if (lo < hi) b.word[w] = (hi == 32 ? ~0u : (1u << hi) - 1) & ~((1u << lo) - 1);
    }
    return b;
  }

  void put(int32_t begin, int32_t end, const Bits& bits, int tokens) {
    const Bits all = mask(0, tokens);
    bool none = true, whole = true;
    for (int w = 0; w < 4; ++w) {
      none = none && bits.word[w] == 0;
      whole = whole && bits.word[w] == all.word[w];
    }
    if (none) return;
    BranchPiece p{begin, end, whole, 0, {bits.word[0], bits.word[1], bits.word[2], bits.word[3]}};
    plan_.pieces.push_back(p);
  }

  const BranchMaskView m_;
  const int most_, lanes_, pad_;
  BranchPlan plan_;
  std::vector<char> tree_begins_;  // [segments]
  std::vector<Part> parts_;        // of the tile being made
  Runs seen_, fresh_, both_;
  int64_t cost_ = 0;
  std::vector<Event> events_;
};

}  // namespace anabranch
