// f32 and bf16 tiles, and the way through f32 for every other pair of layout and activations.
//
// Per row and output there are two sums, of the first and of the second half of k, which are added
// at the end: two chains of dependent additions keep up with memory where one does not. Each is
// acc = fma(w, x, acc) over k in order; bf16 x bf16 goes by pairs of k (dot_bf16). The way through
// f32 has one sum over all of k.

#include "tables.h"
#include "tile.h"

namespace lmclock::LMCLOCK_PATH {

namespace {

// Weights against f32 rows: kStep values of k in kBytes of a panel and kInput bytes of a row.
template <class W, int Step, int Bytes>
struct Plain {
  static constexpr int kStep = Step, kBytes = Bytes, kInput = 4 * Step;

  // Step n of the rows; the first `Count` values of it.
  template <int n, int Count = Step, int T>
  LM_INLINE void multiply(f32x16 (&acc)[T], const uint8_t* w, const RowSet<T>& rows) {
    f32x16 wk[Step];
    W::load_k(w, wk);
    unroll<Count>([&](auto i) LM_LAMBDA {
      unroll<T>([&](auto t) LM_LAMBDA {
        const float* x = reinterpret_cast<const float*>(RowSet<T>::template row<t>(rows));
        acc[t] = fma(wk[i], splat(x[n * Step + i]), acc[t]);
      });
    });
  }
  template <int T>
  LM_INLINE void last(f32x16 (&acc)[T], const uint8_t* w, const RowSet<T>& rows) {
    multiply<0, 1>(acc, w, rows);
  }
};

struct F32 : Plain<F32, 1, 64> {
  LM_INLINE void load_k(const uint8_t* p, f32x16 (&w)[1]) {
    w[0] = load(reinterpret_cast<const float*>(p));
  }
};
struct F16 : Plain<F16, 1, 32> {
  LM_INLINE void load_k(const uint8_t* p, f32x16 (&w)[1]) { w[0] = load_f16(p); }
};
struct BF16 : Plain<BF16, 2, 64> {
  LM_INLINE void load_k(const uint8_t* p, f32x16 (&w)[2]) {
    const i32x16 pair = load_i(p);
    w[0] = from_bf16(pair);
    w[1] = as_f32(pair & splat_i(static_cast<int32_t>(0xffff0000)));
  }
};

// Weights and rows in bf16, both padded to pairs.
struct Pairs {
  static constexpr int kStep = 2, kBytes = 64, kInput = 4;

  template <int n, int T>
  LM_INLINE void multiply(f32x16 (&acc)[T], const uint8_t* w, const RowSet<T>& rows) {
    const i32x16 pair = load_i(w);
    unroll<T>([&](auto t) LM_LAMBDA {
      acc[t] = dot_bf16(acc[t], pair, RowSet<T>::template row<t>(rows) + kInput * n);
    });
  }
  template <int T>
  LM_INLINE void last(f32x16 (&acc)[T], const uint8_t* w, const RowSet<T>& rows) {
    multiply<0>(acc, w, rows);
  }
};

// Values of k in one turn of the loop, whose own instructions then cost little.
constexpr int kTurn = 4;

// A place in a panel and in the rows.
template <class W, int T>
struct At {
  const uint8_t* w;
  RowSet<T> rows;

  LM_INLINE void advance(At& at, int64_t steps) {
    at.w += steps * W::kBytes;
    unroll<RowSet<T>::kGroups>([&](auto g) LM_LAMBDA { at.rows.base[g] += steps * W::kInput; });
  }
};

// N steps of k.
template <class W, int N, int T>
LM_INLINE void steps(f32x16 (&acc)[T], At<W, T>& at, const TileArgs& args) {
  prefetch<N * W::kBytes>(at.w, args);
  unroll<N>([&](auto n) LM_LAMBDA {
    RowSet<T>::pin(at.rows);  // else the sums are made once for all steps, and spilled
    W::template multiply<n>(acc, at.w + n * W::kBytes, at.rows);
  });
  At<W, T>::advance(at, N);
}

// `width` values of k.
template <class W, int T>
LM_INLINE void sweep(f32x16 (&acc)[T], At<W, T>& at, int64_t width, const TileArgs& args) {
  int64_t k = 0;
  for (; k + kTurn <= width; k += kTurn) steps<W, kTurn / W::kStep>(acc, at, args);
  for (; k + W::kStep <= width; k += W::kStep) steps<W, 1>(acc, at, args);
  if (k < width) W::last(acc, at.w, at.rows);
}

template <class W>
struct Float {
  template <int T>
  static void tile(const TileArgs& args) {
    const int64_t half = args.width / 2 / kTurn * kTurn, rest = args.width - half;
    f32x16 acc[T];
    clear(acc);
    At<W, T> at = {args.panel, RowSet<T>::of(args)};
    if constexpr (T == 1) {
      f32x16 more[1] = {splat(0.0f)};
      At<W, T> behind = at;
      At<W, T>::advance(behind, half / W::kStep);
      for (int64_t k = 0; k < half; k += kTurn) {
        steps<W, kTurn / W::kStep>(acc, at, args);
        steps<W, kTurn / W::kStep>(more, behind, args);
      }
      sweep<W>(more, behind, rest - half, args);
      store(args.out, acc[0] + more[0]);
    } else {
      sweep<W>(acc, at, half, args);
      store_all(args.out, acc);
      clear(acc);
      sweep<W>(acc, at, rest, args);
      unroll<T>([&](auto t) LM_LAMBDA { acc[t] = load(args.out + 16 * t) + acc[t]; });
      store_all(args.out, acc);
    }
  }
};

template <class W>
constexpr Tiles kTiles = make_tiles<Float<W>>();
constexpr Tiles kBf16Tiles = make_tiles<Float<Pairs>>();

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
    const TileArgs part = {reinterpret_cast<const uint8_t*>(w), reinterpret_cast<const uint8_t*>(x),
                           4 * kChunk, n, args.out, 0};
    f32x16 acc[T];
    unroll<T>([&](auto t) LM_LAMBDA { acc[t] = load(args.out + 16 * t); });
    At<F32, T> at = {part.panel, RowSet<T>::of(part)};
    sweep<F32>(acc, at, n, part);
    store_all(args.out, acc);
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
