// Many rows at once on AMX tiles: the same bits as the avx512 tiles for int8, bits of their own for
// bf16.
//
// int8: a panel's codes are expanded to signed bytes once for up to 128 rows. Then, for 16 rows x
// 16 outputs x 32 elements, one tile instruction gives the exact integer dot products, which are
// stored, loaded as vectors and scaled in the order of tile.h. The scaling is the limit: on Granite
// Rapids one 512-bit operation a cycle, not two, runs beside tile instructions, and there are 4 (3
// without a minimum) a row: 64 cycles, beside 36 of tile work and 96 at least for the same in dot
// products. Measured: 72 with all in L1, 1.2-1.3 times the avx512 tiles in all. What did not help:
// 3 blocks ahead, prefetching rows into L1, separate tile and scaling phases (36 + 32 cycles).
//
// bf16: sums stay in tiles over all of k, 10 to 14 times as fast as the dot products of avx512.
// Their order is the tile unit's own, so that a single row has to take this way too.

#include "tables.h"
#include "tile.h"

#if defined(LMCLOCK_EMULATED_TILES)
#include "tiles_emulated.h"
#define LM_TABLE kEmulatedAmxKernels
#define LM_PATH "amx_emulated"
#else
#define LM_TABLE kAmxKernels
#define LM_PATH "amx"
#endif

namespace lmclock::LMCLOCK_PATH {

namespace {

// Of rows past the last 16, fewer than this are faster in avx512 tiles (measured: 8 are, 12 are
// not).
constexpr int64_t kFewestRows = 10;
// Activations that are read again for each panel stay in the second-level cache (2 MB with AMX).
constexpr int64_t kRowBytes = 768 * 1024;
// k expanded at a time: 20 KB of codes and scales.
constexpr int64_t kElements = 1024;

// The tile instructions do not tell the compiler that they read memory.
LM_INLINE void publish() { asm volatile("" ::: "memory"); }

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tile registers 0-3: 16 results of each of `rows` rows. 4 and 6: rows and weights of `words` times
// 4 bytes of k. 5 and 7: the same with `words_b`.
void configure(ManyConfig& now, int64_t rows, int words, int words_b) {
  if (now.rows == rows && now.words == words && now.words_b == words_b) return;
  now = {static_cast<int>(rows), words, words_b};
  TileConfig config;
  auto set = [&](int tile, int64_t r, int64_t bytes) {
    config.rows[tile] = static_cast<uint8_t>(r);
    config.row_bytes[tile] = static_cast<uint16_t>(bytes);
  };
  for (int tile = 0; tile < 4; ++tile) set(tile, rows, 64);
  set(4, rows, 4 * words);
  set(5, rows, 4 * words_b);
  set(6, words, 64);
  set(7, words_b, 64);
  publish();
  _tile_loadconfig(&config);
}

int64_t take(Layout layout, const Rows& x, int64_t rows) {
  const bool pairs = layout == Layout::bf16 && x.act == Act::bf16 && !wide_bf16;
  const bool codes = x.act == Act::q8_32 && layout != Layout::f32 && layout != Layout::f16 &&
                     layout != Layout::bf16;
  if (!pairs && !codes) return 0;
  int64_t most = kRowBytes / x.stride / 16 * 16;
  most = most < 16 ? 16 : most > kMostRows ? kMostRows : most;
  if (rows >= most) return most;
  return codes && rows % 16 < kFewestRows ? rows / 16 * 16 : rows;
}

constexpr int kDepth = 2;  // blocks that the tile unit is ahead of the scaling

template <int Elements, bool Min>
struct Int8Rows {
  static constexpr int kBytes = 128 + 16 * Elements;

#define LM_MULTIPLY(result, a, b) \
  _tile_zero(result);             \
  _tile_loadd(a, x, stride);      \
  _tile_loadd(b, w + 128, 64);    \
  _tile_dpbssd(result, a, b);     \
  _tile_stored(result, c, 64);    \
  return
  LM_INLINE void multiply(int64_t slot, const uint8_t* x, int64_t stride, const uint8_t* w,
                          int32_t* c) {
    switch (slot) {
      case 0: LM_MULTIPLY(0, 4, 6);
      case 1: LM_MULTIPLY(1, 5, 7);
      case 2: LM_MULTIPLY(2, 4, 6);
      default: LM_MULTIPLY(3, 5, 7);
    }
  }

  // Where block b of a row's codes starts: 16-element blocks come in pairs of one line.
  LM_INLINE int64_t offset(int64_t b) {
    return Elements == 32 ? 64 * b : 64 * (b / 2) + 16 * (b % 2);
  }

  static constexpr int kHalves = 32 / Elements;
  struct Scales {  // of the block, or of the two that make 32 elements and end at w
    f32x16 d[kHalves], m[kHalves];

    LM_INLINE Scales of(const uint8_t* w) {
      Scales s;
      unroll<kHalves>([&](auto h) LM_LAMBDA {
        const uint8_t* p = w - kBytes * (kHalves - 1 - h);
        s.d[h] = as_f32(load_i(p));
        s.m[h] = as_f32(load_i(p + 64));
        if constexpr (Min && Elements == 16) s.m[h] = s.m[h] * splat(-0x1p-5f);
      });
      return s;
    }
  };

  // The next 32 elements of row t in the order of tile.h, once block b has been multiplied.
  LM_INLINE f32x16 scale(f32x16 acc, const Q8Block& q, const Scales& s, const int32_t (&c)[4][256],
                         int64_t b, int64_t t) {
    const i32x16 idot = load_i(c[b % 4] + 16 * t);
    if constexpr (Elements == 16) {
      const i32x16 before = load_i(c[(b - 1) % 4] + 16 * t);
      return fma(splat(q.d), scaled16<Min>(before, idot, s.d, s.m, q), acc);
    } else {
      acc = fma(s.d[0] * splat(q.d), to_f32(idot), acc);
      if constexpr (Min) acc = fma(s.m[0], splat(q.s), acc);
      return acc;
    }
  }

  // `count` rows (16, or fewer) from x; continues the sums in out.
  static void run(const uint8_t* w, int64_t blocks, const uint8_t* x, int64_t stride, int64_t count,
                  float* out) {
    alignas(64) int32_t c[4][256];
    for (int64_t b = 0; b < kDepth && b < blocks; ++b)
      multiply(b, x + offset(b), stride, w + kBytes * b, c[b]);
    if (count < 16) return run_part(w, blocks, x, stride, count, out, c);
    auto rows = RowSet<16>::of({nullptr, x, stride, 0, nullptr, 0});
    f32x16 acc[16];
    unroll<16>([&](auto t) LM_LAMBDA { acc[t] = load(out + 16 * t); });
    for (int64_t b = 0; b < blocks; ++b, w += kBytes) {
      issue(w, b, blocks, x, stride, c);
      if (b % kHalves != kHalves - 1) continue;
      RowSet<16>::pin(rows);
      const Scales s = Scales::of(w);
      unroll<16>([&](auto t) LM_LAMBDA {
        acc[t] = scale(acc[t], q8(RowSet<16>::template row<t>(rows)), s, c, b, t);
      });
      RowSet<16>::next(rows);
    }
    store_all(out, acc);
  }

  // The tile work of block b + kDepth, where w stands at block b.
  LM_INLINE void issue(const uint8_t* w, int64_t b, int64_t blocks, const uint8_t* x,
                       int64_t stride, int32_t (&c)[4][256]) {
    const int64_t next = b + kDepth;
    if (next < blocks)
      multiply(next % 4, x + offset(next), stride, w + kBytes * kDepth, c[next % 4]);
  }

  static void run_part(const uint8_t* w, int64_t blocks, const uint8_t* x, int64_t stride,
                       int64_t count, float* out, int32_t (&c)[4][256]) {
    for (int64_t b = 0; b < blocks; ++b, w += kBytes) {
      issue(w, b, blocks, x, stride, c);
      if (b % kHalves != kHalves - 1) continue;
      const Scales s = Scales::of(w);
      for (int64_t t = 0; t < count; ++t) {
        const Q8Block& q = q8(x + t * stride + 64 * (b / kHalves));
        store(out + 16 * t, scale(load(out + 16 * t), q, s, c, b, t));
      }
    }
  }
};

using Int8Run = void (*)(const uint8_t*, int64_t, const uint8_t*, int64_t, int64_t, float*);

Int8Run int8_run(Layout layout) {
  switch (layout) {
    case Layout::q6_k: return Int8Rows<16, false>::run;
    case Layout::generic16: return Int8Rows<16, true>::run;
    case Layout::q4_1:
    case Layout::q4_k:
    case Layout::generic32: return Int8Rows<32, true>::run;
    default: return Int8Rows<32, false>::run;
  }
}

void run_int8(ManyConfig& config, Layout layout, const TileArgs& args, int64_t rows) {
  alignas(64) uint8_t expanded[kElements / 16 * 384];
  const int elements = scale_elements(layout);
  const int64_t block = layout_block(layout), bytes = layout_bytes(layout);
  const Int8Run run = int8_run(layout);
  std::memset(args.out, 0, static_cast<size_t>((rows + 15) / 16 * 16) * 64);
  for (int64_t k = 0; k < args.width; k += kElements) {
    const int64_t n = args.width - k < kElements ? args.width - k : kElements;
    expand(layout, args.panel + k / block * bytes, n / block, expanded);
    publish();
    for (int64_t r = 0; r < rows; r += 16) {
      const int64_t count = rows - r < 16 ? rows - r : 16;
      configure(config, count, elements / 4, elements / 4);
      run(expanded, n / elements, args.x + r * args.x_stride + 2 * k, args.x_stride, count,
          args.out + 16 * r);
    }
  }
}

// acc[t] += rows 16 t .. 16 t + 15 of x times weights, T tiles.
template <int T>
LM_INLINE void multiply_bf16(const uint8_t* x, int64_t stride, const uint8_t* w) {
  _tile_loadd(6, w, 64);
  _tile_loadd(4, x, stride);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (T > 1) {
    _tile_loadd(4, x + 16 * stride, stride);
    _tile_dpbf16ps(1, 4, 6);
  }
  if constexpr (T > 2) {
    _tile_loadd(4, x + 32 * stride, stride);
    _tile_dpbf16ps(2, 4, 6);
    _tile_loadd(4, x + 48 * stride, stride);
    _tile_dpbf16ps(3, 4, 6);
  }
}

// The same for the last, incomplete step of k.
template <int T>
LM_INLINE void multiply_rest(const uint8_t* x, int64_t stride, const uint8_t* w) {
  _tile_loadd(7, w, 64);
  _tile_loadd(5, x, stride);
  _tile_dpbf16ps(0, 5, 7);
  if constexpr (T > 1) {
    _tile_loadd(5, x + 16 * stride, stride);
    _tile_dpbf16ps(1, 5, 7);
  }
  if constexpr (T > 2) {
    _tile_loadd(5, x + 32 * stride, stride);
    _tile_dpbf16ps(2, 5, 7);
    _tile_loadd(5, x + 48 * stride, stride);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// Rows [r, r + 16 T), T = 1, 2 or 4, over all of k.
template <int T>
void bf16_rows(const TileArgs& args, int64_t r, int64_t full, bool rest) {
  const uint8_t* x = args.x + r * args.x_stride;
  const uint8_t* w = args.panel;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t n = 0; n < full; ++n, x += 64, w += 1024) {
    prefetch<1024>(w, args);
    multiply_bf16<T>(x, args.x_stride, w);
  }
  if (rest) multiply_rest<T>(x, args.x_stride, w);
  float* out = args.out + 16 * r;
  _tile_stored(0, out, 64);
  if constexpr (T > 1) _tile_stored(1, out + 256, 64);
  if constexpr (T > 2) {
    _tile_stored(2, out + 512, 64);
    _tile_stored(3, out + 768, 64);
  }
}

void run_bf16(ManyConfig& config, const TileArgs& args, int64_t rows) {
  const int64_t words = (args.width + 1) / 2, full = words / 16;
  const int rest = static_cast<int>(words % 16), words_b = rest ? rest : 16;
  int64_t r = 0;
  if (rows >= 16) configure(config, 16, 16, words_b);
  for (; rows - r >= 64; r += 64) bf16_rows<4>(args, r, full, rest);
  for (; rows - r >= 32; r += 32) bf16_rows<2>(args, r, full, rest);
  for (; rows - r >= 16; r += 16) bf16_rows<1>(args, r, full, rest);
  if (r == rows) return;
  configure(config, rows - r, 16, words_b);
  bf16_rows<1>(args, r, full, rest);
}

void run(ManyConfig& config, Layout layout, const TileArgs& args, int64_t rows) {
  if (layout == Layout::bf16) return run_bf16(config, args, rows);
  run_int8(config, layout, args, rows);
}

void end() { _tile_release(); }

constexpr ManyRows kAmx = {take, run, end};

void amx_linear(const Linear& l, int64_t r0, int64_t r1, int64_t p0, int64_t p1) {
  linear_with(&kAmx, l, r0, r1, p0, p1);
}

void amx_glu(const Glu& g, int64_t r0, int64_t r1, int64_t p0, int64_t p1) {
  glu_with(&kAmx, g, r0, r1, p0, p1);
}

// Four results, operands at rest: 16 x 16 x 64 int8 or 16 x 16 x 32 bf16 multiply-adds an
// instruction.
template <bool Int8>
int64_t peak(int64_t rounds) {
  constexpr int64_t kPerRound = 256;
  ManyConfig config;
  configure(config, 16, 16, 16);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(6);
  for (int64_t n = 0; n < rounds * kPerRound; n += 4) {
    if constexpr (Int8) {
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 6);
      _tile_dpbssd(2, 4, 6);
      _tile_dpbssd(3, 4, 6);
    } else {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 6);
      _tile_dpbf16ps(2, 4, 6);
      _tile_dpbf16ps(3, 4, 6);
    }
  }
  _tile_release();
  return rounds * kPerRound * (Int8 ? 32768 : 16384);
}

}  // namespace

extern const Kernels LM_TABLE;
const Kernels LM_TABLE = {LM_PATH, pack,       unpack_rows, round_row,   amx_linear, amx_glu,
                          apply,   peak<true>, peak_int16,  peak<false>, peak_f32,   stream};

}  // namespace lmclock::LMCLOCK_PATH
