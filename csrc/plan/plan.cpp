#include "plan/plan.hpp"

#include <algorithm>
#include <limits>
#include <numeric>
#include <unordered_map>

namespace anabranch {

namespace {

using u64 = std::uint64_t;

u64 mix(u64 x) {  // splitmix64: a visitor's random weight; the weights of a set are added up
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

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

// The run of each piece: pieces with equal visitor sets share one.
struct Runs {
  std::vector<i32> of_piece;
  std::vector<i64> length;
  i32 count() const { return static_cast<i32>(length.size()); }
};

// A run for each piece that somebody sees, in the order of the pieces.
Runs one_run_a_piece(const Contexts& c, i32 batch) {
  Runs runs;
  runs.of_piece.assign(c.pieces.size(), -1);
  for (i32 b = 0; b < batch; ++b)
    if (c.row_ptr[b] != c.row_ptr[b + 1])
      for (i32 i = c.piece_ptr[b]; i < c.piece_ptr[b + 1]; ++i) runs.of_piece[c.piece_ids[i]] = 0;
  for (size_t piece = 0; piece < c.pieces.size(); ++piece) {
    if (runs.of_piece[piece] < 0) continue;
    runs.of_piece[piece] = runs.count();
    runs.length.push_back(c.pieces[piece].length);
  }
  return runs;
}

Runs group_by_visitors(const Contexts& c, i32 batch) {
  const i32 num_pieces = static_cast<i32>(c.pieces.size());
  std::vector<u64> hash(num_pieces, 0);
  for (i32 b = 0; b < batch; ++b) {
    if (c.row_ptr[b] == c.row_ptr[b + 1]) continue;
    const u64 weight = mix(static_cast<u64>(b) + 1);
    for (i32 i = c.piece_ptr[b]; i < c.piece_ptr[b + 1]; ++i) hash[c.piece_ids[i]] += weight;
  }
  Runs runs;
  runs.of_piece.assign(num_pieces, -1);
  size_t capacity = 16;
  while (capacity < 2 * static_cast<size_t>(num_pieces)) capacity *= 2;
  std::vector<std::pair<u64, i32>> table(capacity, {0, -1});
  for (i32 b = 0; b < batch; ++b) {
    if (c.row_ptr[b] == c.row_ptr[b + 1]) continue;
    for (i32 i = c.piece_ptr[b]; i < c.piece_ptr[b + 1]; ++i) {
      const i32 piece = c.piece_ids[i];
      if (runs.of_piece[piece] >= 0) continue;
      size_t at = hash[piece] & (capacity - 1);
      while (table[at].second >= 0 && table[at].first != hash[piece]) at = (at + 1) & (capacity - 1);
      if (table[at].second < 0) table[at] = {hash[piece], runs.count()};
      const i32 run = table[at].second;
      if (run == runs.count()) runs.length.push_back(0);
      runs.of_piece[piece] = run;
      runs.length[run] += c.pieces[piece].length;
    }
  }
  return runs;
}

// New tokens that earlier rows of a context must not see: `tokens` of them side by side, `after` more behind them.
struct Hidden {
  i32 context, after, tokens;
};

struct Item {
  i64 kv_begin;
  i32 kv_len, row_begin, row_count, masked, kv_pos_max, row_pos_min;
  i64 cost;
};

}  // namespace

PlanData Planner::build(const Contexts& given, const PlanParams& p, i32 slack, std::vector<i32>* tail_items,
                        std::vector<i32>* tail_capacity) {
  const FixedContexts recut = p.fixed ? fixed_pieces(given, p.chunk) : FixedContexts();
  const Contexts& c = p.fixed ? recut.contexts : given;
  const i32 batch = static_cast<i32>(c.row_ptr.size()) - 1;
  const i32 num_rows = c.row_ptr.back();
  const auto rows_of = [&](i32 b) { return c.row_ptr[b + 1] - c.row_ptr[b]; };

  // 1. Pieces → runs, and who visits each run. Two different sets whose weights add up alike (never seen; 1 in 2^64)
  //    would show as a run with more visitors than one of its pieces has: then nothing is merged.
  Runs runs = p.fixed ? one_run_a_piece(c, batch) : group_by_visitors(c, batch);
  Lists visitors(0);
  for (bool merged = !p.fixed;; merged = false) {
    const i32 n = runs.count();
    visitors = Lists(n);
    std::vector<i32> stamp(n, -1), listed(n, 0), pieces(n, 0);
    for (i32 b = 0; b < batch; ++b) {
      if (rows_of(b) == 0) continue;
      for (i32 i = c.piece_ptr[b]; i < c.piece_ptr[b + 1]; ++i) {
        const i32 r = runs.of_piece[c.piece_ids[i]];
        ++listed[r];
        if (stamp[r] != b) visitors.count(r);
        stamp[r] = b;
      }
    }
    for (i32 r : runs.of_piece)
      if (r >= 0) ++pieces[r];
    visitors.seal();
    bool exact = true;
    for (i32 r = 0; r < n; ++r) exact &= static_cast<i64>(visitors.size(r)) * pieces[r] == listed[r];
    if (exact || !merged) break;
    runs = one_run_a_piece(c, batch);
  }
  const i32 num_runs = runs.count();
  Lists run_pieces(num_runs);
  {
    std::vector<i32> stamp(num_runs, -1);
    std::vector<char> seen(c.pieces.size(), 0);
    for (i32 r : runs.of_piece)
      if (r >= 0) run_pieces.count(r);
    run_pieces.seal();
    for (i32 b = 0; b < batch; ++b) {
      if (rows_of(b) == 0) continue;
      for (i32 i = c.piece_ptr[b]; i < c.piece_ptr[b + 1]; ++i) {
        const i32 piece = c.piece_ids[i], r = runs.of_piece[piece];
        if (stamp[r] != b) visitors.add(r, b);
        stamp[r] = b;
        if (!seen[piece]) run_pieces.add(r, piece);
        seen[piece] = 1;
      }
    }
  }

  // 2. Which run ends each context.
  std::vector<i32> terminal(batch, -1), is_terminal(num_runs, 0);
  for (i32 b = 0; b < batch; ++b) {
    if (rows_of(b) == 0 || c.piece_ptr[b] == c.piece_ptr[b + 1]) continue;
    terminal[b] = runs.of_piece[c.piece_ids[c.piece_ptr[b + 1] - 1]];
    ++is_terminal[terminal[b]];
  }

  // 3. The absorb rule, in bytes (head_dim cancels). A run of L tokens seen by R rows costs, as an item of its own, one
  //    partial a row and query head: about 8·R·group written and read. Read again inside each of the T runs that end
  //    its visitors' contexts it costs 2·elem_size·L·(T − 1) more than once.
  std::vector<i64> run_rows(num_runs, 0);
  for (i32 r = 0; r < num_runs; ++r)
    for (const i32* b = visitors.first(r); b != visitors.last(r); ++b) run_rows[r] += rows_of(*b);
  std::vector<char> absorbed(num_runs, 0);
  std::vector<i64> run_length = runs.length;  // with what a run absorbed
  i64 num_absorbed = 0;
  {
    std::vector<i32> times(num_runs, 0);
    std::vector<i32> ends;
    for (i32 r = 0; r < num_runs; ++r) {
      if (is_terminal[r] || p.fixed) continue;
      const i64 once = 2ll * p.elem_size * runs.length[r], partials = 8ll * run_rows[r] * p.group;
      if (once > partials) continue;
      ends.clear();
      for (const i32* b = visitors.first(r); b != visitors.last(r); ++b)
        if (times[terminal[*b]]++ == 0) ends.push_back(terminal[*b]);
      bool contained = true;  // every visitor of such a run visits the absorbed one too
      for (i32 t : ends) contained &= times[t] == visitors.size(t);
      for (i32 t : ends) times[t] = 0;
      if (!contained || once * (static_cast<i64>(ends.size()) - 1) > partials) continue;
      absorbed[r] = 1;
      ++num_absorbed;
      for (i32 t : ends) run_length[t] += runs.length[r];
    }
  }

  // 4. Tokens of the runs, one after another; a steady tail gets `slack` free places behind it.
  //
  //    A kernel knows one limit a row: it sees the first so many tokens of an item. So whatever a row must not see has to
  //    be a suffix of the run, for each visitor of it. It is, since a run's tokens, absorbed ones included, are stored
  //    in *context order*: what a row must not see is a suffix of its context; every visitor of a run visits all of it,
  //    what it absorbed included; and all visitors have these pieces in the same order (see Contexts), so the order of
  //    one is the order of each. Hidden tokens are counted in the run where they are stored (step 5).
  std::vector<i64> run_begin(num_runs, 0);
  i64 kv_total = 0, kv_tokens = 0;
  for (i32 r = 0; r < num_runs; ++r) {
    if (absorbed[r]) continue;
    run_begin[r] = kv_total;
    kv_tokens += run_length[r];
    kv_total += run_length[r];
    if (is_terminal[r] && run_rows[r] == 1) kv_total += slack;
  }

  // How a run is cut depends on that run alone, so the result of a branch does not depend on strangers in the batch.
  const i32 tile_rows = std::max(1, p.tile / p.group);
  std::vector<i64> split_length(num_runs, 0);
  i64 most_items = 0, most_entries = 0;
  for (i32 r = 0; r < num_runs; ++r) {
    if (absorbed[r]) continue;
    const i64 tiles = (run_rows[r] + tile_rows - 1) / tile_rows;
    const i64 chunks = (run_length[r] + p.chunk - 1) / p.chunk;
    const i64 wanted = (p.parallelism + tiles * p.num_kv_heads - 1) / (tiles * p.num_kv_heads);
    const i64 splits = std::max<i64>(1, std::min(chunks, wanted));
    split_length[r] = (chunks + splits - 1) / splits * p.chunk;
    most_items += splits * tiles;
    most_entries += splits * run_rows[r];
  }

  PlanData out;
  const auto aligned = [](i64 n) { return (n + 3) / 4 * 4; };  // 16 bytes
  const i64 capacity = 2 * aligned(kv_total) + aligned(most_items * kItemFields) + 3 * aligned(most_entries) +
                       2 * aligned(num_rows) + aligned(num_rows + 1);
  out.buffer = std::shared_ptr<i32[]>(new i32[capacity]);
  i32* const base = out.buffer.get();
  i32* const kv_slots = base;
  i32* const kv_positions = base + aligned(kv_total);
  for (i32 r = 0; r < num_runs; ++r) {
    if (absorbed[r]) continue;
    i64 at = run_begin[r];
    const auto put = [&](i32 id) {
      const Contexts::Piece& piece = c.pieces[id];
      std::copy_n(piece.slots, piece.length, kv_slots + at);
      std::copy_n(piece.positions, piece.length, kv_positions + at);
      at += piece.length;
    };
    if (run_length[r] == runs.length[r]) {
      std::for_each(run_pieces.first(r), run_pieces.last(r), put);
      continue;
    }
    const i32 b = *visitors.first(r);  // r ends its context, so what was absorbed from there is in r
    for (i32 i = c.piece_ptr[b]; i < c.piece_ptr[b + 1]; ++i) {
      const i32 run = runs.of_piece[c.piece_ids[i]];
      if (run == r || absorbed[run]) put(c.piece_ids[i]);
    }
  }

  // 5. Which new tokens stored in a run are hidden from earlier rows: by run, then context, then from the last backwards.
  std::vector<Hidden> hidden;
  std::vector<i32> hidden_run;
  for (i32 b = 0; b < batch; ++b) {
    i32 after = 0;
    for (i32 i = c.piece_ptr[b + 1] - 1; i >= c.piece_ptr[b] && after < rows_of(b) - 1; --i) {
      const i32 piece = c.piece_ids[i], run = runs.of_piece[piece];
      hidden.push_back({b, after, c.pieces[piece].length});
      hidden_run.push_back(absorbed[run] ? terminal[b] : run);
      after += c.pieces[piece].length;
    }
  }
  Lists hidden_in(num_runs);
  for (i32 run : hidden_run) hidden_in.count(run);
  hidden_in.seal();
  for (size_t h = 0; h < hidden.size(); ++h) hidden_in.add(hidden_run[h], static_cast<i32>(h));

  // 6. Items: tiles of rows × ranges of tokens.
  std::vector<Item> items;
  std::vector<i32> rows, limits, partials_of(num_rows, 0);
  items.reserve(most_items);
  rows.reserve(most_entries);
  limits.reserve(most_entries);
  std::vector<i32> tails(batch, -1);
  std::vector<i32> flat_rows;
  std::vector<i64> flat_limits;
  for (i32 r = 0; r < num_runs; ++r) {
    if (absorbed[r]) continue;
    flat_rows.clear();
    flat_limits.assign(run_rows[r], 0);
    const i32 *h = hidden_in.first(r), *const last = hidden_in.last(r);
    for (const i32* v = visitors.first(r); v != visitors.last(r); ++v) {
      const i32 b = *v, n = rows_of(b), first = static_cast<i32>(flat_rows.size());
      i64 limit = run_length[r];
      for (i32 behind = 0; behind < n; ++behind) {  // rows from the last to the first; each hides one more token
        flat_limits[first + n - 1 - behind] = limit;
        while (h != last && hidden[*h].context == b && hidden[*h].after + hidden[*h].tokens <= behind) ++h;
        if (h != last && hidden[*h].context == b && hidden[*h].after <= behind) --limit;
      }
      while (h != last && hidden[*h].context == b) ++h;
      for (i32 j = 0; j < n; ++j) flat_rows.push_back(c.row_ptr[b] + j);
    }
    const i64 total = static_cast<i64>(flat_rows.size());
    for (i64 begin = 0; begin < run_length[r]; begin += split_length[r]) {
      const i64 end = std::min(begin + split_length[r], run_length[r]);
      const i32* kv_pos = kv_positions + run_begin[r];
      for (i64 t = 0; t < total; t += tile_rows) {
        Item item{};
        item.kv_begin = run_begin[r] + begin;
        item.row_begin = static_cast<i32>(rows.size());
        item.row_pos_min = std::numeric_limits<i32>::max();
        i32 least = std::numeric_limits<i32>::max();
        for (i64 k = t; k < std::min<i64>(t + tile_rows, total); ++k) {
          const i32 seen = static_cast<i32>(std::min(flat_limits[k], end) - begin);
          if (seen <= 0) continue;
          rows.push_back(flat_rows[k]);
          limits.push_back(seen);
          ++partials_of[flat_rows[k]];
          item.kv_len = std::max(item.kv_len, seen);
          least = std::min(least, seen);
          item.row_pos_min = std::min(item.row_pos_min, static_cast<i32>(c.row_positions[flat_rows[k]]));
        }
        item.row_count = static_cast<i32>(rows.size()) - item.row_begin;
        if (item.row_count == 0) continue;
        item.masked = least < item.kv_len;
        item.kv_pos_max = *std::max_element(kv_pos + begin, kv_pos + begin + item.kv_len);
        item.cost = static_cast<i64>(item.kv_len) * (8 + static_cast<i64>(item.row_count) * p.group);
        if (is_terminal[r] && total == 1 && end == run_length[r])
          tails[*visitors.first(r)] = static_cast<i32>(items.size());
        items.push_back(item);
      }
    }
  }

  // 7. Where results go: a row with one partial is written out directly; the partials of any other row are neighbours.
  std::vector<i32> merge_rows, merge_ptr{0}, next(num_rows, -1);
  i32 num_partials = 0;
  for (i32 row = 0; row < num_rows; ++row) {
    if (partials_of[row] == 1) continue;
    next[row] = num_partials;
    num_partials += partials_of[row];
    merge_rows.push_back(row);
    merge_ptr.push_back(num_partials);
  }
  std::vector<i32> dest(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) dest[i] = next[rows[i]] < 0 ? -1 : next[rows[i]]++;

  // 8. Most expensive first, so that what is left at the end is small; ties keep their order.
  std::vector<i32> order(items.size()), place(items.size());
  std::iota(order.begin(), order.end(), 0);
  // With `narrow`, the items of few rows follow in an order of their own: a GPU runs them with smaller tiles.
  const auto wide = [&](i32 i) { return static_cast<i64>(items[i].row_count) * p.group > p.narrow; };
  std::stable_sort(order.begin(), order.end(), [&](i32 a, i32 b) {
    return wide(a) != wide(b) ? wide(a) : items[a].cost > items[b].cost;
  });
  for (size_t i = 0; i < order.size(); ++i) place[order[i]] = static_cast<i32>(i);
  if (tail_items != nullptr) {
    tail_items->assign(batch, -1);
    tail_capacity->assign(batch, 0);
    for (i32 b = 0; b < batch; ++b) {
      if (tails[b] < 0) continue;
      (*tail_items)[b] = place[tails[b]];
      const i32 end = items[tails[b]].kv_len + slack;
      (*tail_capacity)[b] = p.fixed ? std::min(end, p.chunk) : end;
    }
  }

  const i64 sizes[kSections] = {kv_total,
                                kv_total,
                                static_cast<i64>(items.size()) * kItemFields,
                                static_cast<i64>(rows.size()),
                                static_cast<i64>(rows.size()),
                                static_cast<i64>(rows.size()),
                                num_rows,
                                static_cast<i64>(merge_rows.size()),
                                static_cast<i64>(merge_ptr.size())};
  out.begin[0] = 0;
  for (int s = 0; s < kSections; ++s) out.begin[s + 1] = out.begin[s] + aligned(sizes[s]);
  for (size_t i = 0; i < order.size(); ++i) {
    const Item& item = items[order[i]];
    i32* field = base + out.begin[kItems] + static_cast<i64>(i) * kItemFields;
    field[kKvBegin] = static_cast<i32>(item.kv_begin);
    field[kKvLen] = item.kv_len;
    field[kRowBegin] = item.row_begin;
    field[kRowCount] = item.row_count;
    field[kMasked] = item.masked;
    field[kKvPosMax] = item.kv_pos_max;
    field[kRowPosMin] = item.row_pos_min;
    field[kRowPosMin + 1] = 0;
  }
  std::copy(rows.begin(), rows.end(), base + out.begin[kRows]);
  std::copy(limits.begin(), limits.end(), base + out.begin[kLimits]);
  std::copy(dest.begin(), dest.end(), base + out.begin[kDest]);
  for (i32 row = 0; row < num_rows; ++row)
    base[out.begin[kRowPositions] + row] = static_cast<i32>(c.row_positions[row]);
  std::copy(merge_rows.begin(), merge_rows.end(), base + out.begin[kMergeRows]);
  std::copy(merge_ptr.begin(), merge_ptr.end(), base + out.begin[kMergePtr]);
  out.num_items = static_cast<i64>(items.size());
  out.num_partials = num_partials;
  out.num_merge = static_cast<i64>(merge_rows.size());
  out.tile_rows = tile_rows;
  out.num_runs = num_runs;
  out.num_absorbed = num_absorbed;
  out.kv_tokens = kv_tokens;
  out.num_rows = num_rows;
  out.num_wide = std::count_if(order.begin(), order.end(), wide);
  return out;
}

Contexts contexts_of(const Tree& tree, const StepState& step) {
  Contexts c;
  c.row_ptr = step.row_ptr;
  c.row_positions = step.positions;
  c.piece_ptr.push_back(0);
  std::unordered_map<i32, i32> local;  // span id → piece
  local.reserve(2 * step.branches.size());
  for (i32 b : step.branches) {
    for (i32 s : tree.peek(b).spans) {
      const auto [it, fresh] = local.try_emplace(s, static_cast<i32>(c.pieces.size()));
      if (fresh) {
        const Span& span = tree.span(s);
        c.pieces.push_back({span.slots.data(), span.positions.data(), span.length()});
      }
      c.piece_ids.push_back(it->second);
    }
    c.piece_ptr.push_back(static_cast<i32>(c.piece_ids.size()));
  }
  return c;
}

namespace {
constexpr i32 kSlack = 64;  // steps a steady plan lasts
}

void LivePlan::rebuild(const Tree& tree, const StepState& step, const PlanParams& params) {
  data_ = Planner::build(contexts_of(tree, step), params, kSlack, &tail_items_, &tail_capacity_);
  params_ = params;
  branches_ = step.branches;
  lengths_ = step.lengths;
  topology_ = step.topology;
}

bool LivePlan::advance(const StepState& step, const PlanParams& params) {
  const size_t n = step.branches.size();
  if (step.topology != topology_ || !(params == params_) || step.branches != branches_ ||
      step.slots.size() != n)
    return false;
  i32* base = data_.buffer.get();
  i32* items = base + data_.begin[kItems];
  for (size_t b = 0; b < n; ++b) {
    const i32 tail = tail_items_[b];
    if (tail < 0 || step.lengths[b] != lengths_[b] + 1 || items[tail * kItemFields + kKvLen] >= tail_capacity_[b])
      return false;
    // Items with several rows keep their row_pos_min: while positions rise, an old one only skips less than it might.
    if (step.positions[b] < base[data_.begin[kRowPositions] + static_cast<i64>(b)]) return false;
  }
  for (size_t b = 0; b < n; ++b) {
    i32* item = items + tail_items_[b] * kItemFields;
    const i32 position = static_cast<i32>(step.positions[b]);
    const i64 at = static_cast<i64>(item[kKvBegin]) + item[kKvLen]++;
    base[data_.begin[kKvSlots] + at] = step.slots[b];
    base[data_.begin[kKvPositions] + at] = position;
    base[data_.begin[kLimits] + item[kRowBegin]] = item[kKvLen];
    base[data_.begin[kRowPositions] + static_cast<i64>(b)] = position;
    item[kKvPosMax] = std::max(item[kKvPosMax], position);
    item[kRowPosMin] = position;
  }
  lengths_ = step.lengths;
  ++advances;
  return true;
}

PagedContexts contexts_of_tables(const i32* tables, i64 batch, i64 columns, const i64* lengths, const i64* queries,
                                 i32 page_size) {
  PagedContexts out;
  Contexts& c = out.contexts;
  // Pass 1: for each (page, column) the distinct numbers of its slots that somebody sees; nearly always just one.
  std::unordered_map<u64, std::vector<i32>> ends;
  const auto key_of = [&](i64 b, i64 column) {
    return static_cast<u64>(tables[b * columns + column]) << 32 | static_cast<u64>(column);
  };
  const auto seen_of = [&](i64 b, i64 column) {
    return static_cast<i32>(std::min<i64>(page_size, lengths[b] - column * page_size));
  };
  for (i64 b = 0; b < batch; ++b) {
    for (i64 k = 0; k * page_size < lengths[b]; ++k) {
      std::vector<i32>& list = ends[key_of(b, k)];
      const i32 seen = seen_of(b, k);
      const auto at = std::lower_bound(list.begin(), list.end(), seen);
      if (at == list.end() || *at != seen) list.insert(at, seen);
      out.max_page = std::max(out.max_page, tables[b * columns + k]);
    }
  }
  // Pass 2: a piece for each stretch between two such numbers.
  std::unordered_map<u64, i32> first_piece;
  first_piece.reserve(ends.size());
  c.piece_ptr.push_back(0);
  c.row_ptr.push_back(0);
  std::vector<std::pair<i64, i32>> stretches;  // (offset into slots, length)
  for (i64 b = 0; b < batch; ++b) {
    for (i64 k = 0; k * page_size < lengths[b]; ++k) {
      const u64 key = key_of(b, k);
      const std::vector<i32>& list = ends[key];
      const auto [it, fresh] = first_piece.try_emplace(key, static_cast<i32>(stretches.size()));
      if (fresh) {
        i32 from = 0;
        for (i32 to : list) {
          stretches.emplace_back(static_cast<i64>(out.slots.size()), to - from);
          for (; from < to; ++from) {
            out.slots.push_back(tables[b * columns + k] * page_size + from);
            out.positions.push_back(static_cast<i32>(k * page_size + from));
          }
        }
      }
      const i32 seen = seen_of(b, k);
      for (size_t i = 0; i < list.size() && list[i] <= seen; ++i)
        c.piece_ids.push_back(it->second + static_cast<i32>(i));
    }
    c.piece_ptr.push_back(static_cast<i32>(c.piece_ids.size()));
    c.row_ptr.push_back(c.row_ptr.back() + static_cast<i32>(queries[b]));
    for (i64 j = 0; j < queries[b]; ++j) c.row_positions.push_back(lengths[b] - queries[b] + j);
  }
  for (const auto& [at, length] : stretches)
    c.pieces.push_back({out.slots.data() + at, out.positions.data() + at, length});
  return out;
}

}  // namespace anabranch
