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
constexpr double DRAW_MARGIN = 2e-6;  // of the mass drawn from; its scale cancels
constexpr double MASS_MARGIN = 2e-5;  // of a probability, whose scale is a sum in float32
constexpr int64_t FEW = 256;         // tokens: a nucleus is looked for among so many first
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

void values_of(const std::vector<Candidate>& found, std::vector<float>& values) {
  values.resize(found.size());
  for (size_t i = 0; i < found.size(); ++i) values[i] = found[i].score;
}

// Index that target, a part of the masses' sum, falls to; −1 within `margin` of where another begins.
int64_t passed(const std::vector<float>& masses, double target, double margin) {
  double sum = 0;
  for (size_t i = 0; i < masses.size(); ++i) {
    const double next = sum + masses[i];
    if (target < next) return target - sum > margin && next - target > margin ? int64_t(i) : -1;
    sum = next;
  }
  return -1;
}

// One token by `uniform` from softmax(scores / temperature), cut to the likeliest that hold `top_p`; −1: too close to
// tell, or not to be had here.
int64_t draw(const Kernels& kernels, const Scores& s, int64_t row, const float* peaks, float best, float temperature,
             double top_p, double uniform, std::vector<float>& masses, std::vector<Candidate>& found) {
  const float most = best / temperature;
  if (!std::isfinite(most)) return -1;
  masses.resize(size_t(blocks_of(s)));
  kernels.score_masses(s, row, temperature, most, masses.data());
  const double all = std::accumulate(masses.begin(), masses.end(), 0.0);
  std::vector<float> values;
  if (top_p >= 1) {
    double before = 0, target = uniform * all, margin = DRAW_MARGIN * all;
    for (int64_t b = 0; b < blocks_of(s); before += masses[size_t(b++)]) {
      if (target >= before + masses[size_t(b)]) continue;
      if (target - before <= margin && b) return -1;
      const int64_t begin = b * SCORE_BLOCK, count = std::min(SCORE_BLOCK, s.size - begin);
      values.resize(size_t(count));
      masses.resize(size_t(count));
      kernels.score_read(s, row, begin, begin + count, values.data());
      kernels.exponentials(values.data(), count, temperature, most, masses.data());
      const int64_t at = passed(masses, target - before, margin);
      return at < 0 ? -1 : begin + at;
    }
    return -1;
  }
  int64_t kept = 0;
  double mass = 0;
  for (bool few = true;; few = false) {
    if (few) highest(kernels, s, row, peaks, std::min(FEW, s.size), found);
    else heaviest(kernels, s, row, peaks, best, temperature, top_p * all, found);
    values_of(found, values);
    masses.resize(found.size());
    kernels.exponentials(values.data(), int64_t(values.size()), temperature, most, masses.data());
    // A token stays while those before it hold less than top_p.
    for (kept = 0, mass = 0; kept < int64_t(found.size()) && mass / all < top_p; ++kept) mass += masses[size_t(kept)];
    if (!few || kept < int64_t(found.size())) break;
  }
  if (kept == 0) mass = masses[size_t(kept++)];  // at least one stays
  if (kept == int64_t(found.size()) && kept < s.size) return -1;
  const double without_last = (mass - masses[size_t(kept - 1)]) / all;
  if (mass / all - top_p < MASS_MARGIN || (kept > 1 && top_p - without_last < MASS_MARGIN)) return -1;
  if (kept < int64_t(found.size()) && found[size_t(kept)].score / temperature == found[size_t(kept - 1)].score / temperature)
    return -1;  // one of several equals is cut off
  found.resize(size_t(kept));
  std::sort(found.begin(), found.end(), [](const Candidate& x, const Candidate& y) { return x.token < y.token; });
  values_of(found, values);
  masses.resize(found.size());
  kernels.exponentials(values.data(), kept, temperature, most, masses.data());
  mass = std::accumulate(masses.begin(), masses.end(), 0.0);
  const int64_t at = passed(masses, uniform * mass, DRAW_MARGIN * mass);
  return at < 0 ? (kept == 1 ? found[0].token : -1) : found[size_t(at)].token;
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

void score_top(const Scores& s, int64_t k, float* best, float* scores, int64_t* tokens, int threads) {
  const Kernels& kernels = active();
  over_rows(s, threads, [&](int64_t r) {
    std::vector<float> peaks(static_cast<size_t>(blocks_of(s)));
    best[r] = kernels.score_peaks(s, r, peaks.data());
    std::vector<Candidate> found;
    if (best[r] == best[r]) highest(kernels, s, r, peaks.data(), k, found);
    for (int64_t i = 0; i < k; ++i) {
      scores[r * k + i] = i < int64_t(found.size()) ? found[size_t(i)].score : best[r];
      tokens[r * k + i] = i < int64_t(found.size()) ? found[size_t(i)].token : i;
    }
  });
}

void score_draw(const Scores& s, float temperature, double top_p, const double* uniform, float* best, int64_t* token,
                int threads) {
  const Kernels& kernels = active();
  over_rows(s, threads, [&](int64_t r) {
    std::vector<float> peaks(static_cast<size_t>(blocks_of(s))), masses;
    std::vector<Candidate> found;
    best[r] = kernels.score_peaks(s, r, peaks.data());
    token[r] = std::isfinite(best[r]) ? draw(kernels, s, r, peaks.data(), best[r], temperature, top_p, uniform[r],
                                             masses, found)
                                      : -1;
  });
}

}  // namespace anabranch::cpu
