// Rounding of activations to q8_32 and bf16 records, and back to f32.

#include "record.h"

#include "tables.h"

namespace lmclock::LMCLOCK_PATH {

namespace {

// The largest magnitude by integer comparison of the bits: a NaN counts as larger than infinity and
// so becomes the scale, instead of vanishing in the rounding.
LM_INLINE float largest(f32x16 a, f32x16 b) {
  const i32x16 magnitude = splat_i(0x7fffffff);
  const int32_t m = reduce_max(max_i(as_i32(a) & magnitude, as_i32(b) & magnitude));
  float r;
  std::memcpy(&r, &m, 4);
  return r;
}

// d = amax / 127, codes rint(x (1 / d)). A subnormal d may have no finite reciprocal: its codes are
// 0. A block with a NaN or an infinity becomes NaN; codes of such numbers would be anything.
LM_INLINE void round_q8_block(const float* x, Q8Block* out) {
  const f32x16 a = load(x), b = load(x + 16);
  const float amax = largest(a, b);
  if (!(amax < __builtin_inff())) {
    *out = {};
    out->d = out->s = __builtin_nanf("");
    return;
  }
  const float d = amax / 127.0f;
  const float inverse = d >= 0x1p-126f ? 1.0f / d : 0.0f;
  const i32x16 qa = round_i(a * splat(inverse)), qb = round_i(b * splat(inverse));
  store_i8(out->q, qa);
  store_i8(out->q + 16, qb);
  const int32_t sa = reduce_add(qa), sb = reduce_add(qb), sum = sa + sb;
  out->d = d;
  out->s = d * static_cast<float>(sum);
  out->n8 = -8 * sum;
  out->n128 = -128 * sum;
  out->n32[0] = -32 * sa;
  out->n32[1] = -32 * sb;
  out->unused[0] = out->unused[1] = 0;
}

void round_bf16(const float* x, int64_t width, int64_t k0, int64_t k1, uint16_t* out) {
  int64_t k = k0;
  for (; k + 16 <= k1; k += 16) store_u16(out + k, to_bf16(load(x + k)));
  if (k < k1) {
    uint16_t last[16];
    store_u16(last, to_bf16(load_n(x + k, static_cast<int>(k1 - k))));
    std::memcpy(out + k, last, 2 * static_cast<size_t>(k1 - k));
  }
  if (k1 == width && width % 2) out[width] = 0;
}

}  // namespace

void round_row(Act act, const float* x, int64_t width, int64_t k0, int64_t k1, void* record) {
  uint8_t* out = static_cast<uint8_t*>(record);
  if (act == Act::none) std::memcpy(out + 4 * k0, x + k0, 4 * static_cast<size_t>(k1 - k0));
  if (act == Act::bf16) round_bf16(x, width, k0, k1, reinterpret_cast<uint16_t*>(out));
  if (act != Act::q8_32) return;
  Q8Block* blocks = static_cast<Q8Block*>(record);
  for (int64_t k = k0; k < k1; k += kRoundBlock) round_q8_block(x + k, blocks + k / kRoundBlock);
}

void activations_f32(Act act, const uint8_t* x, int64_t k0, int64_t n, float* out) {
  if (act == Act::none) {
    std::memcpy(out, x + 4 * k0, 4 * static_cast<size_t>(n));
  } else if (act == Act::bf16) {
    for (int64_t i = 0; i < n; ++i) {
      uint16_t h;
      std::memcpy(&h, x + 2 * (k0 + i), 2);
      const uint32_t bits = static_cast<uint32_t>(h) << 16;
      std::memcpy(out + i, &bits, 4);
    }
  } else {
    const Q8Block* blocks = reinterpret_cast<const Q8Block*>(x);
    for (int64_t k = k0; k < k0 + n; ++k) {
      const Q8Block& block = blocks[k / kRoundBlock];
      out[k - k0] = block.d * static_cast<float>(block.q[k % kRoundBlock]);
    }
  }
}

}  // namespace lmclock::LMCLOCK_PATH
