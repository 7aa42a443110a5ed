// norm: root-mean-square and layer normalisation of a row or of each of its groups.

#include "ops.h"

namespace lmclock::LMCLOCK_PATH {

namespace {

// The sum of add(acc, k, lanes) over a row, in an order that depends on the width only: four
// accumulators, because one addition after the other would wait for the one before.
template <class F>
LM_INLINE float row_sum(int64_t width, F&& add) {
  f32x16 acc[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
  int64_t k = 0;
  for (; k + 64 <= width; k += 64)
    unroll<4>([&](auto j) LM_LAMBDA { acc[j] = add(acc[j], k + 16 * j, int64_t{16}); });
  for (; k < width; k += 16) acc[0] = add(acc[0], k, width - k);
  return reduce_add((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

// Lanes from n on become zero.
LM_INLINE f32x16 first_lanes(f32x16 x, int64_t n) {
  if (n >= 16) return x;
  float lanes[16] = {};
  store_n(lanes, x, static_cast<int>(n));
  return load(lanes);
}

}  // namespace

void norm_row(const Norm& norm, const float* x, int64_t width, float* y) {
  const float count = static_cast<float>(width);
  float mean = 0.0f;
  if (norm.layer)
    mean = row_sum(width, [&](f32x16 acc, int64_t k, int64_t n) LM_LAMBDA {
             return acc + load_part(x + k, n);
           }) / count;
  const f32x16 centre = splat(mean);
  const float square = row_sum(width, [&](f32x16 acc, int64_t k, int64_t n) LM_LAMBDA {
    const f32x16 d = first_lanes(load_part(x + k, n) - centre, n);
    return fma(d, d, acc);
  });
  const float root = __builtin_sqrtf(square / count + norm.eps);
  const f32x16 factor = splat(1.0f / root);
  for (int64_t k = 0; k < width; k += 16) {
    const int64_t n = width - k;
    f32x16 v = (load_part(x + k, n) - centre) * factor;
    if (norm.weight) v = v * load_part(norm.weight + k, n);
    if (norm.bias) v = v + load_part(norm.bias + k, n);
    store_part(y + k, v, n);
  }
}

void op_norm(Frame& f, const isa::Instruction& i, Worker& w) {
  const Value &x = f.values[i.ins[0]], &y = f.values[i.outs[0]];
  const int64_t part = x.width / i.groups;
  const Norm norm = {i.weights[0] < 0 ? nullptr : f.weights[i.weights[0]].vector,
                     i.bias < 0 ? nullptr : f.weights[i.bias].vector,
                     i.kind == static_cast<int32_t>(isa::NormKind::layer), i.eps};
  const Share s = share(f, w, rows_of(f, x).count * i.groups);
  for (int64_t u = s.first; u < s.last; ++u) {
    const int64_t row = u / i.groups, at = u % i.groups * part;
    norm_row(norm, x.row(row) + at, part, y.row(row) + at);
  }
}

}  // namespace lmclock::LMCLOCK_PATH
