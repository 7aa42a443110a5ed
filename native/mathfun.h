// Vector functions: exp, tanh, the normal distribution, and the activations made of them.
//
// Errors are below 3 units in the last place (exp, tanh) or 8 (the others), measured against
// float64 in tests/test_kernels.py. NaN in, NaN out. Coefficients: own minimax fits.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace lmclock::LMCLOCK_PATH {

// 2^n for integers -126 <= n <= 127.
LM_INLINE f32x16 exp2_int(i32x16 n) { return as_f32(shl<23>(n + splat_i(127))); }

// e^x; 0 below -104, infinity above 88.73. x = n ln 2 + r, |r| <= ln 2 / 2; ln 2 is split so that n
// * high is exact. 2^n is applied as two factors: results may be subnormal.
LM_INLINE f32x16 exp(f32x16 x) {
  x = min(splat(89.0f), max(splat(-104.0f), x));  // the second operand passes NaN on
  const i32x16 n = round_i(x * splat(0x1.715476p0f));
  const f32x16 nf = to_f32(n);
  f32x16 r = fma(nf, splat(-0x1.62e4p-1f), x);
  r = fma(nf, splat(-0x1.7f7d1cp-20f), r);
  f32x16 p = splat(0x1.6d75e6p-10f);
  p = fma(p, r, splat(0x1.120be6p-7f));
  p = fma(p, r, splat(0x1.5554b8p-5f));
  p = fma(p, r, splat(0x1.5554dcp-3f));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r * r, r) + splat(1.0f);
  const i32x16 half = sra<1>(n);
  p = p * exp2_int(half) * exp2_int(n - half);
  return select(x == x, p, x);
}

LM_INLINE f32x16 sigmoid(f32x16 x) { return splat(1.0f) / (splat(1.0f) + exp(splat(0.0f) - x)); }

LM_INLINE f32x16 tanh(f32x16 x) {
  const f32x16 a = abs(x), u = x * x;
  f32x16 p = splat(-0x1.907ff8p-8f);
  p = fma(p, u, splat(0x1.5834d2p-6f));
  p = fma(p, u, splat(-0x1.b92b90p-5f));
  p = fma(p, u, splat(0x1.110e3cp-3f));
  p = fma(p, u, splat(-0x1.555552p-2f));
  const f32x16 small = fma(p * u, x, x);
  const f32x16 large = splat(1.0f) - splat(2.0f) / (exp(a + a) + splat(1.0f));
  const i32x16 sign = as_i32(x) & splat_i(static_cast<int32_t>(0x80000000));
  return select(a < splat(0.625f), small, as_f32(as_i32(large) | sign));
}

// erfc(a) e^(a a) for a >= 0, as t Q(t) with t = 1 / (1 + 0.4 a); fitted up to 10.1, where erfc
// underflows.
LM_INLINE f32x16 erfc_scaled(f32x16 a) {
  const f32x16 t = splat(1.0f) / fma(splat(0.4f), a, splat(1.0f));
  f32x16 p = splat(-0x1.de87aep-6f);
  p = fma(p, t, splat(0x1.91396p-3f));
  p = fma(p, t, splat(-0x1.f9b8p-2f));
  p = fma(p, t, splat(0x1.14e9p-1f));
  p = fma(p, t, splat(-0x1.1d932ep-2f));
  p = fma(p, t, splat(0x1.1394e4p-2f));
  p = fma(p, t, splat(0x1.0baacep-3f));
  p = fma(p, t, splat(0x1.b7b546p-3f));
  p = fma(p, t, splat(0x1.ccc162p-3f));
  p = fma(p, t, splat(0x1.ce3eb8p-3f));
  return p * t;
}

// e^(-x y) with the rounding error of x y put back in, which the exponential would multiply.
LM_INLINE f32x16 exp_minus_product(f32x16 x, f32x16 y) {
  const f32x16 product = x * y, minus = splat(0.0f) - product;
  const f32x16 e = exp(minus);
  return fma(e, splat(0.0f) - fma(x, y, minus), e);
}

// Probability that a standard normal variable is below x: erfc(-x / sqrt 2) / 2, relatively
// accurate in both tails. The clamp, beyond which all is 0 or 1, keeps infinity from becoming NaN.
LM_INLINE f32x16 normal_cdf(f32x16 x) {
  const f32x16 a = min(splat(20.0f), abs(x)), half = splat(0.5f) * a;
  const f32x16 tail =
      splat(0.5f) * erfc_scaled(a * splat(0x1.6a09e6p-1f)) * exp_minus_product(half, a);
  return select(x < splat(0.0f), tail, splat(1.0f) - tail);
}

LM_INLINE f32x16 relu(f32x16 x) { return max(splat(0.0f), x); }
LM_INLINE f32x16 silu(f32x16 x) { return x / (splat(1.0f) + exp(splat(0.0f) - x)); }
LM_INLINE f32x16 gelu(f32x16 x) { return x * normal_cdf(x); }
// x (1 + tanh(u)) / 2 written as x sigmoid(2 u), which does not cancel for negative x.
LM_INLINE f32x16 gelu_tanh(f32x16 x) {
  const f32x16 cubic = fma(x * x, splat(0.044715f), splat(1.0f));
  return x / (splat(1.0f) + exp(splat(-1.5957691216f) * x * cubic));
}

LM_INLINE f32x16 activation(GluKind kind, f32x16 x) {
  switch (kind) {
    case GluKind::silu: return silu(x);
    case GluKind::gelu_tanh: return gelu_tanh(x);
    case GluKind::gelu: return gelu(x);
    default: return relu(x);
  }
}

}  // namespace lmclock::LMCLOCK_PATH
