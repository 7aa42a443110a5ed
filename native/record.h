// Inside of an activation record (what round_row writes and the int8 kernels read).
//
// q8_32: int8 codes (width, padded to a cache line), one Meta per 32 elements, then one int32 per 16 elements.
// The sums are stored already multiplied by the offsets of the code formats: a kernel starts its integer
// accumulator with one broadcast load, which costs no vector port.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace lmclock::LMCLOCK_PATH {

struct Meta {
  float d;         // scale: amax / 127
  float s;         // d * sum of the block's codes, for formats with a minimum
  int32_t n8;      // -8 * sum: q4_0
  int32_t n128;    // -128 * sum: codes stored ^0x80
};

LM_INLINE int64_t meta_offset(int64_t width) { return (width + 63) / 64 * 64; }

// -32 * sum of 16 codes each: q6_k, generic16.
LM_INLINE int64_t sums_offset(int64_t width) {
  return meta_offset(width) + width / kRoundBlock * static_cast<int64_t>(sizeof(Meta));
}

LM_INLINE const Meta* meta_at(const uint8_t* p) { return reinterpret_cast<const Meta*>(p); }

// Rows k0 .. k0 + n of record or row `x` as f32.
void activations_f32(Act act, const uint8_t* x, int64_t width, int64_t k0, int64_t n, float* out);

}  // namespace lmclock::LMCLOCK_PATH
