// Calibration kernels: what one thread can do at most, with the instructions the matmuls use.

#include "simd.h"
#include "tables.h"

namespace lmclock::LMCLOCK_PATH {

namespace {

constexpr int kChains = 16;          // independent sums: more than latency x ports anywhere
constexpr int64_t kPerRound = 4096;  // vector operations per round
alignas(64) constexpr int8_t kOperand[64] = {1, 2, 3, 4, 5, 6, 7, 8};

// Keeps a value alive without storing it.
template <class V>
LM_INLINE void consume(V& v) {
  asm volatile("" : : "m"(v) : "memory");
}

}  // namespace

int64_t peak_int8(int64_t rounds) {
  i32x16 sums[kChains];
  unroll<kChains>([&](auto i) LM_LAMBDA { sums[i] = splat_i(i); });
  const i32x16 g[1] = {load_i(kOperand)};
  for (int64_t n = 0; n < rounds * kPerRound; n += kChains)
    unroll<kChains>([&](auto i) LM_LAMBDA { sums[i] = dot<7, 1>(sums[i], g, kOperand + 4); });
  unroll<kChains>([&](auto i) LM_LAMBDA { consume(sums[i]); });
  return rounds * kPerRound * 128;
}

int64_t peak_bf16(int64_t rounds) {
  f32x16 sums[kChains];
  unroll<kChains>([&](auto i) LM_LAMBDA { sums[i] = splat(0.0f); });
  const i32x16 g = load_i(kOperand);
  for (int64_t n = 0; n < rounds * kPerRound; n += kChains)
    unroll<kChains>([&](auto i) LM_LAMBDA { sums[i] = dot_bf16(sums[i], g, kOperand + 4); });
  unroll<kChains>([&](auto i) LM_LAMBDA { consume(sums[i]); });
  return rounds * kPerRound * 64;
}

int64_t peak_f32(int64_t rounds) {
  f32x16 sums[kChains];
  unroll<kChains>([&](auto i) LM_LAMBDA { sums[i] = splat(1.0f); });
  f32x16 a = splat(0.5f), b = splat(0.25f);
  asm volatile("" : "+m"(a), "+m"(b));
  for (int64_t n = 0; n < rounds * kPerRound; n += kChains)
    unroll<kChains>([&](auto i) LM_LAMBDA { sums[i] = fma(sums[i], a, b); });
  unroll<kChains>([&](auto i) LM_LAMBDA { consume(sums[i]); });
  return rounds * kPerRound * 32;
}

int64_t stream(const uint8_t* data, int64_t bytes) {
  i32x16 sums[8];
  unroll<8>([&](auto i) LM_LAMBDA { sums[i] = splat_i(0); });
  int64_t at = 0;
  for (; at + 512 <= bytes; at += 512)
    unroll<8>([&](auto i) LM_LAMBDA {
      const i32x16 g[1] = {load_i(data + at + 64 * i)};
      sums[i] = dot<8, 1>(sums[i], g, kOperand);
    });
  unroll<8>([&](auto i) LM_LAMBDA { consume(sums[i]); });
  return at;
}

}  // namespace lmclock::LMCLOCK_PATH
