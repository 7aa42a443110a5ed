// Calibration kernels: what one thread can do at most, with the instructions the matmuls use.

#include "tables.h"
#include "tile.h"

namespace lmclock::LMCLOCK_PATH {

namespace {

constexpr int kChains =
    kTileRows[0] >= 8 ? 16 : 6;  // independent sums: enough for latency x ports, all in registers
constexpr int64_t kPerRound = 4096;  // dot products operations per round
alignas(64) constexpr int8_t kOperand[64] = {1, 2, 3, 4, 5, 6, 7, 8};

// Makes the compiler believe that v is used and changed here. Never for an array of sums: having an
// address, they would be stored in every turn of the loop.
template <class V>
LM_INLINE void hide(V& v) {
  asm volatile("" : "+m"(v));
}

template <class V, int N>
LM_INLINE void use(const V (&sums)[N]) {
  V total = sums[0];
  unroll<N - 1>([&](auto i) LM_LAMBDA { total = total + sums[i + 1]; });
  hide(total);
}

}  // namespace

// Where one instruction does it: that instruction. Elsewhere the matmuls' own sequence for 4-bit
// codes, which is the cheapest per operation.
int64_t peak_int8(int64_t rounds) {
  i32x16 sums[kChains];
  unroll<kChains>([&](auto i) LM_LAMBDA { sums[i] = splat_i(i); });
#if defined(LM_HAS_DOT_VECTOR)
  constexpr int kDots = 1;
  i32x16 a = load_i(kOperand), b = a;
  hide(a);
  hide(b);
  auto step = [&](i32x16& sum) LM_LAMBDA { sum = dot_vector(sum, a, b); };
#else
  constexpr int kDots = 8;
  int8_t x[32] = {1, 2, 3, 4};
  i32x16 codes[8];
  unroll<8>([&](auto i) LM_LAMBDA { codes[i] = splat_i(0x01020304); });
  hide(codes);
  auto step = [&](i32x16& sum) LM_LAMBDA {
    hide(x);
    sum = dot<4, 8>(sum, codes, x);
  };
#endif
  for (int64_t n = 0; n < rounds * kPerRound; n += kChains * kDots)
    unroll<kChains>([&](auto i) LM_LAMBDA { step(sums[i]); });
  use(sums);
  return (rounds * kPerRound + kChains * kDots - 1) / (kChains * kDots) * kChains * kDots * 128;
}

int64_t peak_int16(int64_t rounds) {
#if defined(LM_HAS_PAIRS)
  i32x16 sums[kChains];
  unroll<kChains>([&](auto i) LM_LAMBDA { sums[i] = splat_i(i); });
  i32x16 a = load_i(kOperand), b = a;
  hide(a);
  hide(b);
  for (int64_t n = 0; n < rounds * kPerRound; n += kChains)
    unroll<kChains>([&](auto i) LM_LAMBDA { sums[i] = dot_i16(sums[i], a, b); });
  use(sums);
  return (rounds * kPerRound + kChains - 1) / kChains * kChains * 64;
#else
  return 0 * rounds;
#endif
}

int64_t peak_bf16(int64_t rounds) {
  f32x16 sums[kChains];
  unroll<kChains>([&](auto i) LM_LAMBDA { sums[i] = splat(0.0f); });
  i32x16 a = load_i(kOperand);
  alignas(64) int8_t x[4] = {0, 1, 0, 1};
  hide(a);
  hide(x);
  for (int64_t n = 0; n < rounds * kPerRound; n += kChains)
    unroll<kChains>([&](auto i) LM_LAMBDA { sums[i] = dot_bf16(sums[i], a, x); });
  use(sums);
  return (rounds * kPerRound + kChains - 1) / kChains * kChains * 64;
}

int64_t peak_f32(int64_t rounds) {
  f32x16 sums[kChains];
  unroll<kChains>([&](auto i) LM_LAMBDA { sums[i] = splat(1.0f); });
  f32x16 a = splat(0.5f), b = splat(0.25f);
  hide(a);
  hide(b);
  for (int64_t n = 0; n < rounds * kPerRound; n += kChains)
    unroll<kChains>([&](auto i) LM_LAMBDA { sums[i] = fma(sums[i], a, b); });
  use(sums);
  return (rounds * kPerRound + kChains - 1) / kChains * kChains * 32;
}

int64_t stream(const uint8_t* data, int64_t bytes) {
  i32x16 sums[8];
  unroll<8>([&](auto i) LM_LAMBDA { sums[i] = splat_i(0); });
  int64_t at = 0;
  const int64_t ahead = stream_ahead;
  for (; at + 512 <= bytes; at += 512) {
    prefetch<512>(data + at, ahead);
    unroll<8>([&](auto i) LM_LAMBDA {
      const i32x16 g[1] = {load_i(data + at + 64 * i)};
      sums[i] = dot<8, 1>(sums[i], g, kOperand);
    });
  }
  use(sums);
  return at;
}

}  // namespace lmclock::LMCLOCK_PATH
