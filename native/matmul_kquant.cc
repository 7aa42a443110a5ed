// int8 tiles for q4_k, q6_k and generic16, sub-block after sub-block in k. What costs much to
// decode (q6_k) is decoded once for several tiles of rows.

#include "tables.h"
#include "tile.h"

namespace lmclock::LMCLOCK_PATH {

namespace {

// One row: the two blocks that share bytes are one pass over them, two chains of dot products.
void row_q4k(const TileArgs& args) {
  f32x16 acc = splat(0.0f);
  const uint8_t* x = args.x;
  const i32x16 low = splat_i(0x0f0f0f0f);
  const uint8_t* end = args.panel + args.width / 256 * Q4_K::kBytes;
  for (const uint8_t* w = args.panel; w < end; w += Q4_K::kBytes) {
    K4Scales s;
    load_scales(w, s);
    unroll<4>([&](auto pair) LM_LAMBDA {
      const uint8_t* p = w + Q4_K::kCodes + 512 * pair;
      prefetch<Q4_K::kBytes / 4>(w + Q4_K::kBytes / 4 * pair, args);
      i32x16 sums[2] = {splat_i(0), splat_i(0)};
      unroll<8>([&](auto i) LM_LAMBDA {
        const i32x16 raw = load_i(p + 64 * i);
        const i32x16 halves[2] = {raw & low, shr<4>(raw) & low};
        unroll<2>([&](auto h) LM_LAMBDA {
          const i32x16 one[1] = {halves[h]};
          sums[h] = dot<4, 1>(sums[h], one, reinterpret_cast<const int8_t*>(x + 64 * h + 4 * i));
        });
      });
      unroll<2>([&](auto h) LM_LAMBDA {
        const Q8Block& b = q8(x + 64 * h);
        acc = fma(s.d[2 * pair + h] * splat(b.d), to_f32(sums[h]), acc);
        acc = fma(s.m[2 * pair + h], splat(b.s), acc);
      });
      x += 2 * sizeof(Q8Block);
    });
  }
  store(args.out, acc);
}

template <int R>
struct TileQ4K {
  template <int T>
  static void tile(const TileArgs& args) {
    if constexpr (T == 1) return row_q4k(args);
    f32x16 acc[T];
    clear(acc);
    auto rows = RowSet<T>::of(args);
    const i32x16 low = splat_i(0x0f0f0f0f);
    const uint8_t* end = args.panel + args.width / 256 * Q4_K::kBytes;
    for (const uint8_t* w = args.panel; w < end; w += Q4_K::kBytes) {
      K4Scales s;
      load_scales(w, s);
      const uint8_t* p = w + Q4_K::kCodes;
      for (int pair = 0; pair < 8; pair += 2, p += 512) {
        RowSet<T>::pin(rows);
        prefetch<Q4_K::kBytes / 4>(p, args);
        i32x16 g[8];
        unroll<8>([&](auto i) LM_LAMBDA { g[i] = load_i(p + 64 * i) & low; });
        step32<R, 4, 0, true>(acc, s.d[pair], s.m[pair], g, rows);
        RowSet<T>::next(rows);
        unroll<8>([&](auto i) LM_LAMBDA { g[i] = shr<4>(load_i(p + 64 * i)) & low; });
        step32<R, 4, 0, true>(acc, s.d[pair + 1], s.m[pair + 1], g, rows);
        RowSet<T>::next(rows);
      }
    }
    store_all(args.out, acc);
  }
};

// One row: the eight dot products of a half stay in registers while its bytes are read once, in
// order.
void row_q6k(const TileArgs& args) {
  f32x16 acc = splat(0.0f);
  const uint8_t* x = args.x;
  const uint8_t* end = args.panel + args.width / 256 * Q6_K::kBytes;
  for (const uint8_t* w = args.panel; w < end; w += Q6_K::kBytes) {
    const f32x16 d = load_f16(w);
    for (const uint8_t* half = w + 32; half < w + Q6_K::kBytes; half += Q6_K::kHalf) {
      i32x16 sums[8];
      unroll<8>([&](auto j) LM_LAMBDA { sums[j] = splat_i(q8(x + 64 * (j / 2)).n32[j % 2]); });
      unroll<8>([&](auto g) LM_LAMBDA {
        prefetch<192>(half + 192 * g, args);
        i32x16 codes[4];
        q6k_codes(half, g, codes);
        unroll<4>([&](auto j) LM_LAMBDA {
          const i32x16 one[1] = {codes[j]};
          i32x16& sum = sums[2 * j + g / 4];
          sum = dot<6, 1>(sum, one, reinterpret_cast<const int8_t*>(x + 64 * j + 4 * g));
        });
      });
      unroll<4>([&](auto j) LM_LAMBDA {
        const f32x16 scales[2] = {q6k_scale<2 * j>(half, d), q6k_scale<2 * j + 1>(half, d)};
        const Q8Block& b = q8(x + 64 * j);
        const f32x16 t = scaled16<false>(sums[2 * j], sums[2 * j + 1], scales, scales, b);
        acc = fma(splat(b.d), t, acc);
      });
      x += 4 * sizeof(Q8Block);
    }
  }
  store(args.out, acc);
}

// 128 elements of a panel as the tiles read them, in k order.
struct Q6Half {
  uint8_t codes[2048];
  float scales[8][16];
};

void decode_half(const uint8_t* half, f32x16 d, Q6Half& out) {
  unroll<8>([&](auto g) LM_LAMBDA {
    i32x16 codes[4];
    q6k_codes(half, g, codes);
    unroll<4>([&](auto j) LM_LAMBDA { store_i(out.codes + 64 * (8 * j + g), codes[j]); });
    store(out.scales[g], q6k_scale<g>(half, d));
  });
}

// Elements decoded at a time: 20 KB. With 256 the rows are read in pieces of 512 bytes, from the
// second-level cache, which costs 1-3 % of the peak.
constexpr int kDecodedElements = 1024;

// T rows from x on against `count` decoded halves; continues the sums in out.
template <int T>
void decoded_q6k(const Q6Half* halves, int count, const uint8_t* x, int64_t stride, float* out) {
  f32x16 acc[T];
  unroll<T>([&](auto t) LM_LAMBDA { acc[t] = load(out + 16 * t); });
  auto rows = RowSet<T>::of({nullptr, x, stride, 0, nullptr, 0});
  for (const Q6Half* half = halves; half < halves + count; ++half) {
    for (int block = 0; block < 4; ++block) {
      RowSet<T>::pin(rows);
      const f32x16 scales[2] = {load(half->scales[2 * block]), load(half->scales[2 * block + 1])};
      i32x16 g[8];
      unroll<8>([&](auto i) LM_LAMBDA { g[i] = load_i(half->codes + 64 * (8 * block + i)); });
      step16<6, 32, false>(acc, scales, scales, g, rows);
      RowSet<T>::next(rows);
    }
  }
  store_all(out, acc);
}

// Any number of rows, tile after tile over elements that are decoded once.
LM_INLINE void rows_q6k(const TileArgs& args, int64_t rows) {
  alignas(64) Q6Half halves[kDecodedElements / 128];
  std::memset(args.out, 0, static_cast<size_t>(64 * rows));
  const uint8_t* x = args.x;
  const uint8_t* w = args.panel;
  // What is decoded next, to arrive while this is multiplied.
  const int64_t ahead = args.ahead | args.rows_ahead ? kDecodedElements / 256 * Q6_K::kBytes : 0;
  for (int64_t left = args.width; left > 0; left -= kDecodedElements, x += 2 * kDecodedElements) {
    int count = 0;
    for (; count < kDecodedElements / 128 && 128 * count < left; w += Q6_K::kBytes) {
      const f32x16 d = load_f16(w);
      for (int h = 0; h < 2; ++h) {
        prefetch<Q6_K::kHalf, 2>(w + Q6_K::kHalf * h, ahead);
        decode_half(w + 32 + Q6_K::kHalf * h, d, halves[count++]);
      }
    }
    int64_t r = 0;
    unroll<kTileSizes>([&](auto size) LM_LAMBDA {
      constexpr int T = kTileRows[size];
      for (; rows - r >= T; r += T)
        decoded_q6k<T>(halves, count, x + r * args.x_stride, args.x_stride, args.out + 16 * r);
    });
  }
}

struct TileQ6K {
  template <int T>
  static void tile(const TileArgs& args) {
    if constexpr (T == 1) return row_q6k(args);
    rows_q6k(args, T);
  }
};

// Rows that share the decoding of a panel: with 16 it is a tenth of the work on avx512, with the 4
// of a tile a third on avx2.
constexpr int64_t kDecodedRows = 64;

int64_t take_decoded(Layout layout, const Rows& x, int64_t rows) {
  if (layout != Layout::q6_k || x.act != Act::q8_32 || rows < 2 * kTileRows[0]) return 0;
  return rows < kDecodedRows ? rows : kDecodedRows;
}

void run_decoded(ManyConfig&, Layout, const TileArgs& args, int64_t rows) { rows_q6k(args, rows); }

struct TileGeneric16 {
  template <int T>
  static void tile(const TileArgs& args) {
    f32x16 acc[T];
    clear(acc);
    auto rows = RowSet<T>::of(args);
    const uint8_t* end = args.panel + args.width / 32 * 768;
    for (const uint8_t* w = args.panel; w < end; w += 768) {
      RowSet<T>::pin(rows);
      prefetch<768>(w, args);
      f32x16 d[2], m[2];
      i32x16 g[8];
      unroll<2>([&](auto h) LM_LAMBDA {
        const uint8_t* p = w + 384 * h;
        d[h] = as_f32(load_i(p));
        m[h] = as_f32(load_i(p + 64)) * splat(-0x1p-5f);
        unroll<4>([&](auto i) LM_LAMBDA { g[4 * h + i] = load_i(p + 128 + 64 * i); });
      });
      step16<8, 128, true>(acc, d, m, g, rows);
      RowSet<T>::next(rows);
    }
    store_all(args.out, acc);
  }
};

constexpr Tiles kQ4KChains = make_tiles<TileQ4K<kChainRows>>();
constexpr Tiles kQ4K = make_tiles<TileQ4K<kDotRows>>(), kQ6K = make_tiles<TileQ6K>();
constexpr Tiles kGeneric16 = make_tiles<TileGeneric16>();

}  // namespace

const ManyRows kDecoded = {take_decoded, run_decoded, nullptr};

const Tiles& kquant_tiles(Layout layout) {
  if (layout == Layout::q4_k) return whole_chains ? kQ4KChains : kQ4K;
  return layout == Layout::q6_k ? kQ6K : kGeneric16;
}

}  // namespace lmclock::LMCLOCK_PATH
