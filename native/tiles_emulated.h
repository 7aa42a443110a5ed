// The tile instructions of AMX in plain C++, so that matmul_amx.cc can be tested where a processor
// has none: -DLMCLOCK_EMULATE_AMX=ON adds a path amx_emulated. Slow, and for nothing but tests.
//
// As Intel's manual has them: eight tiles of up to 16 rows of 64 bytes per thread; loads fill the
// rest of a tile with zeros; dpbf16ps sums the products of even and of odd k apart and adds both to
// the result at the end, by fused multiply-adds to nearest even that take and leave subnormal
// numbers as zero. A shape that the processor would refuse ends the program.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace lmclock::LMCLOCK_PATH {

namespace tiles {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

struct Tile {
  int rows, bytes;
  alignas(64) uint8_t data[kRows][kRowBytes];
};
struct State {
  bool configured;
  Tile tile[kTiles];
};
inline thread_local State state;

inline void require(bool ok) {
  if (!ok) std::abort();
}

inline Tile& at(int n) {
  require(state.configured && state.tile[n].rows > 0);
  return state.tile[n];
}

// Palette 1: bytes 16 to 31 are eight row sizes, bytes 48 to 55 eight numbers of rows.
inline void configure(const void* from) {
  const uint8_t* config = static_cast<const uint8_t*>(from);
  require(config[0] == 1);
  for (int n = 0; n < kTiles; ++n) {
    uint16_t bytes;
    std::memcpy(&bytes, config + 16 + 2 * n, 2);
    const int rows = config[48 + n];
    require(rows <= kRows && bytes <= kRowBytes && (rows == 0) == (bytes == 0));
    state.tile[n] = {rows, bytes, {}};
  }
  state.configured = true;
}

inline void release() { state = {}; }

inline void zero(int n) { std::memset(at(n).data, 0, sizeof(Tile::data)); }

inline void load(int n, const void* from, int64_t stride) {
  zero(n);
  Tile& t = at(n);
  for (int r = 0; r < t.rows; ++r)
    std::memcpy(t.data[r], static_cast<const uint8_t*>(from) + r * stride,
                static_cast<size_t>(t.bytes));
}

inline void store(int n, void* to, int64_t stride) {
  const Tile& t = at(n);
  for (int r = 0; r < t.rows; ++r)
    std::memcpy(static_cast<uint8_t*>(to) + r * stride, t.data[r], static_cast<size_t>(t.bytes));
}

struct Operands {
  Tile &sums, &x, &w;
};

inline Operands operands(int c, int a, int b) {
  Operands o = {at(c), at(a), at(b)};
  require(o.x.rows == o.sums.rows && o.w.rows == o.x.bytes / 4 && o.w.bytes == o.sums.bytes);
  return o;
}

inline void dot_bytes(int c, int a, int b) {
  const Operands o = operands(c, a, b);
  for (int m = 0; m < o.sums.rows; ++m) {
    uint32_t sums[kRowBytes / 4];  // they wrap, as the instruction's do
    std::memcpy(sums, o.sums.data[m], sizeof(sums));
    for (int k = 0; k < o.x.bytes; ++k)
      for (int n = 0; n < o.sums.bytes / 4; ++n)
        sums[n] += static_cast<uint32_t>(static_cast<int8_t>(o.x.data[m][k]) *
                                         static_cast<int8_t>(o.w.data[k / 4][4 * n + k % 4]));
    std::memcpy(o.sums.data[m], sums, sizeof(sums));
  }
}

inline float flush(float x) { return __builtin_fabsf(x) < 0x1p-126f ? x * 0.0f : x; }

inline float bf16(const uint8_t* p) {
  uint16_t half;
  std::memcpy(&half, p, 2);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return flush(x);
}

inline void dot_pairs(int c, int a, int b) {
  const Operands o = operands(c, a, b);
  for (int m = 0; m < o.sums.rows; ++m) {
    float sums[2][kRowBytes / 4] = {};
    for (int k = 0; k < o.x.bytes / 2; ++k)
      for (int n = 0; n < o.sums.bytes / 4; ++n) {
        float& sum = sums[k % 2][n];
        sum = flush(__builtin_fmaf(bf16(o.x.data[m] + 2 * k),
                                   bf16(o.w.data[k / 2] + 4 * n + 2 * (k % 2)), sum));
      }
    for (int n = 0; n < o.sums.bytes / 4; ++n) {
      float sum;
      std::memcpy(&sum, o.sums.data[m] + 4 * n, 4);
      sum = flush(flush(sum) + flush(sums[0][n] + sums[1][n]));
      std::memcpy(o.sums.data[m] + 4 * n, &sum, 4);
    }
  }
}

}  // namespace tiles

}  // namespace lmclock::LMCLOCK_PATH

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbssd
#undef _tile_dpbf16ps
#define _tile_loadconfig(from) tiles::configure(from)
#define _tile_release() tiles::release()
#define _tile_zero(n) tiles::zero(n)
#define _tile_loadd(n, from, stride) tiles::load(n, from, stride)
#define _tile_stored(n, to, stride) tiles::store(n, to, stride)
#define _tile_dpbssd(c, a, b) tiles::dot_bytes(c, a, b)
#define _tile_dpbf16ps(c, a, b) tiles::dot_pairs(c, a, b)
