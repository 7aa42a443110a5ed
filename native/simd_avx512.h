// simd.h on AVX-512 (F, BW, VL, DQ, VNNI, BF16). See simd.h for the rules.
#pragma once

#include "simd_x86.h"

namespace lmclock::LMCLOCK_PATH {

// Rows of a tile, largest first: 16 sums, 8 code vectors, 2 scales, 4 integer sums and a mask fill
// 31 of 32 registers.
constexpr int kTileRows[] = {16, 8, 4, 2, 1};
// Of them at once through a block of 32, and in whole chains; see dot_group.
constexpr int kDotRows = 2, kChainRows = 4;

struct f32x16 {
  __m512 v;
};
struct i32x16 {
  __m512i v;
};
struct mask16 {
  __mmask16 v;
};

LM_INLINE __mmask16 lanes(int n) { return static_cast<__mmask16>((1u << n) - 1); }

LM_INLINE f32x16 splat(float x) { return {_mm512_set1_ps(x)}; }
LM_INLINE f32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
LM_INLINE f32x16 load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(lanes(n), p)}; }
LM_INLINE void store(float* p, f32x16 x) { _mm512_storeu_ps(p, x.v); }
LM_INLINE void store_n(float* p, f32x16 x, int n) { _mm512_mask_storeu_ps(p, lanes(n), x.v); }
LM_INLINE f32x16 load_f16(const void* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)))};
}
LM_INLINE i32x16 load_u16(const void* p) {
  return {_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)))};
}
LM_INLINE void store_u16(void* p, i32x16 x) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(x.v));
}

LM_INLINE f32x16 operator+(f32x16 a, f32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
LM_INLINE f32x16 operator-(f32x16 a, f32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
LM_INLINE f32x16 operator*(f32x16 a, f32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
LM_INLINE f32x16 operator/(f32x16 a, f32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
LM_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// a > b ? a : b and a < b ? a : b: the second operand where either is NaN.
LM_INLINE f32x16 max(f32x16 a, f32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
LM_INLINE f32x16 min(f32x16 a, f32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
LM_INLINE f32x16 sqrt(f32x16 a) { return {_mm512_sqrt_ps(a.v)}; }
LM_INLINE mask16 operator==(f32x16 a, f32x16 b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)};
}
LM_INLINE mask16 operator<(f32x16 a, f32x16 b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)};
}
LM_INLINE bool all(mask16 m) { return m.v == 0xffff; }
LM_INLINE f32x16 select(mask16 m, f32x16 a, f32x16 b) {
  return {_mm512_mask_blend_ps(m.v, b.v, a.v)};
}
LM_INLINE i32x16 select(mask16 m, i32x16 a, i32x16 b) {
  return {_mm512_mask_blend_epi32(m.v, b.v, a.v)};
}

LM_INLINE i32x16 splat_i(int32_t x) { return {_mm512_set1_epi32(x)}; }
LM_INLINE i32x16 load_i(const void* p) { return {_mm512_loadu_si512(p)}; }
LM_INLINE void store_i(void* p, i32x16 x) { _mm512_storeu_si512(p, x.v); }
LM_INLINE i32x16 operator+(i32x16 a, i32x16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
LM_INLINE i32x16 operator-(i32x16 a, i32x16 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
LM_INLINE i32x16 operator&(i32x16 a, i32x16 b) { return {_mm512_and_si512(a.v, b.v)}; }
LM_INLINE i32x16 operator|(i32x16 a, i32x16 b) { return {_mm512_or_si512(a.v, b.v)}; }
LM_INLINE i32x16 operator^(i32x16 a, i32x16 b) { return {_mm512_xor_si512(a.v, b.v)}; }
template <int N>
LM_INLINE i32x16 shl(i32x16 a) {
  return {_mm512_slli_epi32(a.v, N)};
}
template <int N>
LM_INLINE i32x16 shr(i32x16 a) {
  return {_mm512_srli_epi32(a.v, N)};
}
template <int N>
LM_INLINE i32x16 sra(i32x16 a) {
  return {_mm512_srai_epi32(a.v, N)};
}
LM_INLINE i32x16 max_i(i32x16 a, i32x16 b) { return {_mm512_max_epi32(a.v, b.v)}; }
LM_INLINE i32x16 add_bytes(i32x16 a, i32x16 b) { return {_mm512_add_epi8(a.v, b.v)}; }

LM_INLINE f32x16 to_f32(i32x16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
LM_INLINE i32x16 round_i(f32x16 a) {  // nearest, ties to even
  return {_mm512_cvt_roundps_epi32(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
LM_INLINE i32x16 as_i32(f32x16 a) { return {_mm512_castps_si512(a.v)}; }
LM_INLINE f32x16 as_f32(i32x16 a) { return {_mm512_castsi512_ps(a.v)}; }

// Lanes as signed bytes; the values must lie in -128..127.
LM_INLINE void store_i8(void* p, i32x16 x) {
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x.v));
}

LM_INLINE i32x16 load_i8(const void* p) {
  return {_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)))};
}

// a = 4 unsigned bytes a lane, x = 4 signed bytes for all lanes: acc + their dot product. GCC does
// not fold the broadcast into the instruction by itself, which would cost a load uop and a register
// each time.
LM_INLINE i32x16 dot_u8(i32x16 acc, i32x16 a, const int8_t* x) {
  asm volatile("vpdpbusd %2%{1to16%}, %1, %0"
               : "+v"(acc.v)
               : "v"(a.v), "m"(*reinterpret_cast<const int32_t*>(x)));
  return acc;
}

// The same with 16 times 4 signed bytes in x: the processor's own rate, no load involved.
LM_INLINE i32x16 dot_vector(i32x16 acc, i32x16 a, i32x16 x) {
  return {_mm512_dpbusd_epi32(acc.v, a.v, x.v)};
}

template <int I, int N>
LM_INLINE i32x16 dot_from(i32x16 acc, const i32x16 (&g)[N], const int8_t* x) {
  if constexpr (I < N) return dot_from<I + 1>(dot_u8(acc, g[I], x + 4 * I), g, x);
  return acc;
}

// init + sum over N code vectors g of (unsigned codes of at most Bits bits) . x[4 N]. 8-bit codes
// are stored ^0x80 and init must be -128 sum(x): the result is the dot product of the signed codes,
// and other paths need no init.
template <int Bits, int N>
LM_INLINE i32x16 dot(i32x16 init, const i32x16 (&g)[N], const int8_t* x) {
  return dot_from<0>(init, g, x);
}

// sums[t] = dot(sums[t], g, x[t]) for a few rows, interleaved: one row is a chain of N instructions
// of latency 4 or 5, and the scheduler (97 entries on Golden Cove) does not look past enough of them
// to keep two ports busy. On Zen 5 two rows of 8 vectors as two sums of 4 reach 70 % of the peak,
// four rows in whole chains 67 %: adding the two sums costs no port of theirs. On Golden Cove it
// costs one: 55 and 58 % (q4_1), 62 and 65 % (q8_0).
#define LM_HAS_DOT_GROUP
#define LM_HAS_DOT_VECTOR  // one instruction for 64 products
template <int I, int End, int T, int N, int G>
LM_INLINE void dot_group_from(i32x16 (&sums)[G], const i32x16 (&g)[N],
                              const int8_t* const (&x)[G]) {
  if constexpr (T == G) {
    if constexpr (I + 1 < End) dot_group_from<I + 1, End, 0>(sums, g, x);
  } else {
    sums[T] = dot_u8(sums[T], g[I], x[T] + 4 * I);
    dot_group_from<I, End, T + 1>(sums, g, x);
  }
}
template <int Bits, int N, int G>
LM_INLINE void dot_group(i32x16 (&sums)[G], const i32x16 (&g)[N], const int8_t* const (&x)[G]) {
  constexpr int half = G > 2 || N < 8 ? N : N / 2;
  dot_group_from<0, half, 0>(sums, g, x);
  if constexpr (half < N) {
    i32x16 more[G];
    unroll<G>([&](auto t) LM_LAMBDA { more[t] = splat_i(0); });
    dot_group_from<half, N, 0>(more, g, x);
    unroll<G>([&](auto t) LM_LAMBDA { sums[t] = sums[t] + more[t]; });
  }
}

// a in the low halves, b in the high ones, rounded to bf16; subnormals become zero.
#define LM_HAS_PAIRS
LM_INLINE i32x16 pair_bf16(f32x16 a, f32x16 b) {
  alignas(64) static constexpr uint16_t kTurns[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b.v, a.v));
  return {_mm512_permutexvar_epi16(_mm512_load_si512(kTurns), both)};
}

// The same for integers that fit 16 bits, and their products: acc + x[0] a[0] + x[1] a[1].
LM_INLINE i32x16 pair_i16(i32x16 a, i32x16 b) {
  return {_mm512_mask_blend_epi16(0xaaaaaaaa, a.v, _mm512_slli_epi32(b.v, 16))};
}
LM_INLINE i32x16 dot_i16(i32x16 acc, i32x16 a, i32x16 x) {
  asm volatile("vpdpwssd %2, %1, %0" : "+v"(acc.v) : "v"(a.v), "v"(x.v));
  return acc;
}

#define LM_HAS_REDUCE
LM_INLINE __m256 high(__m512 x) { return _mm512_extractf32x8_ps(x, 1); }
LM_INLINE __m256i high(__m512i x) { return _mm512_extracti64x4_epi64(x, 1); }
LM_INLINE float reduce_add(f32x16 x) {
  return reduce_add_8(_mm256_add_ps(_mm512_castps512_ps256(x.v), high(x.v)));
}
LM_INLINE float reduce_max(f32x16 x) {
  return reduce_max_8(_mm256_max_ps(_mm512_castps512_ps256(x.v), high(x.v)));
}
LM_INLINE int32_t reduce_add(i32x16 x) {
  return reduce_add_8(_mm256_add_epi32(_mm512_castsi512_si256(x.v), high(x.v)));
}
LM_INLINE int32_t reduce_max(i32x16 x) {
  return reduce_max_8(_mm256_max_epi32(_mm512_castsi512_si256(x.v), high(x.v)));
}

// Between the quarters of 4 lanes. Lane i of quarter q of x[j] becomes lane j of quarter q of x[i].
#define LM_HAS_QUARTERS
LM_INLINE void turn_quarters(i32x16 (&x)[4]) {
  const __m512i a = _mm512_unpacklo_epi32(x[0].v, x[1].v);
  const __m512i b = _mm512_unpacklo_epi32(x[2].v, x[3].v);
  const __m512i c = _mm512_unpackhi_epi32(x[0].v, x[1].v);
  const __m512i d = _mm512_unpackhi_epi32(x[2].v, x[3].v);
  x[0].v = _mm512_unpacklo_epi64(a, b);
  x[1].v = _mm512_unpackhi_epi64(a, b);
  x[2].v = _mm512_unpacklo_epi64(c, d);
  x[3].v = _mm512_unpackhi_epi64(c, d);
}
// Lane i of x[j] becomes lane j of x[i].
#define LM_HAS_TURN
LM_INLINE void turn(i32x16 (&x)[16]) {
  unroll<4>([&](auto i) LM_LAMBDA {
    turn_quarters(reinterpret_cast<i32x16(&)[4]>(x[4 * i]));
  });
  unroll<4>([&](auto i) LM_LAMBDA {
    const __m512i a = x[i].v, b = x[4 + i].v, c = x[8 + i].v, d = x[12 + i].v;
    const __m512i p = _mm512_shuffle_i64x2(a, b, 0x44), q = _mm512_shuffle_i64x2(c, d, 0x44);
    const __m512i r = _mm512_shuffle_i64x2(a, b, 0xee), s = _mm512_shuffle_i64x2(c, d, 0xee);
    x[i].v = _mm512_shuffle_i64x2(p, q, 0x88);
    x[4 + i].v = _mm512_shuffle_i64x2(p, q, 0xdd);
    x[8 + i].v = _mm512_shuffle_i64x2(r, s, 0x88);
    x[12 + i].v = _mm512_shuffle_i64x2(r, s, 0xdd);
  });
}
// Quarters a0 a1 b0 b1; a2 a3 b2 b3; those of x as 1 0 3 2; a0 b1 a2 b3.
LM_INLINE i32x16 low_halves(i32x16 a, i32x16 b) { return {_mm512_shuffle_i64x2(a.v, b.v, 0x44)}; }
LM_INLINE i32x16 high_halves(i32x16 a, i32x16 b) { return {_mm512_shuffle_i64x2(a.v, b.v, 0xee)}; }
LM_INLINE i32x16 swap_quarters(i32x16 x) { return {_mm512_shuffle_i64x2(x.v, x.v, 0xb1)}; }
LM_INLINE i32x16 alternate(i32x16 a, i32x16 b) {
  return {_mm512_mask_blend_epi32(0xf0f0, a.v, b.v)};
}
LM_INLINE void store_halves(void* low, void* high, i32x16 x) {
  _mm256_storeu_si256(static_cast<__m256i*>(low), _mm512_castsi512_si256(x.v));
  _mm256_storeu_si256(static_cast<__m256i*>(high), _mm512_extracti64x4_epi64(x.v, 1));
}
// The lanes of a, b, c and d as signed bytes, in this order.
LM_INLINE i32x16 pack_i8(i32x16 a, i32x16 b, i32x16 c, i32x16 d) {
  const __m512i ab = _mm512_packs_epi32(a.v, b.v), cd = _mm512_packs_epi32(c.v, d.v);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return {_mm512_permutexvar_epi32(order, _mm512_packs_epi16(ab, cd))};
}
// Each lane: the sum of its four signed bytes.
LM_INLINE i32x16 sum_bytes(i32x16 x) {
  return {_mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), x.v)};
}

// acc + x[0] a[0] + x[1] a[1] for pairs of bf16; x one pair for all lanes.
LM_INLINE f32x16 dot_bf16(f32x16 acc, i32x16 a, const void* x) {
  asm("vdpbf16ps %2%{1to16%}, %1, %0"
      : "+v"(acc.v)
      : "v"(a.v), "m"(*static_cast<const int32_t*>(x)));
  return acc;
}

LM_INLINE f32x16 dot_bf16(f32x16 acc, i32x16 a, i32x16 x) {
  asm volatile("vdpbf16ps %2, %1, %0" : "+v"(acc.v) : "v"(a.v), "v"(x.v));
  return acc;
}

}  // namespace lmclock::LMCLOCK_PATH
