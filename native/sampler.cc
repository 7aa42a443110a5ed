// Selection and the draw; see sampler.h.

#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace lmclock {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

bool larger_logit(const Candidate& a, const Candidate& b) {
  return a.x != b.x ? a.x > b.x : a.id < b.id;
}

// Two logits may differ and their weights not.
bool larger_weight(const Candidate& a, const Candidate& b) {
  return a.weight != b.weight ? a.weight > b.weight : a.id < b.id;
}

bool by_id(const Candidate& a, const Candidate& b) { return a.id < b.id; }

// Draw number `draw` of a seed, in [0, 1): 53 bits of splitmix64 (Steele et al. 2014).
double uniform(uint64_t seed, uint64_t draw) {
  uint64_t z = seed + (draw + 1) * 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

double adjust(double x, const isa::Sampling& s, const isa::Adjust& a) {
  if (a.count > 0) {
    x = x > 0 ? x / s.repetition : x * s.repetition;
    x -= static_cast<double>(s.frequency) * a.count + static_cast<double>(s.presence);
  }
  return x + a.bias;
}

}  // namespace

bool needs_sum(const isa::Sampling& s) {
  return s.temperature != 0.0f && s.top_k <= 0 && (s.top_p < 1.0f || s.min_p <= 0.0f);
}

double sum_factor(const isa::Sampling& s) {
  return s.top_p < 1.0f ? 1.0 : 1.0 / static_cast<double>(s.temperature);
}

bool Sampler::take(float* x, int64_t width, const isa::Sampling& settings,
                   const isa::Adjust* begin, const isa::Adjust* end) {
  adjusted_.clear();
  for (const isa::Adjust* a = begin; a != end; ++a) {
    if (a->id < 0 || a->id >= width) {
      adjusted_.clear();
      return false;
    }
    adjusted_.push_back({x[a->id], a->id});
  }
  std::stable_sort(adjusted_.begin(), adjusted_.end(), by_id);
  // Records of one id apply one after the other, to one candidate.
  adjusted_.erase(std::unique(adjusted_.begin(), adjusted_.end(),
                              [](const Candidate& a, const Candidate& b) { return a.id == b.id; }),
                  adjusted_.end());
  for (const isa::Adjust* a = begin; a != end; ++a) {
    const Candidate wanted = {0, a->id};
    auto at = std::lower_bound(adjusted_.begin(), adjusted_.end(), wanted, by_id);
    at->x = adjust(at->x, settings, *a);
  }
  raw_.clear();
  for (const Candidate& c : adjusted_) {
    raw_.push_back(x[c.id]);
    x[c.id] = -std::numeric_limits<float>::infinity();
  }
  return true;
}

void Sampler::put_back(float* x) {
  for (size_t n = 0; n < raw_.size(); ++n) x[adjusted_[n].id] = raw_[n];
  raw_.clear();
  adjusted_.clear();
}

double Sampler::peak(const float* most, int64_t chunks) const {
  double peak = -kInfinity;
  for (int64_t c = 0; c < chunks; ++c) {
    if (std::isnan(most[c])) return most[c];
    peak = std::max(peak, static_cast<double>(most[c]));
  }
  for (const Candidate& c : adjusted_) {
    if (std::isnan(c.x)) return c.x;
    peak = std::max(peak, c.x);
  }
  return peak;
}

int32_t Sampler::choose(const float* x, int64_t width, const isa::Sampling& s, const float* most,
                        const double* sums) {
  const int64_t chunks = (width + kChunk - 1) / kChunk;
  peak_ = peak(most, chunks);
  if (!std::isfinite(peak_)) return -1;
  if (s.temperature == 0.0f) return greedy(x, width, most);
  const double u = uniform(s.seed, s.draw), temperature = s.temperature;
  if (needs_sum(s) && s.top_p >= 1.0f) return draw_all(x, width, u, 1.0 / temperature, sums);
  double total = 0;
  if (s.top_k > 0) {
    keep_top_k(x, width, most, s.top_k);
    total = weigh();
  } else if (s.top_p < 1.0f) {
    for (int64_t c = 0; c < chunks; ++c) total += sums[c];
    for (const Candidate& c : adjusted_) total += std::exp(c.x - peak_);
  } else {
    // A little below the bound, since the comparison that counts is that of the weights.
    collect(x, width, most, peak_ + std::log(static_cast<double>(s.min_p)) - 1e-6);
    weigh();
  }
  if (s.top_p < 1.0f) keep_top_p(s.top_k > 0 ? nullptr : x, width, most, total, s.top_p);
  const double least = static_cast<double>(s.min_p) * candidates_.front().weight;
  std::erase_if(candidates_, [&](const Candidate& c) { return c.weight < least; });
  return draw(u, temperature);
}

int32_t Sampler::greedy(const float* x, int64_t width, const float* most) const {
  int32_t best = std::numeric_limits<int32_t>::max();
  for (const Candidate& c : adjusted_)
    if (c.x == peak_) best = std::min(best, c.id);
  for (int64_t c = 0; c * kChunk < width; ++c) {
    if (most[c] != peak_) continue;
    int64_t id = c * kChunk;
    while (x[id] != peak_) ++id;
    return std::min(best, static_cast<int32_t>(id));
  }
  return best;
}

// Over all ids: chunks give the sums, and only the chunk in which the draw falls is looked at.
int32_t Sampler::draw_all(const float* x, int64_t width, double u, double factor,
                          const double* sums) const {
  const int64_t chunks = (width + kChunk - 1) / kChunk;
  const auto weight = [&](double logit) { return std::exp((logit - peak_) * factor); };
  double total = 0;
  for (int64_t c = 0; c < chunks; ++c) total += sums[c];
  for (const Candidate& c : adjusted_) total += weight(c.x);
  const double target = u * total;
  double cumulative = 0;
  size_t next = 0;
  for (int64_t c = 0; c < chunks; ++c) {
    double sum = sums[c];
    size_t end = next;
    for (; end < adjusted_.size() && adjusted_[end].id < (c + 1) * kChunk; ++end)
      sum += weight(adjusted_[end].x);
    if (cumulative + sum <= target) {
      cumulative += sum;
      next = end;
      continue;
    }
    for (int64_t id = c * kChunk; id < std::min(width, (c + 1) * kChunk); ++id) {
      const bool own = next < end && adjusted_[next].id == id;
      cumulative += weight(own ? adjusted_[next++].x : x[id]);
      if (cumulative > target) return static_cast<int32_t>(id);
    }
  }
  return static_cast<int32_t>(width - 1);
}

// All ids whose logit is at least `least`, in no order.
void Sampler::collect(const float* x, int64_t width, const float* most, double least) {
  candidates_.clear();
  for (int64_t c = 0; c * kChunk < width; ++c) {
    if (most[c] < least) continue;
    for (int64_t id = c * kChunk; id < std::min(width, (c + 1) * kChunk); ++id)
      if (x[id] >= least && x[id] > -kInfinity)
        candidates_.push_back({x[id], static_cast<int32_t>(id)});
  }
  for (const Candidate& c : adjusted_)
    if (c.x >= least && c.x > -kInfinity) candidates_.push_back(c);
}

void Sampler::keep_top_k(const float* x, int64_t width, const float* most, int64_t k) {
  const int64_t chunks = (width + kChunk - 1) / kChunk;
  double least = -kInfinity;
  // The k largest chunk maxima are k logits: nothing below the least of them counts.
  if (k <= chunks) {
    order_.assign(most, most + chunks);
    std::nth_element(order_.begin(), order_.begin() + (k - 1), order_.end(), std::greater<float>());
    least = order_[static_cast<size_t>(k - 1)];
  }
  collect(x, width, most, least);
  if (k < static_cast<int64_t>(candidates_.size())) {
    std::nth_element(candidates_.begin(), candidates_.begin() + k, candidates_.end(),
                     larger_logit);
    candidates_.resize(static_cast<size_t>(k));
  }
}

// Gives the candidates weights, puts them in order, and returns the sum.
double Sampler::weigh() {
  for (Candidate& c : candidates_) c.weight = std::exp(c.x - peak_);
  std::sort(candidates_.begin(), candidates_.end(), larger_weight);
  double sum = 0;
  for (const Candidate& c : candidates_) sum += c.weight;
  return sum;
}

// Candidates become the shortest run of largest weights that reaches top_p of the total. Without a
// selection made before (x given) the candidates grow until they reach it.
void Sampler::keep_top_p(const float* x, int64_t width, const float* most, double total,
                         double top_p) {
  for (const double depth : {4.0, 8.0, 16.0, kInfinity}) {
    if (x) {
      collect(x, width, most, peak_ - depth);
      weigh();
    }
    double sum = 0;
    for (size_t n = 0; n < candidates_.size(); ++n) {
      sum += candidates_[n].weight / total;
      if (sum < top_p) continue;
      candidates_.resize(n + 1);
      return;
    }
    if (!x) return;
  }
}

int32_t Sampler::draw(double u, double temperature) {
  std::sort(candidates_.begin(), candidates_.end(), by_id);
  double total = 0;
  for (Candidate& c : candidates_) total += c.weight = std::exp((c.x - peak_) / temperature);
  double cumulative = 0;
  for (const Candidate& c : candidates_) {
    cumulative += c.weight;
    if (cumulative > u * total) return c.id;
  }
  return candidates_.back().id;
}

}  // namespace lmclock
