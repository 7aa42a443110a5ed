// GGUF rows to panels of 16 interleaved rows. Bytes are moved, not changed in meaning: see
// layouts.h for the result.
//
// A format is a struct with `row`: one block of one row into its panel block, words 64 bytes apart.
// It returns the f16 scales' exponent check as 0 or not 0.

#include "layouts.h"
#include "tables.h"

namespace lmclock::LMCLOCK_PATH {

namespace {

LM_INLINE uint32_t word(const uint8_t* p) {
  uint32_t u;
  std::memcpy(&u, p, 4);
  return u;
}
LM_INLINE uint16_t half(const uint8_t* p) {
  uint16_t u;
  std::memcpy(&u, p, 2);
  return u;
}
LM_INLINE void put32(uint8_t* p, uint32_t u) { std::memcpy(p, &u, 4); }
LM_INLINE void put16(uint8_t* p, uint16_t u) { std::memcpy(p, &u, 2); }
LM_INLINE void put_f32(uint8_t* p, float x) { std::memcpy(p, &x, 4); }

LM_INLINE uint32_t infinite16(uint16_t h) { return (h & 0x7c00) == 0x7c00; }

LM_INLINE float f16_value(uint16_t h) {
  alignas(64) uint16_t u[16] = {h};
  float x[16];
  store(x, load_f16(u));
  return x[0];
}

// G number g of row r, seen from a panel block's first G.
LM_INLINE uint8_t* at(uint8_t* first, int g, int r) { return first + 64 * g + 4 * r; }

template <int N>
LM_INLINE void put_words(const uint8_t* from, uint8_t* first, int r) {
  for (int g = 0; g < N; ++g) put32(at(first, g, r), word(from + 4 * g));
}

struct PackF32 {
  static constexpr int kSource = 4, kPanelBytes = 64;
  LM_INLINE uint32_t row(const uint8_t* s, uint8_t* p, int r) {
    put32(p + 4 * r, word(s));
    return (word(s) & 0x7f800000) == 0x7f800000;
  }
};
struct PackF16 {
  static constexpr int kSource = 2, kPanelBytes = 32;
  LM_INLINE uint32_t row(const uint8_t* s, uint8_t* p, int r) {
    put16(p + 2 * r, half(s));
    return infinite16(half(s));
  }
};
struct PackBF16 {
  static constexpr int kSource = 4, kPanelBytes = 64;
  LM_INLINE uint32_t row(const uint8_t* s, uint8_t* p, int r) {
    const uint32_t pair = word(s);
    put32(p + 4 * r, pair);
    return (pair & 0x7f80) == 0x7f80 || (pair & 0x7f800000) == 0x7f800000;
  }
};
struct PackQ4_0 {
  static constexpr int kSource = 18, kPanelBytes = Q4_0::kBytes;
  LM_INLINE uint32_t row(const uint8_t* s, uint8_t* p, int r) {
    put16(p + 2 * r, half(s));
    put_words<4>(s + 2, p + 32, r);
    return infinite16(half(s));
  }
};
struct PackQ4_1 {
  static constexpr int kSource = 20, kPanelBytes = Q4_1::kBytes;
  LM_INLINE uint32_t row(const uint8_t* s, uint8_t* p, int r) {
    put16(p + 2 * r, half(s));
    put16(p + 32 + 2 * r, half(s + 2));
    put_words<4>(s + 4, p + 64, r);
    return infinite16(half(s)) | infinite16(half(s + 2));
  }
};
struct PackQ5_0 {
  static constexpr int kSource = 22, kPanelBytes = Q5_0::kBytes;
  LM_INLINE uint32_t row(const uint8_t* s, uint8_t* p, int r) {
    put16(p + 2 * r, half(s));
    const uint32_t high = word(s + 2);
    uint32_t spread = 0;  // bit 4j + i to bit 8i + j: the product puts the 4 bits 7 apart
    for (int j = 0; j < 8; ++j) spread |= ((high >> 4 * j & 15) * 0x00204081u & 0x01010101u) << j;
    put32(p + 32 + 4 * r, spread);
    put_words<4>(s + 6, p + 96, r);
    return infinite16(half(s));
  }
};
struct PackQ8_0 {
  static constexpr int kSource = 34, kPanelBytes = Q8_0::kBytes;
  LM_INLINE uint32_t row(const uint8_t* s, uint8_t* p, int r) {
    put16(p + 2 * r, half(s));
    for (int g = 0; g < 8; ++g) put32(at(p + 32, g, r), word(s + 2 + 4 * g) ^ 0x80808080u);
    return infinite16(half(s));
  }
};
struct PackQ4_K {
  static constexpr int kSource = 144, kPanelBytes = Q4_K::kBytes;
  LM_INLINE uint32_t row(const uint8_t* s, uint8_t* p, int r) {
    put16(p + 2 * r, half(s));
    put16(p + 32 + 2 * r, half(s + 2));
    put_words<35>(s + 4, p + 64, r);
    return infinite16(half(s)) | infinite16(half(s + 2));
  }
};
// GGUF: ql[128], qh[64], scales[16], d.
struct PackQ6_K {
  static constexpr int kSource = 210, kPanelBytes = Q6_K::kBytes;
  LM_INLINE uint32_t row(const uint8_t* s, uint8_t* p, int r) {
    put16(p + 2 * r, half(s + 208));
    for (int h = 0; h < 2; ++h) {
      uint8_t* to = p + 32 + Q6_K::kHalf * h;
      put_words<2>(s + 192 + 8 * h, to, r);
      for (int g = 0; g < 8; ++g) {
        put32(at(to + 128, 3 * g, r), word(s + 64 * h + 4 * g));
        put32(at(to + 128, 3 * g + 1, r), word(s + 64 * h + 32 + 4 * g));
        put32(at(to + 128, 3 * g + 2, r), word(s + 128 + 32 * h + 4 * g));
      }
    }
    return infinite16(half(s + 208));
  }
};

// A generic block of row r: N signed codes with their scale and minimum.
template <int N>
LM_INLINE void put_generic(uint8_t* p, int r, float d, float m, const int8_t* codes) {
  put_f32(p + 4 * r, d);
  put_f32(p + 64 + 4 * r, m);
  for (int g = 0; g < N / 4; ++g) {
    uint32_t u;
    std::memcpy(&u, codes + 4 * g, 4);
    put32(at(p + 128, g, r), u ^ 0x80808080u);
  }
}

// GGUF: d, m, qh[4], qs[16].
struct PackQ5_1 {
  static constexpr int kSource = 24, kPanelBytes = 640;
  LM_INLINE uint32_t row(const uint8_t* s, uint8_t* p, int r) {
    const uint32_t high = word(s + 4);
    int8_t codes[32];
    for (int i = 0; i < 16; ++i) {
      codes[i] = static_cast<int8_t>((s[8 + i] & 15) | (high >> i & 1) << 4);
      codes[i + 16] = static_cast<int8_t>(s[8 + i] >> 4 | (high >> (i + 16) & 1) << 4);
    }
    put_generic<32>(p, r, f16_value(half(s)), f16_value(half(s + 2)), codes);
    return infinite16(half(s)) | infinite16(half(s + 2));
  }
};
// GGUF: scales[16] (low half scale, high half minimum), qs[64], d, dmin. Byte i of a half's 32
// holds elements i, i + 32, i + 64, i + 96.
struct PackQ2_K {
  static constexpr int kSource = 84, kPanelBytes = 16 * 384;
  LM_INLINE uint32_t row(const uint8_t* s, uint8_t* p, int r) {
    const float d = f16_value(half(s + 80)), dmin = f16_value(half(s + 82));
    for (int b = 0; b < 16; ++b) {
      int8_t codes[16];
      for (int i = 0; i < 16; ++i)
        codes[i] = s[16 + 32 * (b / 8) + 16 * (b % 2) + i] >> 2 * (b % 8 / 2) & 3;
      put_generic<16>(p + 384 * b, r, d * static_cast<float>(s[b] & 15),
                      -(dmin * static_cast<float>(s[b] >> 4)), codes);
    }
    return infinite16(half(s + 80)) | infinite16(half(s + 82));
  }
};
// GGUF: hmask[32], qs[64], scales[12], d. Bit b/2 of hmask[16 (b % 2) + i] clear means 4 less;
// scale = 4 low bits in the first 8 bytes, 2 high bits in the last 4, minus 32.
struct PackQ3_K {
  static constexpr int kSource = 110, kPanelBytes = 16 * 384;
  LM_INLINE uint32_t row(const uint8_t* s, uint8_t* p, int r) {
    const float d = f16_value(half(s + 108));
    for (int b = 0; b < 16; ++b) {
      const int low = s[96 + b % 8] >> 4 * (b / 8) & 15;
      const int high = s[104 + b % 4] >> 2 * (b / 4) & 3;
      int8_t codes[16];
      for (int i = 0; i < 16; ++i) {
        const int code = s[32 + 32 * (b / 8) + 16 * (b % 2) + i] >> 2 * (b % 8 / 2) & 3;
        const int bit = s[16 * (b % 2) + i] >> b / 2 & 1;
        codes[i] = static_cast<int8_t>(code - (bit ? 0 : 4));
      }
      put_generic<16>(p + 384 * b, r, d * static_cast<float>((low | high << 4) - 32), -0.0f, codes);
    }
    return infinite16(half(s + 108));
  }
};
// GGUF: d, dmin, scales[12] as q4_k, qh[32] (bit b of byte i: element 32 b + i), qs[128] as q4_k.
struct PackQ5_K {
  static constexpr int kSource = 176, kPanelBytes = 8 * 640;
  LM_INLINE uint32_t row(const uint8_t* s, uint8_t* p, int r) {
    const float d = f16_value(half(s)), dmin = f16_value(half(s + 2));
    const uint8_t* q = s + 4;
    for (int b = 0; b < 8; ++b) {
      const int scale = b < 4 ? q[b] & 63 : (q[b + 4] & 15) | q[b - 4] >> 6 << 4;
      const int minimum = b < 4 ? q[b + 4] & 63 : q[b + 4] >> 4 | q[b] >> 6 << 4;
      int8_t codes[32];
      for (int i = 0; i < 32; ++i)
        codes[i] = static_cast<int8_t>((s[48 + b / 2 * 32 + i] >> 4 * (b % 2) & 15) |
                                       (s[16 + i] >> b & 1) << 4);
      put_generic<32>(p + 640 * b, r, d * static_cast<float>(scale),
                      -(dmin * static_cast<float>(minimum)), codes);
    }
    return infinite16(half(s)) | infinite16(half(s + 2));
  }
};

// Panels [p0, p1). An odd bf16 width has its last element alone.
template <class F>
bool pack_panels(const uint8_t* rows, int64_t outputs, int64_t row_bytes, uint8_t* dst,
                 int64_t stride, int64_t p0, int64_t p1) {
  const int64_t blocks = row_bytes / F::kSource, rest = row_bytes % F::kSource;
  uint32_t bad = 0;
  for (int64_t p = p0; p < p1; ++p) {
    uint8_t* panel = dst + p * stride;
    const uint8_t* source = rows + p * kPanel * row_bytes;
    const int64_t left = outputs - p * kPanel;
    const int count = static_cast<int>(left < kPanel ? left : kPanel);
    if (count < kPanel || rest)
      std::memset(panel, 0, static_cast<size_t>((blocks + (rest > 0)) * F::kPanelBytes));
    for (int64_t b = 0; b < blocks; ++b)
      for (int r = 0; r < count; ++r)
        bad |= F::row(source + r * row_bytes + b * F::kSource, panel + b * F::kPanelBytes, r);
    for (int r = 0; rest && r < count; ++r) {
      uint8_t last[F::kSource] = {};
      std::memcpy(last, source + (r + 1) * row_bytes - rest, static_cast<size_t>(rest));
      bad |= F::row(last, panel + blocks * F::kPanelBytes, r);
    }
  }
  return !bad;
}

}  // namespace

bool pack(int format, const uint8_t* rows, int64_t outputs, int64_t width, uint8_t* dst,
          int64_t stride, int64_t p0, int64_t p1) {
#define LM_PACK(code, F, elements) \
  case code:                       \
    return pack_panels<F>(rows, outputs, width / (elements) * F::kSource, dst, stride, p0, p1);
  switch (format) {
    LM_PACK(0, PackF32, 1)
    LM_PACK(1, PackF16, 1)
    LM_PACK(2, PackQ4_0, 32)
    LM_PACK(3, PackQ4_1, 32)
    LM_PACK(6, PackQ5_0, 32)
    LM_PACK(7, PackQ5_1, 32)
    LM_PACK(8, PackQ8_0, 32)
    LM_PACK(10, PackQ2_K, 256)
    LM_PACK(11, PackQ3_K, 256)
    LM_PACK(12, PackQ4_K, 256)
    LM_PACK(13, PackQ5_K, 256)
    LM_PACK(14, PackQ6_K, 256)
    case 30: return pack_panels<PackBF16>(rows, outputs, 2 * width, dst, stride, p0, p1);
    default: return false;
  }
#undef LM_PACK
}

}  // namespace lmclock::LMCLOCK_PATH
