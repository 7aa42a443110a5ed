// The vector types of one SIMD path: 16 lanes of f32 (f32x16) and of 32-bit integers (i32x16).
//
// The one header through which kernels reach intrinsics. Each source that includes it is compiled
// once per path with -DLMCLOCK_PATH=scalar | avx2 | avx512 | neon ..., and everything lives in
// namespace lmclock::LMCLOCK_PATH: a function of one path must never be merged by the linker with
// that of another. For the same reason path sources use no templates or inline functions of the
// standard library that could be emitted out of line.
//
// All paths give the same bits for the same calls, reductions included, since each operation is
// exact or correctly rounded and its order is fixed (the one exception: `fma` of scalar, see there;
// and dot_bf16).
#pragma once

#include <cstdint>
#include <cstring>

#define LM_INLINE static inline __attribute__((always_inline))
#define LM_LAMBDA __attribute__((always_inline))

namespace lmclock::LMCLOCK_PATH {

template <int I>
struct Index {
  static constexpr int value = I;
  constexpr operator int() const { return I; }
};

// f(Index<0>), ..., f(Index<N-1>), each with a constant index, so that arrays of vectors stay in
// registers.
template <int N, int I = 0, class F>
LM_INLINE constexpr void unroll(F&& f) {
  if constexpr (I < N) {
    f(Index<I>{});
    unroll<N, I + 1>(f);
  }
}

}  // namespace lmclock::LMCLOCK_PATH

#if defined(__AVX512F__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#elif defined(__ARM_FEATURE_DOTPROD)
#include "simd_neon.h"
#else
#include "simd_scalar.h"
#endif

namespace lmclock::LMCLOCK_PATH {

#if !defined(LM_HAS_DOT_GROUP)
// sums[t] += g . x[t] for a few rows t; see dot.
template <int Bits, int N, int G>
LM_INLINE void dot_group(i32x16 (&sums)[G], const i32x16 (&g)[N], const int8_t* const (&x)[G]) {
  unroll<G>([&](auto t) LM_LAMBDA { sums[t] = dot<Bits, N>(sums[t], g, x[t]); });
}
#endif

LM_INLINE f32x16 from_bf16(i32x16 low_halves) { return as_f32(shl<16>(low_halves)); }

// x to the nearest bf16, ties to even, as the low 16 bits of each lane; NaN stays NaN. Subnormals
// are kept, unlike vcvtneps2bf16, so that all paths agree.
LM_INLINE i32x16 to_bf16(f32x16 x) {
  i32x16 u = as_i32(x);
  i32x16 rounded = shr<16>(u + splat_i(0x7fff) + (shr<16>(u) & splat_i(1)));
  return select(x == x, rounded, shr<16>(u) | splat_i(0x40));
}

LM_INLINE f32x16 abs(f32x16 x) { return as_f32(as_i32(x) & splat_i(0x7fffffff)); }

#if !defined(LM_HAS_TURN)
// Lane i of x[j] becomes lane j of x[i].
LM_INLINE void turn(i32x16 (&x)[16]) {
  int32_t from[16][16], to[16][16];
  for (int i = 0; i < 16; ++i) store_i(from[i], x[i]);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) to[i][j] = from[j][i];
  for (int i = 0; i < 16; ++i) x[i] = load_i(to[i]);
}
#endif

// Sum and maximum of the 16 lanes, halves first: lane i with i + 8, then 4, 2, 1.
#if !defined(LM_HAS_REDUCE)
template <class T, class F>
LM_INLINE T reduce_lanes(T (&v)[16], F&& combine) {
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v[i] = combine(v[i], v[i + half]);
  return v[0];
}
LM_INLINE float reduce_add(f32x16 x) {
  float v[16];
  store(v, x);
  return reduce_lanes(v, [](float a, float b) LM_LAMBDA { return a + b; });
}
LM_INLINE float reduce_max(f32x16 x) {
  float v[16];
  store(v, x);
  return reduce_lanes(v, [](float a, float b) LM_LAMBDA { return a > b ? a : b; });
}
LM_INLINE int32_t reduce_add(i32x16 x) {
  int32_t v[16];
  store_i(v, x);
  return reduce_lanes(v, [](int32_t a, int32_t b) LM_LAMBDA { return a + b; });
}
LM_INLINE int32_t reduce_max(i32x16 x) {
  int32_t v[16];
  store_i(v, x);
  return reduce_lanes(v, [](int32_t a, int32_t b) LM_LAMBDA { return a > b ? a : b; });
}
#endif

}  // namespace lmclock::LMCLOCK_PATH
