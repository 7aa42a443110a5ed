// simd.h in portable C++: arrays of 16, which the compiler turns into whatever the baseline has.
#pragma once

namespace lmclock::LMCLOCK_PATH {

// Rows of a tile: there are no registers to share weights in.
constexpr int kTileRows[] = {1};
constexpr int kDotRows = 1, kChainRows = 1;

struct f32x16 {
  float v[16];
};
struct i32x16 {
  int32_t v[16];
};
struct mask16 {
  int32_t v[16];
};  // 0 or -1

#define LM_EACH(i) for (int i = 0; i < 16; ++i)

LM_INLINE float bits_f32(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
LM_INLINE uint32_t f32_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}

LM_INLINE f32x16 splat(float x) {
  f32x16 r;
  LM_EACH(i) r.v[i] = x;
  return r;
}
LM_INLINE f32x16 load(const float* p) {
  f32x16 r;
  std::memcpy(&r, p, 64);
  return r;
}
LM_INLINE f32x16 load_n(const float* p, int n) {
  f32x16 r = {};
  std::memcpy(&r, p, 4 * static_cast<size_t>(n));
  return r;
}
LM_INLINE void store(float* p, f32x16 x) { std::memcpy(p, &x, 64); }
LM_INLINE void store_n(float* p, f32x16 x, int n) {
  std::memcpy(p, &x, 4 * static_cast<size_t>(n));
}
LM_INLINE i32x16 load_u16(const void* p) {
  uint16_t u[16];
  std::memcpy(u, p, 32);
  i32x16 r;
  LM_EACH(i) r.v[i] = u[i];
  return r;
}
LM_INLINE void store_u16(void* p, i32x16 x) {
  uint16_t u[16];
  LM_EACH(i) u[i] = static_cast<uint16_t>(x.v[i]);
  std::memcpy(p, u, 32);
}
// Exponent and mantissa shifted into place are the value x 2^-112, subnormals included.
LM_INLINE f32x16 load_f16(const void* p) {
  i32x16 h = load_u16(p);
  f32x16 r;
  LM_EACH(i) {
    uint32_t u = static_cast<uint32_t>(h.v[i]), magnitude = (u & 0x7fff) << 13;
    float x = bits_f32(magnitude) * 0x1p112f;
    uint32_t out = magnitude >= 0x7c00u << 13 ? magnitude | 0x7f800000u : f32_bits(x);
    r.v[i] = bits_f32(out | (u & 0x8000) << 16);
  }
  return r;
}

LM_INLINE f32x16 operator+(f32x16 a, f32x16 b) {
  LM_EACH(i) a.v[i] += b.v[i];
  return a;
}
LM_INLINE f32x16 operator-(f32x16 a, f32x16 b) {
  LM_EACH(i) a.v[i] -= b.v[i];
  return a;
}
LM_INLINE f32x16 operator*(f32x16 a, f32x16 b) {
  LM_EACH(i) a.v[i] *= b.v[i];
  return a;
}
LM_INLINE f32x16 operator/(f32x16 a, f32x16 b) {
  LM_EACH(i) a.v[i] /= b.v[i];
  return a;
}
// The product is exact in double; the sum is rounded there and again to f32, which differs from a
// fused multiply-add about once in 2^29 times. Calling fmaf instead would cost ten times as much.
LM_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
  LM_EACH(i) c.v[i] = static_cast<float>(static_cast<double>(a.v[i]) * b.v[i] + c.v[i]);
  return c;
}
LM_INLINE f32x16 max(f32x16 a, f32x16 b) {
  LM_EACH(i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
LM_INLINE f32x16 min(f32x16 a, f32x16 b) {
  LM_EACH(i) a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return a;
}
LM_INLINE f32x16 sqrt(f32x16 a) {
  LM_EACH(i) a.v[i] = __builtin_sqrtf(a.v[i]);
  return a;
}
LM_INLINE mask16 operator==(f32x16 a, f32x16 b) {
  mask16 m;
  LM_EACH(i) m.v[i] = -(a.v[i] == b.v[i]);
  return m;
}
LM_INLINE mask16 operator<(f32x16 a, f32x16 b) {
  mask16 m;
  LM_EACH(i) m.v[i] = -(a.v[i] < b.v[i]);
  return m;
}
LM_INLINE i32x16 select(mask16 m, i32x16 a, i32x16 b) {
  LM_EACH(i) a.v[i] = (a.v[i] & m.v[i]) | (b.v[i] & ~m.v[i]);
  return a;
}

LM_INLINE i32x16 splat_i(int32_t x) {
  i32x16 r;
  LM_EACH(i) r.v[i] = x;
  return r;
}
LM_INLINE i32x16 load_i(const void* p) {
  i32x16 r;
  std::memcpy(&r, p, 64);
  return r;
}
LM_INLINE void store_i(void* p, i32x16 x) { std::memcpy(p, &x, 64); }
#define LM_WRAPPING(op)                                                                            \
  LM_INLINE i32x16 operator op(i32x16 a, i32x16 b) {                                               \
    LM_EACH(i)                                                                                     \
    a.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) op static_cast<uint32_t>(b.v[i])); \
    return a;                                                                                      \
  }
LM_WRAPPING(+)
LM_WRAPPING(-)
LM_WRAPPING(&)
LM_WRAPPING(|)
LM_WRAPPING(^)
#undef LM_WRAPPING
template <int N>
LM_INLINE i32x16 shl(i32x16 a) {
  LM_EACH(i) a.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << N);
  return a;
}
template <int N>
LM_INLINE i32x16 shr(i32x16 a) {
  LM_EACH(i) a.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) >> N);
  return a;
}
template <int N>
LM_INLINE i32x16 sra(i32x16 a) {
  LM_EACH(i) a.v[i] >>= N;
  return a;
}
LM_INLINE i32x16 max_i(i32x16 a, i32x16 b) {
  LM_EACH(i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
LM_INLINE i32x16 add_bytes(i32x16 a, i32x16 b) {
  uint8_t x[64], y[64];
  std::memcpy(x, &a, 64);
  std::memcpy(y, &b, 64);
  for (int i = 0; i < 64; ++i) x[i] = static_cast<uint8_t>(x[i] + y[i]);
  std::memcpy(&a, x, 64);
  return a;
}

LM_INLINE f32x16 to_f32(i32x16 a) {
  f32x16 r;
  LM_EACH(i) r.v[i] = static_cast<float>(a.v[i]);
  return r;
}
LM_INLINE f32x16 as_f32(i32x16 a) {
  f32x16 r;
  std::memcpy(&r, &a, 64);
  return r;
}
LM_INLINE i32x16 as_i32(f32x16 a) {
  i32x16 r;
  std::memcpy(&r, &a, 64);
  return r;
}
LM_INLINE f32x16 select(mask16 m, f32x16 a, f32x16 b) {
  return as_f32(select(m, as_i32(a), as_i32(b)));
}
// Adding 1.5 x 2^23 leaves the nearest integer, ties to even, in the low bits: |a| < 2^22, enough
// for codes and exponents, while a library call per lane is slow without SSE4.1.
LM_INLINE i32x16 round_i(f32x16 a) {
  i32x16 r;
  LM_EACH(i) r.v[i] = static_cast<int32_t>(f32_bits(a.v[i] + 0x1.8p23f) - f32_bits(0x1.8p23f));
  return r;
}
LM_INLINE i32x16 load_i8(const void* p) {
  int8_t bytes[16];
  std::memcpy(bytes, p, 16);
  i32x16 r;
  LM_EACH(i) r.v[i] = bytes[i];
  return r;
}
LM_INLINE void store_i8(void* p, i32x16 x) {
  int8_t u[16];
  LM_EACH(i) u[i] = static_cast<int8_t>(x.v[i]);
  std::memcpy(p, u, 16);
}

template <int Bits, int N>
LM_INLINE i32x16 dot(i32x16 init, const i32x16 (&g)[N], const int8_t* x) {
  i32x16 sum = Bits == 8 ? splat_i(0) : init;
  for (int n = 0; n < N; ++n) LM_EACH(i) {
      uint32_t codes = static_cast<uint32_t>(g[n].v[i]) ^ (Bits == 8 ? 0x80808080u : 0);
      for (int j = 0; j < 4; ++j) {
        uint8_t code = static_cast<uint8_t>(codes >> 8 * j);
        sum.v[i] += (Bits == 8 ? static_cast<int8_t>(code) : code) * x[4 * n + j];
      }
    }
  return sum;
}

LM_INLINE f32x16 dot_bf16(f32x16 acc, i32x16 a, const void* x) {
  uint16_t pair[2];
  std::memcpy(pair, x, 4);
  acc = fma(as_f32(shl<16>(a)), splat(bits_f32(static_cast<uint32_t>(pair[0]) << 16)), acc);
  return fma(as_f32(a & splat_i(static_cast<int32_t>(0xffff0000))),
             splat(bits_f32(static_cast<uint32_t>(pair[1]) << 16)), acc);
}

}  // namespace lmclock::LMCLOCK_PATH
