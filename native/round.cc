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

#if defined(LM_HAS_QUARTERS)
// Each of the 4 lanes of a quarter: all lanes of that quarter of one vector, combined.
template <class F>
LM_INLINE i32x16 combine_quarters(i32x16 (&x)[4], F&& combine) {
  turn_quarters(x);
  return combine(combine(x[0], x[1]), combine(x[2], x[3]));
}

// Eight blocks at once, the same bits. Lane j of quarters 0 and 1 belongs to block j, of quarters 2
// and 3 to block 4 + j.
LM_INLINE void round_q8_blocks(const float* x, Q8Block* out) {
  const auto larger = [](i32x16 a, i32x16 b) LM_LAMBDA { return max_i(a, b); };
  const auto add = [](i32x16 a, i32x16 b) LM_LAMBDA { return a + b; };
  i32x16 m[2][4], sums[4];
  unroll<8>([&](auto i) LM_LAMBDA {
    const i32x16 mask = splat_i(0x7fffffff);
    const i32x16 a = as_i32(load(x + 32 * i)), b = as_i32(load(x + 32 * i + 16));
    m[i / 4][i % 4] = max_i(a & mask, b & mask);
  });
  i32x16 most = combine_quarters(m[0], larger), other = combine_quarters(m[1], larger);
  most = max_i(low_halves(most, other), high_halves(most, other));
  const f32x16 amax = as_f32(max_i(most, swap_quarters(most)));
  if (!all(amax < splat(__builtin_inff()))) {
    for (int i = 0; i < 8; ++i) round_q8_block(x + 32 * i, out + i);
    return;
  }
  const f32x16 d = amax / splat(127.0f);
  const f32x16 inverse = select(d < splat(0x1p-126f), splat(0.0f), splat(1.0f) / d);
  alignas(64) float factors[16];
  store(factors, inverse);
  unroll<4>([&](auto j) LM_LAMBDA {
    const float *low = x + 32 * j, *high = low + 128;
    const f32x16 f = splat(factors[j]), g = splat(factors[8 + j]);
    const i32x16 codes = pack_i8(round_i(load(low) * f), round_i(load(low + 16) * f),
                                 round_i(load(high) * g), round_i(load(high + 16) * g));
    store_halves(out[j].q, out[4 + j].q, codes);
    sums[j] = sum_bytes(codes);
  });
  const i32x16 half = combine_quarters(sums, add), rest = swap_quarters(half), sum = half + rest;
  const i32x16 minus = splat_i(0);
  i32x16 fields[4] = {alternate(as_i32(d), minus - shl<5>(rest)),
                      alternate(as_i32(d * to_f32(sum)), minus - shl<5>(half)),
                      alternate(minus - shl<3>(sum), minus), alternate(minus - shl<7>(sum), minus)};
  turn_quarters(fields);
  unroll<4>([&](auto j) LM_LAMBDA { store_halves(&out[j].d, &out[4 + j].d, fields[j]); });
}
#endif

void round_wide(const float* x, int64_t k0, int64_t k1, float* out) {
  int64_t k = k0;
  for (; k + 16 <= k1; k += 16) store(out + k, from_bf16(to_bf16(load(x + k))));
  if (k == k1) return;
  const int n = static_cast<int>(k1 - k);
  store_n(out + k, from_bf16(to_bf16(load_n(x + k, n))), n);
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
  if (act == Act::bf16 && wide_bf16) round_wide(x, k0, k1, reinterpret_cast<float*>(out));
  else if (act == Act::bf16) round_bf16(x, width, k0, k1, reinterpret_cast<uint16_t*>(out));
  if (act != Act::q8_32) return;
  Q8Block* blocks = static_cast<Q8Block*>(record);
  int64_t k = k0;
#if defined(LM_HAS_QUARTERS)
  for (; k + 8 * kRoundBlock <= k1; k += 8 * kRoundBlock)
    round_q8_blocks(x + k, blocks + k / kRoundBlock);
#endif
  for (; k < k1; k += kRoundBlock) round_q8_block(x + k, blocks + k / kRoundBlock);
}

void activations_f32(Act act, const uint8_t* x, int64_t k0, int64_t n, float* out) {
  if (act == Act::none || (act == Act::bf16 && wide_bf16)) {
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
