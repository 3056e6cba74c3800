// The next token's scores: the best of a row, its highest few, a draw from its distribution. Rows are cut into blocks of
// SCORE_BLOCK; what a pass over the row notes of each block (its largest score, its mass) tells which few blocks to read
// again.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "cpu/attention.hpp"
#include "cpu/region.hpp"

namespace anabranch::cpu {
namespace {

constexpr int64_t SERIAL_SCORES = 1 << 16;  // below this, waking threads costs more than it brings
constexpr float INFINITE = std::numeric_limits<float>::infinity();

// How far the sums here may be from torch's, which are rounded in other places. A draw or a threshold closer than this to
// where another token begins is left to torch, so that tokens are those that its operators choose.
constexpr double DRAW_MARGIN = 5e-7;  // of the mass drawn from; 2e-7 at most were seen
constexpr double MASS_MARGIN = 3e-6;  // of a probability, whose scale is a sum in float32
constexpr int64_t FEW = 256;         // tokens: a nucleus is looked for among so many first
constexpr int64_t EQUALS = 48;       // seen beside the top k, for scores equal to the last of them
constexpr int BINS = 512;             // then by the mass in each 1/16 below the best score

int64_t blocks_of(const Scores& s) { return (s.size + SCORE_BLOCK - 1) / SCORE_BLOCK; }

struct Candidate {
  float score;
  int64_t token;
  bool operator<(const Candidate& o) const { return score > o.score || (score == o.score && token < o.token); }
};

// The scores of a row that are not below `least`, in any order.
void at_least(const Kernels& kernels, const Scores& s, int64_t row, const float* peaks, float least,
              std::vector<Candidate>& found) {
  found.clear();
  float values[SCORE_BLOCK];
  for (int64_t b = 0; b < blocks_of(s); ++b) {
    if (peaks[b] < least) continue;
    const int64_t begin = b * SCORE_BLOCK, end = std::min(begin + SCORE_BLOCK, s.size);
    kernels.score_read(s, row, begin, end, values);
    for (int64_t i = begin; i < end; ++i)
      if (values[i - begin] >= least) found.push_back({values[i - begin], i});
  }
}

// The k highest scores of a row, highest first, equal ones by token.
void highest(const Kernels& kernels, const Scores& s, int64_t row, const float* peaks, int64_t k,
             std::vector<Candidate>& found) {
  const int64_t blocks = blocks_of(s);
  float least = -INFINITE;  // at least k scores are not below it
  if (k <= blocks) {
    std::vector<float> order(peaks, peaks + blocks);
    std::nth_element(order.begin(), order.begin() + (k - 1), order.end(), std::greater<float>());
    least = order[size_t(k - 1)];
  }
  at_least(kernels, s, row, peaks, least, found);
  if (int64_t(found.size()) > k) {
    std::nth_element(found.begin(), found.begin() + (k - 1), found.end());
    found.resize(size_t(k));
  }
  std::sort(found.begin(), found.end());
}

// The highest scores of a row, highest first, that hold `mass` of its exponentials and some more.
void heaviest(const Kernels& kernels, const Scores& s, int64_t row, const float* peaks, float best, float temperature,
              double mass, std::vector<Candidate>& found) {
  const float bin = temperature / 16;
  double held[BINS] = {};
  float values[SCORE_BLOCK], each[SCORE_BLOCK];
  for (int64_t b = 0; b < blocks_of(s); ++b) {
    if (best - peaks[b] >= bin * BINS) continue;
    const int64_t begin = b * SCORE_BLOCK, count = std::min(SCORE_BLOCK, s.size - begin);
    kernels.score_read(s, row, begin, begin + count, values);
    kernels.exponentials(values, count, temperature, best / temperature, each);
    for (int64_t i = 0; i < count; ++i) held[int(std::min((best - values[i]) / bin, float(BINS - 1)))] += each[i];
  }
  int last = 0;
  for (double sum = held[0]; last < BINS - 1 && sum < mass * (1 + 1e-4); sum += held[++last]) {}
  // One bin more: what is cut off is compared with what is kept.
  at_least(kernels, s, row, peaks, last + 2 < BINS ? best - bin * float(last + 2) : -INFINITE, found);
  std::sort(found.begin(), found.end());
}

// A softmax's numerators over tokens, of which the equals at the end may be cut: which of them stay is open.
struct Nucleus {
  std::vector<Candidate> tokens;  // the scores, divided by the temperature; highest first
  std::vector<float> masses;      // of the tokens
  int64_t kept = 0;               // so many of them stay
};

// The token that uniform · (the mass kept) falls to, over tokens by number; −1 where that depends on rounding, or on which
// of the equals stay.
int64_t settle(Nucleus& n, double uniform) {
  const float edge = n.tokens[size_t(n.kept - 1)].score;
  double mass = 0, each = 0;
  int64_t equals = 0, staying = 0;
  for (size_t i = 0; i < n.tokens.size() && n.tokens[i].score >= edge; ++i) {
    if (n.tokens[i].score == edge) ++equals, each = n.masses[i];
    if (int64_t(i) < n.kept) mass += n.masses[i], staying += n.tokens[i].score == edge;
  }
  const bool open = equals != staying;
  const size_t looked_at = size_t(n.kept + equals - staying);
  std::vector<size_t> order(looked_at);
  std::iota(order.begin(), order.end(), size_t(0));
  std::sort(order.begin(), order.end(), [&](size_t x, size_t y) { return n.tokens[x].token < n.tokens[y].token; });
  const double target = uniform * mass, margin = DRAW_MARGIN * mass;
  double before = 0;
  int64_t passed = 0;  // of the equals
  for (const size_t i : order) {
    if (open && n.tokens[i].score == edge) {
      ++passed;
      continue;
    }
    const double least = before + each * double(std::max<int64_t>(0, staying - (equals - passed))) * open;
    const double most = before + each * double(std::min(staying, passed)) * open;
    if (target < least + n.masses[i] - margin) return most == 0 || target > most + margin ? n.tokens[i].token : -1;
    before += n.masses[i];
  }
  return -1;
}

// One token by `uniform` from softmax(scores / temperature), cut to the top_k highest (0: all) and then to the likeliest
// that hold `top_p`; −1: it cannot be told here.
int64_t draw(const Kernels& kernels, const Scores& s, int64_t row, const float* peaks, float best, float temperature,
             int64_t top_k, double top_p, double uniform) {
  const float most = best / temperature;
  if (!std::isfinite(most)) return -1;
  Nucleus n;
  double all = 0;
  if (top_k == 0) {
    n.masses.resize(size_t(blocks_of(s)));
    kernels.score_masses(s, row, temperature, most, n.masses.data());
    all = std::accumulate(n.masses.begin(), n.masses.end(), 0.0);
    if (top_p >= 1) {
      double before = 0, target = uniform * all;
      for (int64_t b = 0; b < blocks_of(s); before += n.masses[size_t(b++)]) {
        if (target >= before + n.masses[size_t(b)]) continue;
        const int64_t begin = b * SCORE_BLOCK, count = std::min(SCORE_BLOCK, s.size - begin);
        float values[SCORE_BLOCK], each[SCORE_BLOCK];
        kernels.score_read(s, row, begin, begin + count, values);
        kernels.exponentials(values, count, temperature, most, each);
        for (int64_t i = 0; i < count; before += each[i++]) {
          if (target >= before + each[i]) continue;
          const double margin = DRAW_MARGIN * all;
          return target - before > margin && before + each[i] - target > margin ? begin + i : -1;
        }
        return -1;
      }
      return -1;
    }
  }
  for (bool few = true;; few = false) {
    if (few) highest(kernels, s, row, peaks, std::min(top_k ? top_k + EQUALS : FEW, s.size), n.tokens);
    else heaviest(kernels, s, row, peaks, best, temperature, top_p * all, n.tokens);
    const bool cut = int64_t(n.tokens.size()) < s.size;  // there are more tokens than these
    std::vector<float> values(n.tokens.size());
    for (size_t i = 0; i < values.size(); ++i) values[i] = n.tokens[i].score;
    n.masses.resize(values.size());
    kernels.exponentials(values.data(), int64_t(values.size()), temperature, most, n.masses.data());
    for (Candidate& c : n.tokens) c.score /= temperature;
    if (top_k) {
      const float least = n.tokens[size_t(std::min<int64_t>(top_k, int64_t(n.tokens.size())) - 1)].score;
      if (cut && n.tokens.back().score == least) return -1;  // equal ones may be among the others
      while (n.tokens.back().score < least) n.tokens.pop_back();
      n.masses.resize(n.tokens.size());
      all = std::accumulate(n.masses.begin(), n.masses.end(), 0.0);
    }
    // A token stays while those before it hold less than top_p; one stays in any case.
    const int64_t size = int64_t(n.tokens.size());
    double mass = 0;
    for (n.kept = 0; n.kept < size && (n.kept == 0 || mass < top_p * all); ++n.kept) mass += n.masses[size_t(n.kept)];
    if (top_p >= 1) n.kept = size;
    const bool whole = top_k || !cut;  // all that can stay is here
    if (n.kept == size && !whole) {
      if (few) continue;
      return -1;
    }
    if (top_p < 1) {
      const double without_last = mass - n.masses[size_t(n.kept - 1)], margin = MASS_MARGIN * all;
      if (n.kept < size && mass - top_p * all < margin) return -1;
      if (n.kept > 1 && top_p * all - without_last < margin) return -1;
      if (!whole && n.tokens.back().score == n.tokens[size_t(n.kept - 1)].score) {
        if (few) continue;
        return -1;
      }
    }
    return settle(n, uniform);
  }
}

template <class Row>
void over_rows(const Scores& s, int threads, Row row) {
  if (s.rows * s.size < SERIAL_SCORES) threads = 1;
  for_each(threads, s.rows, 1, [&](int, int64_t r, int64_t) { row(r); });
}

}  // namespace

void score_best(const Scores& s, float* best, int64_t* token, int threads) {
  const Kernels& kernels = active();
  over_rows(s, threads, [&](int64_t r) {
    std::vector<float> peaks(static_cast<size_t>(blocks_of(s)));
    best[r] = kernels.score_peaks(s, r, peaks.data());
    token[r] = 0;
    const auto block = std::find(peaks.begin(), peaks.end(), best[r]);
    if (block == peaks.end()) return;  // NaN
    float values[SCORE_BLOCK];
    const int64_t begin = (block - peaks.begin()) * SCORE_BLOCK, end = std::min(begin + SCORE_BLOCK, s.size);
    kernels.score_read(s, r, begin, end, values);
    token[r] = begin + (std::find(values, values + (end - begin), best[r]) - values);
  });
}

void score_logsumexp(const Scores& s, float* sum, int threads) {
  const Kernels& kernels = active();
  over_rows(s, threads, [&](int64_t r) {
    std::vector<float> notes(static_cast<size_t>(blocks_of(s)));
    const float best = kernels.score_peaks(s, r, notes.data());
    sum[r] = best;
    if (!std::isfinite(best)) return;
    kernels.score_masses(s, r, 1.0f, best, notes.data());
    sum[r] = float(best + std::log(std::accumulate(notes.begin(), notes.end(), 0.0)));
  });
}

void score_draw(const Scores& s, float temperature, int64_t top_k, double top_p, const double* uniform, float* best,
                int64_t* token, int threads) {
  const Kernels& kernels = active();
  over_rows(s, threads, [&](int64_t r) {
    std::vector<float> peaks(static_cast<size_t>(blocks_of(s)));
    best[r] = kernels.score_peaks(s, r, peaks.data());
    token[r] = std::isfinite(best[r])
                   ? draw(kernels, s, r, peaks.data(), best[r], temperature, top_k, top_p, uniform[r])
                   : -1;
  });
}

}  // namespace anabranch::cpu
