// f32 and bf16 tiles, and the way through f32 for every other pair of layout and activations.
//
// Per row and output: acc = fma(w, x, acc) over k in order; bf16 x bf16 goes by pairs of k
// (dot_bf16).

#include "tables.h"
#include "tile.h"

namespace lmclock::LMCLOCK_PATH {

namespace {

struct F32 {
  static constexpr int kStep = 1, kBytes = 64;
  LM_INLINE void load_k(const uint8_t* p, f32x16 (&w)[1]) {
    w[0] = load(reinterpret_cast<const float*>(p));
  }
};
struct F16 {
  static constexpr int kStep = 1, kBytes = 32;
  LM_INLINE void load_k(const uint8_t* p, f32x16 (&w)[1]) { w[0] = load_f16(p); }
};
struct BF16 {
  static constexpr int kStep = 2, kBytes = 64;
  LM_INLINE void load_k(const uint8_t* p, f32x16 (&w)[2]) {
    const i32x16 pair = load_i(p);
    w[0] = from_bf16(pair);
    w[1] = as_f32(pair & splat_i(static_cast<int32_t>(0xffff0000)));
  }
};

// Values of k in one turn of the loop, whose own instructions then cost little.
constexpr int kTurn = 4;

// N steps of k at once, from weights w and the rows' current place.
template <class W, int N, int T>
LM_INLINE void steps(f32x16 (&acc)[T], const uint8_t* w, RowSet<T>& rows, const TileArgs& args) {
  prefetch<N * W::kBytes>(w, args);
  unroll<N>([&](auto n) LM_LAMBDA {
    RowSet<T>::pin(rows);  // else the sums are made once for all steps, and spilled
    f32x16 wk[W::kStep];
    W::load_k(w + n * W::kBytes, wk);
    unroll<W::kStep>([&](auto i) LM_LAMBDA {
      unroll<T>([&](auto t) LM_LAMBDA {
        const float* x = reinterpret_cast<const float*>(RowSet<T>::template row<t>(rows));
        acc[t] = fma(wk[i], splat(x[n * W::kStep + i]), acc[t]);
      });
    });
  });
}

// Continues the sums in args.out.
template <class W, int T>
LM_INLINE void accumulate(const TileArgs& args) {
  constexpr int kSteps = kTurn / W::kStep;
  f32x16 acc[T];
  unroll<T>([&](auto t) LM_LAMBDA { acc[t] = load(args.out + 16 * t); });
  const uint8_t* w = args.panel;
  RowSet<T> rows = RowSet<T>::of(args);
  const auto advance = [&](int steps) LM_LAMBDA {
    w += steps * W::kBytes;
    unroll<RowSet<T>::kGroups>([&](auto g) LM_LAMBDA { rows.base[g] += steps * W::kStep * 4; });
  };
  int64_t k = 0;
  for (; k + kTurn <= args.width; k += kTurn) {
    steps<W, kSteps>(acc, w, rows, args);
    advance(kSteps);
  }
  for (; k + W::kStep <= args.width; k += W::kStep) {
    steps<W, 1>(acc, w, rows, args);
    advance(1);
  }
  if (k < args.width) {
    f32x16 wk[W::kStep];
    W::load_k(w, wk);
    unroll<T>([&](auto t) LM_LAMBDA {
      const float* x = reinterpret_cast<const float*>(RowSet<T>::template row<t>(rows));
      acc[t] = fma(wk[0], splat(x[0]), acc[t]);
    });
  }
  unroll<T>([&](auto t) LM_LAMBDA { store(args.out + 16 * t, acc[t]); });
}

template <class W>
struct Float {
  template <int T>
  static void tile(const TileArgs& args) {
    std::memset(args.out, 0, 64 * T);
    accumulate<W, T>(args);
  }
};

struct Bf16Pairs {
  template <int T>
  static void tile(const TileArgs& args) {
    f32x16 acc[T];
    unroll<T>([&](auto t) LM_LAMBDA { acc[t] = splat(0.0f); });
    const uint8_t* x = args.x;
    const uint8_t* end = args.panel + (args.width + 1) / 2 * 64;
    for (const uint8_t* w = args.panel; w < end; w += 64, x += 4) {
      prefetch<64>(w, args);
      const i32x16 pair = load_i(w);
      unroll<T>([&](auto t) LM_LAMBDA { acc[t] = dot_bf16(acc[t], pair, x + t * args.x_stride); });
    }
    unroll<T>([&](auto t) LM_LAMBDA { store(args.out + 16 * t, acc[t]); });
  }
};

template <class W>
constexpr Tiles kTiles = make_tiles<Float<W>>();
constexpr Tiles kBf16Tiles = make_tiles<Bf16Pairs>();

constexpr int64_t kChunk =
    256;  // k at a time: weights 16 KB and 16 rows of activations 16 KB fit in L1

template <int T>
void chunks_f32(Layout layout, Act act, const TileArgs& args) {
  alignas(64) float w[kChunk * kPanel], x[T * kChunk];
  std::memset(args.out, 0, 64 * T);
  for (int64_t k0 = 0; k0 < args.width; k0 += kChunk) {
    const int64_t n = args.width - k0 < kChunk ? args.width - k0 : kChunk;
    dequantise(layout, args.panel, k0, n, w);
    for (int t = 0; t < T; ++t)
      activations_f32(act, args.x + t * args.x_stride, k0, n, x + t * kChunk);
    accumulate<F32, T>({reinterpret_cast<const uint8_t*>(w), reinterpret_cast<const uint8_t*>(x),
                        4 * kChunk, n, args.out, 0});
  }
}

}  // namespace

const Tiles& float_tiles(Layout layout) {
  switch (layout) {
    case Layout::f32: return kTiles<F32>;
    case Layout::f16: return kTiles<F16>;
    default: return kTiles<BF16>;
  }
}

const Tiles& bf16_tiles() { return kBf16Tiles; }

void tile_f32(Layout layout, Act act, const TileArgs& args, int size) {
  unroll<kTileSizes>([&](auto i) LM_LAMBDA {
    if (i == size) chunks_f32<kTileRows[i]>(layout, act, args);
  });
}

}  // namespace lmclock::LMCLOCK_PATH
