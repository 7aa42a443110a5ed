// Inside of a q8_32 activation record: one cache line per 32 elements, written by round_row, read
// by int8 kernels.
//
// Codes and scale of a block share a line, so that a tile follows one pointer per row, AMX tile
// loads never cross a line, and every offset is a constant. The sums are stored already multiplied
// by the offsets of the code formats: a kernel starts its integer accumulator with one broadcast
// load, which costs no vector port.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace lmclock::LMCLOCK_PATH {

struct alignas(64) Q8Block {
  int8_t q[32];
  float d;         // scale: amax / 127
  float s;         // d * sum(q), for formats with a minimum
  int32_t n8;      // -8 * sum(q): q4_0
  int32_t n128;    // -128 * sum(q): codes stored ^0x80
  int32_t n32[2];  // -32 * sum of each 16 codes: q6_k, generic16
  int32_t unused[2];
};
static_assert(sizeof(Q8Block) == 64);

LM_INLINE const Q8Block& q8(const uint8_t* p) { return *reinterpret_cast<const Q8Block*>(p); }

// Elements k0 .. k0 + n of record or row `x` as f32.
void activations_f32(Act act, const uint8_t* x, int64_t k0, int64_t n, float* out);

}  // namespace lmclock::LMCLOCK_PATH
