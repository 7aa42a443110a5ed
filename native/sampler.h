// Choosing one token from a row of logits whose scan is already done: selection and the draw.
//
// The rule is that of the instruction `sample`: penalties and biases, top_k, top_p, min_p on
// probabilities at temperature 1, then a draw at the row's temperature; all in float64, equal
// values in the order of their ids. A whole vocabulary is never sorted: the maxima of its chunks
// say where the largest logits are.
#pragma once

#include <cstdint>
#include <vector>

#include "isa.h"

namespace lmclock {

constexpr int64_t kChunk = 256;  // logits of one scanned chunk

struct Candidate {
  double x;  // logit
  int32_t id;
  double weight = 0;  // exp(x - largest x)
};

// What one thread needs to sample a row; kept between runs.
class Sampler {
 public:
  // Takes the adjusted logits of a row out of it (they become -infinity), to hold them in float64.
  // False when an id is not in the row.
  bool take(float* x, int64_t width, const isa::Sampling& settings, const isa::Adjust* begin,
            const isa::Adjust* end);
  void put_back(float* x);

  // The id drawn, or -1 when the largest logit is no finite number. `most` are the maxima of the
  // row's chunks, `sums` those of exp((x - max) * factor) where needs_sum() asks for them.
  int32_t choose(const float* x, int64_t width, const isa::Sampling& settings, const float* most,
                 const double* sums);
  // The largest logit, adjusted ones included; NaN when there is one.
  double peak(const float* most, int64_t chunks) const;

 private:
  int32_t greedy(const float* x, int64_t width, const float* most) const;
  int32_t draw_all(const float* x, int64_t width, double u, double factor,
                   const double* sums) const;
  void collect(const float* x, int64_t width, const float* most, double least);
  void keep_top_k(const float* x, int64_t width, const float* most, int64_t k);
  double weigh();
  void keep_top_p(const float* x, int64_t width, const float* most, double total, double top_p);
  int32_t draw(double u, double temperature);

  double peak_ = 0;
  std::vector<Candidate> adjusted_;     // by id
  std::vector<Candidate> candidates_;
  std::vector<float> raw_, order_;
};

// Whether the sum over the whole vocabulary is needed, and at which factor on the logits.
bool needs_sum(const isa::Sampling& s);
double sum_factor(const isa::Sampling& s);

}  // namespace lmclock
