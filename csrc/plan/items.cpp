#include "plan/items.hpp"

#include <algorithm>
#include <limits>

namespace anabranch {

namespace {

// New tokens that earlier rows of a context must not see: `tokens` of them side by side, `after` more behind them.
struct Hidden {
  i32 context, after, tokens;
};

struct HiddenTokens {
  std::vector<Hidden> tokens;
  Lists in_run{0};
};

// Which new tokens stored in a run are hidden from earlier rows: by run, then context, then from the last backwards.
HiddenTokens find_hidden(const Contexts& c, const Runs& runs, const Absorbed& absorbed) {
  const i32 batch = c.batch();
  HiddenTokens found;
  std::vector<Hidden>& hidden = found.tokens;
  std::vector<i32> hidden_run;
  for (i32 b = 0; b < batch; ++b) {
    i32 after = 0;
    for (i32 i = c.piece_ptr[b + 1] - 1; i >= c.piece_ptr[b] && after < c.rows(b) - 1; --i) {
      const i32 piece = c.piece_ids[i], run = runs.of_piece[piece];
      hidden.push_back({b, after, c.pieces[piece].length});
      hidden_run.push_back(absorbed.absorbed[run] ? runs.terminal[b] : run);
      after += c.pieces[piece].length;
    }
  }
  found.in_run = Lists(runs.count());
  for (i32 run : hidden_run) found.in_run.count(run);
  found.in_run.seal();
  for (size_t h = 0; h < hidden.size(); ++h) found.in_run.add(hidden_run[h], static_cast<i32>(h));
  return found;
}

// The rows that see run r, and how many of its tokens each sees.
void limits_of_rows(const Contexts& c, const Runs& runs, const Absorbed& absorbed, const HiddenTokens& hidden, i32 r,
                    std::vector<i32>& flat_rows, std::vector<i64>& flat_limits) {
  flat_rows.clear();
  flat_limits.assign(runs.rows[r], 0);
  const i32 *h = hidden.in_run.first(r), *const last = hidden.in_run.last(r);
  for (const i32* v = runs.visitors.first(r); v != runs.visitors.last(r); ++v) {
    const i32 b = *v, n = c.rows(b), first = static_cast<i32>(flat_rows.size());
    i64 limit = absorbed.length[r];
    for (i32 behind = 0; behind < n; ++behind) {  // rows from the last to the first; each hides one more token
      flat_limits[first + n - 1 - behind] = limit;
      while (h != last && hidden.tokens[*h].context == b &&
             hidden.tokens[*h].after + hidden.tokens[*h].tokens <= behind)
        ++h;
      if (h != last && hidden.tokens[*h].context == b && hidden.tokens[*h].after <= behind) --limit;
    }
    while (h != last && hidden.tokens[*h].context == b) ++h;
    for (i32 j = 0; j < n; ++j) flat_rows.push_back(c.row_ptr[b] + j);
  }
}

// A tile of a subtree: an item with its rows and no tokens, then its parts.
void add_subtree(const Contexts& c, const Runs& runs, const Absorbed& absorbed, const Subtrees& subtrees, size_t t,
                 const Ranges& ranges, const PlanParams& p, const std::vector<Stored>& stored, Items& out) {
  const Subtrees::Tile& tile = subtrees.tiles[t];
  const size_t head = out.items.size();
  Item item{};
  item.row_begin = static_cast<i32>(out.rows.size());
  item.row_count = tile.end - tile.begin;
  for (i32 k = tile.begin; k < tile.end; ++k) {
    const i32 row = c.row_ptr[subtrees.contexts[k]];
    out.rows.push_back(row);
    out.limits.push_back(0);
    ++out.partials_of[c.out_of(row)];
  }
  out.items.push_back(item);
  for (i32 i = subtrees.part_ptr[t]; i < subtrees.part_ptr[t + 1]; ++i) {
    const Subtrees::Part& found = subtrees.parts[i];
    const Stored& range = stored[ranges.first[found.run]];
    Item part{};
    part.kv_begin = range.place;
    part.kv_len = static_cast<i32>(absorbed.length[found.run]);
    part.row_begin = item.row_begin + found.begin - tile.begin;
    part.row_count = found.end - found.begin;
    part.kv_pos_max = range.max_position;
    part.row_pos_min = std::numeric_limits<i32>::max();
    for (i32 k = found.begin; k < found.end; ++k)
      part.row_pos_min =
          std::min(part.row_pos_min, static_cast<i32>(c.row_positions[c.row_ptr[subtrees.contexts[k]]]));
    part.parts = kPart;
    out.items[head].cost += part.kv_len * (8 + static_cast<i64>(part.row_count) * p.group);
    if (runs.is_terminal[found.run] && runs.rows[found.run] == 1) {
      out.tails[subtrees.contexts[found.begin]] = static_cast<i32>(out.items.size());
      out.limits[part.row_begin] = part.kv_len;
    }
    out.items.push_back(part);
    ++out.items[head].parts;
  }
}

}  // namespace

Items make_items(const Contexts& c, const Runs& runs, const Absorbed& absorbed, const Subtrees& subtrees,
                 const Ranges& ranges, const PlanParams& p, const std::vector<Stored>& stored, const Strips& strips) {
  const HiddenTokens hidden = find_hidden(c, runs, absorbed);
  Items out;
  out.items.reserve(ranges.most_items);
  out.rows.reserve(ranges.most_entries);
  out.limits.reserve(ranges.most_entries);
  out.partials_of.assign(c.num_out(), 0);
  out.tails.assign(c.batch(), -1);
  std::vector<i32> flat_rows;
  std::vector<i64> flat_limits;
  for (i32 r = 0; r < runs.count(); ++r) {
    if (absorbed.absorbed[r] || subtrees.fused[r]) continue;
    limits_of_rows(c, runs, absorbed, hidden, r, flat_rows, flat_limits);
    const i64 total = static_cast<i64>(flat_rows.size());
    const Stored* range = stored.data() + ranges.first[r];
    for (i64 begin = 0; begin < absorbed.length[r]; begin += ranges.split[r], ++range) {
      const i64 end = std::min(begin + ranges.split[r], absorbed.length[r]);
      for (i64 t = 0; t < total; t += ranges.tile_rows) {
        Item item{};
        item.kv_begin = range->place;
        item.row_begin = static_cast<i32>(out.rows.size());
        item.row_pos_min = std::numeric_limits<i32>::max();
        i32 least = std::numeric_limits<i32>::max();
        for (i64 k = t; k < std::min<i64>(t + ranges.tile_rows, total); ++k) {
          const i32 seen = static_cast<i32>(std::min(flat_limits[k], end) - begin);
          if (seen <= 0) continue;
          out.rows.push_back(flat_rows[k]);
          out.limits.push_back(seen);
          ++out.partials_of[c.out_of(flat_rows[k])];
          item.kv_len = std::max(item.kv_len, seen);
          least = std::min(least, seen);
          item.row_pos_min = std::min(item.row_pos_min, static_cast<i32>(c.row_positions[flat_rows[k]]));
        }
        item.row_count = static_cast<i32>(out.rows.size()) - item.row_begin;
        if (item.row_count == 0) continue;
        item.masked = least < item.kv_len;
        item.kv_pos_max = item.kv_len == end - begin ? range->max_position
                                                     : max_position(strips.entries(), strips.tokens(), strips.size(),
                                                                    item.kv_begin, item.kv_len);
        item.cost = static_cast<i64>(item.kv_len) * (8 + static_cast<i64>(item.row_count) * p.group);
        if (runs.is_terminal[r] && total == 1 && end == absorbed.length[r])
          out.tails[*runs.visitors.first(r)] = static_cast<i32>(out.items.size());
        out.items.push_back(item);
      }
    }
  }
  for (size_t t = 0; t < subtrees.tiles.size(); ++t) add_subtree(c, runs, absorbed, subtrees, t, ranges, p, stored, out);
  return out;
}

Destinations make_destinations(const Contexts& c, const Items& items) {
  Destinations out;
  const i32 num_rows = c.num_out();
  const bool direct = c.row_of.empty();  // else a query row is not the row of the output that it belongs to
  std::vector<i32> next(num_rows, -1);
  for (i32 row = 0; row < num_rows; ++row) {
    if (direct && items.partials_of[row] == 1) continue;
    next[row] = out.num_partials;
    out.num_partials += items.partials_of[row];
    out.merge_rows.push_back(row);
    out.merge_ptr.push_back(out.num_partials);
  }
  out.dest.resize(items.rows.size());
  for (size_t i = 0; i < items.rows.size(); ++i) {
    i32& at = next[c.out_of(items.rows[i])];
    out.dest[i] = at < 0 ? -1 : at++;
  }
  return out;
}

}  // namespace anabranch
