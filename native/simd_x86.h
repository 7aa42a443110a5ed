// What the AVX2 and AVX-512 paths share: the 8 lanes that are left of a reduction after its first
// halving. The order is that of simd.h: lane i with i + 4, then 2, then 1.
#pragma once

#include <immintrin.h>

namespace lmclock::LMCLOCK_PATH {

#define LM_REDUCE(name, combine)                                                \
  LM_INLINE float name(__m256 x) {                                              \
    __m128 v = combine(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)); \
    v = combine(v, _mm_movehl_ps(v, v));                                        \
    return _mm_cvtss_f32(combine(v, _mm_shuffle_ps(v, v, 1)));                  \
  }
LM_REDUCE(reduce_add_8, _mm_add_ps)
LM_REDUCE(reduce_max_8, _mm_max_ps)
#undef LM_REDUCE

#define LM_REDUCE(name, combine)                                                         \
  LM_INLINE int32_t name(__m256i x) {                                                    \
    __m128i v = combine(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));      \
    v = combine(v, _mm_shuffle_epi32(v, 0x4e));                                          \
    return _mm_cvtsi128_si32(combine(v, _mm_shuffle_epi32(v, 0xb1)));                    \
  }
LM_REDUCE(reduce_add_8, _mm_add_epi32)
LM_REDUCE(reduce_max_8, _mm_max_epi32)
#undef LM_REDUCE

}  // namespace lmclock::LMCLOCK_PATH
