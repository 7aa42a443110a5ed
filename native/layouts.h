// How each packed layout is read: one struct per layout, used by the tile kernels.
//
// G denotes a 64-byte vector with 4 bytes of each of the panel's 16 rows. Nibble layouts keep
// GGUF's pairing: byte 4g + i of a row holds element 4g + i in its low half and element 16 + 4g + i
// in its high half.
//
// Fields lie in the order they are read: a layout in planes streams at a third of the speed.
//
//   q4_0       288 B / 32   d f16[16], 4 G
//   q4_1       320 B / 32   d f16[16], m f16[16], 4 G
//   q5_0       352 B / 32   d f16[16], 1 G of high bits (bit 8i + j = element 4j + i), 4 G
//   q8_0       544 B / 32   d f16[16], 8 G stored ^0x80
//   generic32  640 B / 32   d f32[16], m f32[16], 8 G stored ^0x80
//   generic16  384 B / 16   d f32[16], m f32[16], 4 G stored ^0x80
//   q4_k      2304 B / 256  d f16[16], dmin f16[16], 3 G of scales, 32 G (8: 32 low, 32 high)
//   q6_k      3360 B / 256  d f16[16], per half: 2 G scales, 8 x (ql[g], ql[g + 8], qh[g])
//   f32 f16    16 values per k      bf16   G = 2 k
#pragma once

#include "record.h"

namespace lmclock::LMCLOCK_PATH {

// 32 elements of 16 rows in registers: value = d * (code - offset) + m.
struct BlockCodes {
  f32x16 d, m;
  i32x16 g[8];
};

LM_INLINE void split_nibbles(const uint8_t* p, i32x16 (&g)[8]) {
  const i32x16 low = splat_i(0x0f0f0f0f);
  unroll<4>([&](auto i) LM_LAMBDA {
    i32x16 raw = load_i(p + 64 * i);
    g[i] = raw & low;
    g[i + 4] = shr<4>(raw) & low;
  });
}

struct Q4_0 {
  static constexpr int kBytes = 288, kBits = 4, kOffset = 8;
  static constexpr bool kMin = false;
  LM_INLINE void load_block(const uint8_t* p, BlockCodes& b) {
    b.d = load_f16(p);
    split_nibbles(p + 32, b.g);
  }
};

struct Q4_1 {
  static constexpr int kBytes = 320, kBits = 4, kOffset = 0;
  static constexpr bool kMin = true;
  LM_INLINE void load_block(const uint8_t* p, BlockCodes& b) {
    b.d = load_f16(p);
    b.m = load_f16(p + 32);
    split_nibbles(p + 64, b.g);
  }
};

struct Q5_0 {
  static constexpr int kBytes = 352, kBits = 5, kOffset = 16;
  static constexpr bool kMin = false;
  LM_INLINE void load_block(const uint8_t* p, BlockCodes& b) {
    b.d = load_f16(p);
    const i32x16 high = load_i(p + 32), bit = splat_i(0x10101010);
    split_nibbles(p + 96, b.g);
    unroll<4>([&](auto j) LM_LAMBDA {
      b.g[j] = b.g[j] | (shl<4 - j>(high) & bit);
      b.g[j + 4] = b.g[j + 4] | (shr<j>(high) & bit);
    });
  }
};

struct Q8_0 {
  static constexpr int kBytes = 544, kBits = 8, kOffset = 128;
  static constexpr bool kMin = false;
  LM_INLINE void load_block(const uint8_t* p, BlockCodes& b) {
    b.d = load_f16(p);
    unroll<8>([&](auto i) LM_LAMBDA { b.g[i] = load_i(p + 32 + 64 * i); });
  }
};

struct Generic32 {
  static constexpr int kBytes = 640, kBits = 8, kOffset = 128;
  static constexpr bool kMin = true;
  LM_INLINE void load_block(const uint8_t* p, BlockCodes& b) {
    b.d = as_f32(load_i(p));
    b.m = as_f32(load_i(p + 64));
    unroll<8>([&](auto i) LM_LAMBDA { b.g[i] = load_i(p + 128 + 64 * i); });
  }
};

// Scales and minima of the 8 sub-blocks of a q4_k panel block.
struct K4Scales {
  f32x16 d[8], m[8];
};

LM_INLINE void load_scales(const uint8_t* p, K4Scales& s) {
  const i32x16 u0 = load_i(p + 64), u1 = load_i(p + 128), u2 = load_i(p + 192);
  const i32x16 six = splat_i(0x3f3f3f3f), four = splat_i(0x0f0f0f0f), top = splat_i(0x30303030);
  const i32x16 scales[2] = {u0 & six, (u2 & four) | (shr<2>(u0) & top)};
  const i32x16 minima[2] = {u1 & six, (shr<4>(u2) & four) | (shr<2>(u1) & top)};
  const f32x16 d = load_f16(p), dmin = load_f16(p + 32), minus = splat(-0.0f);
  const i32x16 byte = splat_i(0xff);
  unroll<8>([&](auto j) LM_LAMBDA {
    s.d[j] = d * to_f32(shr<8 * (j % 4)>(scales[j / 4]) & byte);
    s.m[j] = as_f32(as_i32(dmin * to_f32(shr<8 * (j % 4)>(minima[j / 4]) & byte)) ^ as_i32(minus));
  });
}

struct Q4_K {
  static constexpr int kBytes = 2304, kBits = 4, kOffset = 0;
  static constexpr bool kMin = true;
  static constexpr int kCodes = 256;  // where the 32 G start
};

struct Q6_K {
  static constexpr int kBytes = 3360, kHalf = 1664, kBits = 6;
};

// Code vectors of group g (elements 4g .. 4g + 3 of each of the four 32-blocks of a half).
LM_INLINE void q6k_codes(const uint8_t* half, int g, i32x16 (&out)[4]) {
  const i32x16 low = splat_i(0x0f0f0f0f), top = splat_i(0x30303030);
  const uint8_t* p = half + 128 + 192 * g;
  const i32x16 a = load_i(p), b = load_i(p + 64), h = load_i(p + 128);
  out[0] = (a & low) | (shl<4>(h) & top);
  out[1] = (b & low) | (shl<2>(h) & top);
  out[2] = (shr<4>(a) & low) | (h & top);
  out[3] = (shr<4>(b) & low) | (shr<2>(h) & top);
}

// Signed scale byte j (0..7, one per 16 elements) of a half.
template <int J>
LM_INLINE f32x16 q6k_scale(const uint8_t* half, f32x16 d) {
  return d * to_f32(sra<24>(shl<24 - 8 * (J % 4)>(load_i(half + 64 * (J / 4)))));
}

// Elements that share a scale, and bytes of one panel block once expanded.
LM_INLINE int scale_elements(Layout layout) {
  return layout == Layout::q6_k || layout == Layout::generic16 ? 16 : 32;
}
LM_INLINE int64_t expanded_bytes(Layout layout) {
  const int64_t elements = scale_elements(layout);
  return layout_block(layout) / elements * (128 + 16 * elements);
}

// `count` panel blocks of a quantised layout as generic32 or, where 16 elements share a scale,
// generic16 blocks, but with signed codes.
void expand(Layout layout, const uint8_t* p, int64_t count, uint8_t* out);

// Panel elements [k0, k0 + n) of any layout as f32: out[k][row]. k0 and n are multiples of
// layout_block unless the range ends at the width.
void dequantise(Layout layout, const uint8_t* panel, int64_t k0, int64_t n, float* out);

}  // namespace lmclock::LMCLOCK_PATH
