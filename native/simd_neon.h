// simd.h on NEON with dot products (path neon), and with those of mixed signs and of bf16 (path
// neon_i8mm): four quarters of 4 lanes.
#pragma once

#include <arm_neon.h>

namespace lmclock::LMCLOCK_PATH {

// Rows of a tile, largest first. 32 registers of 4 lanes hold what AVX2's 16 of 8 do.
constexpr int kTileRows[] = {4, 2, 1};
constexpr int kDotRows = 4, kChainRows = 4;  // of them at once through a block of 32

struct f32x16 {
  float32x4_t q[4];
};
struct i32x16 {
  int32x4_t q[4];
};
struct mask16 {
  uint32x4_t q[4];
};

// {f(0), f(1), f(2), f(3)}
template <class V, class F>
LM_INLINE V quarters(F&& f) {
  return {{f(Index<0>{}), f(Index<1>{}), f(Index<2>{}), f(Index<3>{})}};
}
#define LM_QUARTERS(type, expression) \
  quarters<type>([&](auto i) LM_LAMBDA { return expression; })

LM_INLINE f32x16 splat(float x) {
  return LM_QUARTERS(f32x16, (static_cast<void>(i), vdupq_n_f32(x)));
}
LM_INLINE f32x16 load(const float* p) { return LM_QUARTERS(f32x16, vld1q_f32(p + 4 * i)); }
LM_INLINE f32x16 load_n(const float* p, int n) {
  float v[16] = {};
  std::memcpy(v, p, 4 * static_cast<size_t>(n));
  return load(v);
}
LM_INLINE void store(float* p, f32x16 x) {
  unroll<4>([&](auto i) LM_LAMBDA { vst1q_f32(p + 4 * i, x.q[i]); });
}
LM_INLINE void store_n(float* p, f32x16 x, int n) {
  float v[16];
  store(v, x);
  std::memcpy(p, v, 4 * static_cast<size_t>(n));
}
// Memory of any alignment, as bytes.
LM_INLINE uint16x4_t four_u16(const void* p, int i) {
  return vreinterpret_u16_u8(vld1_u8(static_cast<const uint8_t*>(p) + 8 * i));
}
LM_INLINE f32x16 load_f16(const void* p) {
  return LM_QUARTERS(f32x16, vcvt_f32_f16(vreinterpret_f16_u16(four_u16(p, i))));
}
LM_INLINE i32x16 load_u16(const void* p) {
  return LM_QUARTERS(i32x16, vreinterpretq_s32_u32(vmovl_u16(four_u16(p, i))));
}
LM_INLINE void store_u16(void* p, i32x16 x) {
  uint8_t* to = static_cast<uint8_t*>(p);
  unroll<4>([&](auto i) LM_LAMBDA {
    vst1_u8(to + 8 * i, vreinterpret_u8_s16(vmovn_s32(x.q[i])));
  });
}

#define LM_BINARY(name, type, intrinsic) \
  LM_INLINE type name(type a, type b) { return LM_QUARTERS(type, intrinsic(a.q[i], b.q[i])); }
LM_BINARY(operator+, f32x16, vaddq_f32)
LM_BINARY(operator-, f32x16, vsubq_f32)
LM_BINARY(operator*, f32x16, vmulq_f32)
LM_BINARY(operator/, f32x16, vdivq_f32)
LM_BINARY(operator+, i32x16, vaddq_s32)
LM_BINARY(operator-, i32x16, vsubq_s32)
LM_BINARY(operator&, i32x16, vandq_s32)
LM_BINARY(operator|, i32x16, vorrq_s32)
LM_BINARY(operator^, i32x16, veorq_s32)
LM_BINARY(max_i, i32x16, vmaxq_s32)
#undef LM_BINARY
LM_INLINE int8x16_t bytes(int32x4_t a) { return vreinterpretq_s8_s32(a); }
LM_INLINE i32x16 add_bytes(i32x16 a, i32x16 b) {
  return LM_QUARTERS(i32x16, vreinterpretq_s32_s8(vaddq_s8(bytes(a.q[i]), bytes(b.q[i]))));
}
// a > b ? a : b and a < b ? a : b: the second operand where either is NaN, which FMAX and FMIN pass
// on instead.
LM_INLINE f32x16 max(f32x16 a, f32x16 b) {
  return LM_QUARTERS(f32x16, vbslq_f32(vcgtq_f32(a.q[i], b.q[i]), a.q[i], b.q[i]));
}
LM_INLINE f32x16 min(f32x16 a, f32x16 b) {
  return LM_QUARTERS(f32x16, vbslq_f32(vcltq_f32(a.q[i], b.q[i]), a.q[i], b.q[i]));
}
LM_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
  return LM_QUARTERS(f32x16, vfmaq_f32(c.q[i], a.q[i], b.q[i]));
}
LM_INLINE f32x16 sqrt(f32x16 a) { return LM_QUARTERS(f32x16, vsqrtq_f32(a.q[i])); }
LM_INLINE mask16 operator==(f32x16 a, f32x16 b) {
  return LM_QUARTERS(mask16, vceqq_f32(a.q[i], b.q[i]));
}
LM_INLINE mask16 operator<(f32x16 a, f32x16 b) {
  return LM_QUARTERS(mask16, vcltq_f32(a.q[i], b.q[i]));
}
LM_INLINE f32x16 select(mask16 m, f32x16 a, f32x16 b) {
  return LM_QUARTERS(f32x16, vbslq_f32(m.q[i], a.q[i], b.q[i]));
}
LM_INLINE i32x16 select(mask16 m, i32x16 a, i32x16 b) {
  return LM_QUARTERS(i32x16, vbslq_s32(m.q[i], a.q[i], b.q[i]));
}

LM_INLINE i32x16 splat_i(int32_t x) {
  return LM_QUARTERS(i32x16, (static_cast<void>(i), vdupq_n_s32(x)));
}
LM_INLINE i32x16 load_i(const void* p) {
  const uint8_t* from = static_cast<const uint8_t*>(p);
  return LM_QUARTERS(i32x16, vreinterpretq_s32_u8(vld1q_u8(from + 16 * i)));
}
LM_INLINE void store_i(void* p, i32x16 x) {
  uint8_t* to = static_cast<uint8_t*>(p);
  unroll<4>([&](auto i) LM_LAMBDA { vst1q_u8(to + 16 * i, vreinterpretq_u8_s32(x.q[i])); });
}
template <int N>
LM_INLINE i32x16 shl(i32x16 a) {
  return LM_QUARTERS(i32x16, vshlq_n_s32(a.q[i], N));
}
// The instructions shift to the right by 1 at least.
template <int N>
LM_INLINE i32x16 shr(i32x16 a) {
  if constexpr (N == 0) return a;
  else
    return LM_QUARTERS(i32x16, vreinterpretq_s32_u32(
                                   vshrq_n_u32(vreinterpretq_u32_s32(a.q[i]), N)));
}
template <int N>
LM_INLINE i32x16 sra(i32x16 a) {
  if constexpr (N == 0) return a;
  else return LM_QUARTERS(i32x16, vshrq_n_s32(a.q[i], N));
}

LM_INLINE f32x16 to_f32(i32x16 a) { return LM_QUARTERS(f32x16, vcvtq_f32_s32(a.q[i])); }
LM_INLINE i32x16 round_i(f32x16 a) {  // nearest, ties to even
  return LM_QUARTERS(i32x16, vcvtnq_s32_f32(a.q[i]));
}
LM_INLINE i32x16 as_i32(f32x16 a) { return LM_QUARTERS(i32x16, vreinterpretq_s32_f32(a.q[i])); }
LM_INLINE f32x16 as_f32(i32x16 a) { return LM_QUARTERS(f32x16, vreinterpretq_f32_s32(a.q[i])); }
LM_INLINE i32x16 load_i8(const void* p) {
  const int8x16_t all = vld1q_s8(static_cast<const int8_t*>(p));
  const int16x8_t low = vmovl_s8(vget_low_s8(all)), high = vmovl_s8(vget_high_s8(all));
  return {{vmovl_s16(vget_low_s16(low)), vmovl_s16(vget_high_s16(low)),
           vmovl_s16(vget_low_s16(high)), vmovl_s16(vget_high_s16(high))}};
}
LM_INLINE void store_i8(void* p, i32x16 x) {
  const int16x8_t low = vcombine_s16(vmovn_s32(x.q[0]), vmovn_s32(x.q[1]));
  const int16x8_t high = vcombine_s16(vmovn_s32(x.q[2]), vmovn_s32(x.q[3]));
  vst1q_s8(static_cast<int8_t*>(p), vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}

// Codes of fewer than 8 bits are the same number signed and unsigned. 8-bit ones are stored ^0x80:
// unsigned they need init (see dot), signed they are what was stored, undone.
#if defined(__ARM_FEATURE_MATMUL_INT8)
template <int Bits, int Lane>
LM_INLINE int32x4_t dot_lane(int32x4_t sum, int32x4_t codes, int8x16_t x) {
  return vusdotq_laneq_s32(sum, vreinterpretq_u8_s32(codes), x, Lane);
}
constexpr bool kSignedCodes = false;
#else
template <int Bits, int Lane>
LM_INLINE int32x4_t dot_lane(int32x4_t sum, int32x4_t codes, int8x16_t x) {
  if constexpr (Bits == 8) codes = veorq_s32(codes, vdupq_n_s32(static_cast<int>(0x80808080)));
  return vdotq_laneq_s32(sum, bytes(codes), x, Lane);
}
constexpr bool kSignedCodes = true;
#endif

// N is 1 or a multiple of 4: a register of x serves 4 code vectors, lane by lane.
template <int Bits, int N>
LM_INLINE i32x16 dot(i32x16 init, const i32x16 (&g)[N], const int8_t* x) {
  static_assert(N == 1 || N % 4 == 0);
  i32x16 sum = kSignedCodes && Bits == 8 ? splat_i(0) : init;
  if constexpr (N == 1) {
    int32_t four;
    std::memcpy(&four, x, 4);
    const int8x16_t all = bytes(vdupq_n_s32(four));
    return LM_QUARTERS(i32x16, (dot_lane<Bits, 0>(sum.q[i], g[0].q[i], all)));
  }
  unroll<N / 4>([&](auto part) LM_LAMBDA {
    const int8x16_t b = vld1q_s8(x + 16 * part);
    unroll<4>([&](auto lane) LM_LAMBDA {
      unroll<4>([&](auto i) LM_LAMBDA {
        sum.q[i] = dot_lane<Bits, lane>(sum.q[i], g[4 * part + lane].q[i], b);
      });
    });
  });
  return sum;
}

LM_INLINE f32x16 dot_bf16(f32x16 acc, i32x16 a, const void* x) {
  int32_t pair;
  std::memcpy(&pair, x, 4);
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  const bfloat16x8_t b = vreinterpretq_bf16_s32(vdupq_n_s32(pair));
  return LM_QUARTERS(f32x16, vbfdotq_f32(acc.q[i], vreinterpretq_bf16_s32(a.q[i]), b));
#else
  const i32x16 b = splat_i(pair), high = splat_i(static_cast<int32_t>(0xffff0000));
  const f32x16 first = fma(as_f32(shl<16>(a)), as_f32(shl<16>(b)), acc);
  return fma(as_f32(a & high), as_f32(b & high), first);
#endif
}
#undef LM_QUARTERS

}  // namespace lmclock::LMCLOCK_PATH
