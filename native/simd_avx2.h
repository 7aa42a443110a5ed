// simd.h on AVX2 with FMA and F16C: two 8-lane halves.
#pragma once

#include "simd_x86.h"

namespace lmclock::LMCLOCK_PATH {

// Rows of a tile, largest first: 2 registers each for 4 sums leave 8 for codes, scales and integer
// sums.
constexpr int kTileRows[] = {4, 2, 1};
constexpr int kDotRows = 4, kChainRows = 4;  // of them at once through a block of 32

struct f32x16 {
  __m256 lo, hi;
};
struct i32x16 {
  __m256i lo, hi;
};
struct mask16 {
  __m256 lo, hi;
};

LM_INLINE f32x16 splat(float x) {
  __m256 v = _mm256_set1_ps(x);
  return {v, v};
}
LM_INLINE f32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
LM_INLINE f32x16 load_n(const float* p, int n) {
  float v[16] = {};
  std::memcpy(v, p, 4 * static_cast<size_t>(n));
  return load(v);
}
LM_INLINE void store(float* p, f32x16 x) {
  _mm256_storeu_ps(p, x.lo);
  _mm256_storeu_ps(p + 8, x.hi);
}
LM_INLINE void store_n(float* p, f32x16 x, int n) {
  float v[16];
  store(v, x);
  std::memcpy(p, v, 4 * static_cast<size_t>(n));
}
LM_INLINE __m128i half_line(const void* p, int i) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p) + i);
}
LM_INLINE f32x16 load_f16(const void* p) {
  return {_mm256_cvtph_ps(half_line(p, 0)), _mm256_cvtph_ps(half_line(p, 1))};
}
LM_INLINE i32x16 load_u16(const void* p) {
  return {_mm256_cvtepu16_epi32(half_line(p, 0)), _mm256_cvtepu16_epi32(half_line(p, 1))};
}
// packs works within 128-bit halves: dwords 0-3, 8-11 | 4-7, 12-15 are put back in order.
LM_INLINE void store_u16(void* p, i32x16 x) {
  __m256i v = _mm256_packus_epi32(x.lo, x.hi);
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm256_permute4x64_epi64(v, 0xd8));
}

#define LM_BINARY(name, type, intrinsic) \
  LM_INLINE type name(type a, type b) { return {intrinsic(a.lo, b.lo), intrinsic(a.hi, b.hi)}; }
LM_BINARY(operator+, f32x16, _mm256_add_ps)
LM_BINARY(operator-, f32x16, _mm256_sub_ps)
LM_BINARY(operator*, f32x16, _mm256_mul_ps)
LM_BINARY(operator/, f32x16, _mm256_div_ps)
LM_BINARY(max, f32x16, _mm256_max_ps)
LM_BINARY(min, f32x16, _mm256_min_ps)
LM_BINARY(operator+, i32x16, _mm256_add_epi32)
LM_BINARY(operator-, i32x16, _mm256_sub_epi32)
LM_BINARY(operator&, i32x16, _mm256_and_si256)
LM_BINARY(operator|, i32x16, _mm256_or_si256)
LM_BINARY(operator^, i32x16, _mm256_xor_si256)
LM_BINARY(max_i, i32x16, _mm256_max_epi32)
LM_BINARY(add_bytes, i32x16, _mm256_add_epi8)
#undef LM_BINARY
LM_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
LM_INLINE f32x16 sqrt(f32x16 a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
LM_INLINE mask16 operator==(f32x16 a, f32x16 b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_EQ_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_EQ_OQ)};
}
LM_INLINE mask16 operator<(f32x16 a, f32x16 b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ)};
}
LM_INLINE f32x16 select(mask16 m, f32x16 a, f32x16 b) {
  return {_mm256_blendv_ps(b.lo, a.lo, m.lo), _mm256_blendv_ps(b.hi, a.hi, m.hi)};
}
LM_INLINE i32x16 select(mask16 m, i32x16 a, i32x16 b) {
  return {_mm256_blendv_epi8(b.lo, a.lo, _mm256_castps_si256(m.lo)),
          _mm256_blendv_epi8(b.hi, a.hi, _mm256_castps_si256(m.hi))};
}

LM_INLINE i32x16 splat_i(int32_t x) {
  __m256i v = _mm256_set1_epi32(x);
  return {v, v};
}
LM_INLINE i32x16 load_i(const void* p) {
  const __m256i* q = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
LM_INLINE void store_i(void* p, i32x16 x) {
  __m256i* q = static_cast<__m256i*>(p);
  _mm256_storeu_si256(q, x.lo);
  _mm256_storeu_si256(q + 1, x.hi);
}
template <int N>
LM_INLINE i32x16 shl(i32x16 a) {
  return {_mm256_slli_epi32(a.lo, N), _mm256_slli_epi32(a.hi, N)};
}
template <int N>
LM_INLINE i32x16 shr(i32x16 a) {
  return {_mm256_srli_epi32(a.lo, N), _mm256_srli_epi32(a.hi, N)};
}
template <int N>
LM_INLINE i32x16 sra(i32x16 a) {
  return {_mm256_srai_epi32(a.lo, N), _mm256_srai_epi32(a.hi, N)};
}

LM_INLINE f32x16 to_f32(i32x16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
LM_INLINE i32x16 round_i(f32x16 a) {  // MXCSR's rounding, which nobody here changes: nearest even
  return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)};
}
LM_INLINE i32x16 as_i32(f32x16 a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }
LM_INLINE f32x16 as_f32(i32x16 a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }
LM_INLINE void store_i8(void* p, i32x16 x) {
  __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.lo, x.hi), 0xd8);
  __m128i bytes =
      _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(static_cast<__m128i*>(p), bytes);
}

LM_INLINE i32x16 load_i8(const void* p) {
  const __m128i bytes = half_line(p, 0);
  return {_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))};
}

LM_INLINE __m256i broadcast4(const void* x) {
  int32_t v;
  std::memcpy(&v, x, 4);
  return _mm256_set1_epi32(v);
}

// Sums of pairs of products in 16 bits. Unsigned codes below 2^Bits times |x| <= 127: a pair stays
// under 2^(Bits + 8), so that 16 >> (Bits - 3) of them add up without overflow. 8 bits: |code| <=
// 128 carries the sign over to x, and 2 x 128 x 127 = 32512 still fits.
template <int Bits>
LM_INLINE __m256i pairs(__m256i codes, __m256i x) {
  if constexpr (Bits < 8) return _mm256_maddubs_epi16(codes, x);
  __m256i w = _mm256_xor_si256(codes, _mm256_set1_epi8(static_cast<char>(0x80)));
  return _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
}

// init + g . x; see simd_avx512.h. Here 8-bit codes take no start.
template <int Bits, int N>
LM_INLINE i32x16 dot(i32x16 init, const i32x16 (&g)[N], const int8_t* x) {
  constexpr int kGroup = Bits <= 4 ? 8 : Bits == 5 ? 4 : Bits == 6 ? 2 : 1;
  const __m256i ones = _mm256_set1_epi16(1);
  i32x16 sum = Bits == 8 ? i32x16{_mm256_setzero_si256(), _mm256_setzero_si256()} : init;
  unroll<(N + kGroup - 1) / kGroup>([&](auto part) LM_LAMBDA {
    constexpr int first = part * kGroup;
    __m256i b = broadcast4(x + 4 * first);
    __m256i lo = pairs<Bits>(g[first].lo, b), hi = pairs<Bits>(g[first].hi, b);
    unroll<(N - first < kGroup ? N - first : kGroup) - 1>([&](auto i) LM_LAMBDA {
      constexpr int at = first + 1 + i;
      b = broadcast4(x + 4 * at);
      lo = _mm256_add_epi16(lo, pairs<Bits>(g[at].lo, b));
      hi = _mm256_add_epi16(hi, pairs<Bits>(g[at].hi, b));
    });
    sum.lo = _mm256_add_epi32(sum.lo, _mm256_madd_epi16(lo, ones));
    sum.hi = _mm256_add_epi32(sum.hi, _mm256_madd_epi16(hi, ones));
  });
  return sum;
}

// A code vector of 8 bits is made ready for all rows at once, which is a third of its work.
#define LM_HAS_DOT_GROUP
template <int Bits, int N, int G>
LM_INLINE void dot_group(i32x16 (&sums)[G], const i32x16 (&g)[N], const int8_t* const (&x)[G]) {
  if constexpr (Bits < 8) {
    unroll<G>([&](auto t) LM_LAMBDA { sums[t] = dot<Bits, N>(sums[t], g, x[t]); });
  } else {
    unroll<G>([&](auto t) LM_LAMBDA { sums[t] = splat_i(0); });
    unroll<N>([&](auto i) LM_LAMBDA {
      const i32x16 one[1] = {g[i]};
      unroll<G>([&](auto t) LM_LAMBDA {
        const i32x16 part = dot<Bits, 1>(sums[t], one, x[t] + 4 * i);
        sums[t] = {_mm256_add_epi32(sums[t].lo, part.lo), _mm256_add_epi32(sums[t].hi, part.hi)};
      });
    });
  }
}

#define LM_HAS_REDUCE
LM_INLINE float reduce_add(f32x16 x) { return reduce_add_8(_mm256_add_ps(x.lo, x.hi)); }
LM_INLINE float reduce_max(f32x16 x) { return reduce_max_8(_mm256_max_ps(x.lo, x.hi)); }
LM_INLINE int32_t reduce_add(i32x16 x) { return reduce_add_8(_mm256_add_epi32(x.lo, x.hi)); }
LM_INLINE int32_t reduce_max(i32x16 x) { return reduce_max_8(_mm256_max_epi32(x.lo, x.hi)); }

LM_INLINE f32x16 dot_bf16(f32x16 acc, i32x16 a, const void* x) {
  __m256i pair = broadcast4(x), high = _mm256_set1_epi32(static_cast<int>(0xffff0000));
  f32x16 even = as_f32(shl<16>(a)), odd = as_f32(a & i32x16{high, high});
  __m256 x0 = _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16));
  __m256 x1 = _mm256_castsi256_ps(_mm256_and_si256(pair, high));
  return fma(odd, {x1, x1}, fma(even, {x0, x0}, acc));
}

}  // namespace lmclock::LMCLOCK_PATH
