// sample: the scan of the logits, shared out over the threads; the choice itself is sampler.cc.

#include "ops.h"
#include "sampler.h"

namespace lmclock::LMCLOCK_PATH {

namespace {

// The largest of the logits, infinity when one of them is no number. Four maxima side by side,
// since one would wait for the other.
float scan_chunk(const float* x, int64_t count) {
  f32x16 most[4];
  unroll<4>([&](auto j) LM_LAMBDA { most[j] = splat(-__builtin_inff()); });
  const f32x16 bad = splat(__builtin_inff());
  const auto take = [&](f32x16& m, f32x16 v) LM_LAMBDA { m = max(select(v == v, v, bad), m); };
  int64_t k = 0;
  for (; k + 64 <= count; k += 64)
    unroll<4>([&](auto j) LM_LAMBDA { take(most[j], load(x + k + 16 * j)); });
  for (; k + 16 <= count; k += 16) take(most[0], load(x + k));
  if (k < count) {
    float lanes[16];
    store(lanes, splat(x[k]));
    store_n(lanes, load_n(x + k, static_cast<int>(count - k)), static_cast<int>(count - k));
    take(most[0], load(lanes));
  }
  return reduce_max(max(max(most[0], most[1]), max(most[2], most[3])));
}

// e^y for y <= 0, to about 1 unit in the last place; the loop around it is vectorised.
LM_INLINE double exp64(double y) {
  constexpr double kMagic = 0x1.8p52;
  y = y < -708.0 ? -708.0 : y;
  const double shifted = y * 0x1.71547652b82fep0 + kMagic, n = shifted - kMagic;
  const double r = (y - n * 0x1.62e42fefa38p-1) - n * 0x1.ef35793c7673p-45;
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  int64_t bits, exponent;
  std::memcpy(&exponent, &shifted, 8);
  std::memcpy(&bits, &p, 8);
  bits += static_cast<int64_t>(static_cast<uint64_t>(exponent) << 52);
  std::memcpy(&p, &bits, 8);
  return p;
}

double sum_chunk(const float* x, int64_t count, double peak, double factor) {
  double lanes[8] = {};
  int64_t k = 0;
  for (; k + 8 <= count; k += 8)
    for (int j = 0; j < 8; ++j)
      lanes[j] += exp64((static_cast<double>(x[k + j]) - peak) * factor);
  for (; k < count; ++k) lanes[0] += exp64((static_cast<double>(x[k]) - peak) * factor);
  return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) +
         ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
}

}  // namespace

void op_sample(Frame& f, const isa::Instruction& i, Worker& w) {
  const Value &logits = f.values[i.ins[0]], &next = f.values[i.outs[0]];
  const int64_t rows = rows_of(f, logits).count, width = logits.width;
  const int64_t chunks = (width + kChunk - 1) / kChunk;
  float* most = f.shared;
  double* sums = reinterpret_cast<double*>(f.shared + (rows * chunks + 1) / 2 * 2);
  bool adjusted = false, summed = false;
  for (int64_t r = 0; r < rows; ++r) {
    adjusted |= f.adjust_starts[r] != f.adjust_starts[r + 1];
    summed |= needs_sum(f.sampling[r]);
  }
  if (adjusted) {
    for (int64_t r = w.thread; r < rows; r += f.threads)
      if (!f.samplers[r].take(logits.row(r), width, f.sampling[r], f.adjust + f.adjust_starts[r],
                              f.adjust + f.adjust_starts[r + 1]))
        f.fault->raise(Fault::row_out_of_range, i, r, width);
    barrier(f);
  }
  const Share mine = share(f, w, rows * chunks);
  const auto each = [&](auto&& visit) LM_LAMBDA {
    for (int64_t u = mine.first; u < mine.last; ++u) {
      const int64_t r = u / chunks, at = u % chunks * kChunk;
      visit(u, r, logits.row(r) + at, smaller(kChunk, width - at));
    }
  };
  each([&](int64_t u, int64_t, const float* x, int64_t n) LM_LAMBDA {
    most[u] = scan_chunk(x, n);
  });
  barrier(f);
  if (summed) {
    int64_t known = -1;
    double peak = 0;
    each([&](int64_t u, int64_t r, const float* x, int64_t n) LM_LAMBDA {
      if (!needs_sum(f.sampling[r])) return;
      if (r != known) peak = f.samplers[r].peak(most + r * chunks, chunks), known = r;
      sums[u] = sum_chunk(x, n, peak, sum_factor(f.sampling[r]));
    });
    barrier(f);
  }
  for (int64_t r = w.thread; r < rows; r += f.threads) {
    Sampler& sampler = f.samplers[r];
    const int32_t id = sampler.choose(logits.row(r), width, f.sampling[r], most + r * chunks,
                                      sums + r * chunks);
    if (id < 0) f.fault->raise(Fault::logits_not_finite, i, r, rows);
    next.ids_row(r)[0] = id < 0 ? 0 : id;
    if (adjusted) sampler.put_back(logits.row(r));
  }
}

}  // namespace lmclock::LMCLOCK_PATH
