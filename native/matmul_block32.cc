// int8 tiles for layouts of 32-element blocks: q4_0, q4_1, q5_0, q8_0, generic32.
//
// Per row and output, block after block: acc = fma(dw * dx, idot, acc), then acc = fma(m, dx * sum, acc) where the
// format has a minimum. The integer dot product is exact, so this order alone decides the bits.

#include "layouts.h"
#include "tables.h"

namespace lmclock::LMCLOCK_PATH {

namespace {

template <int Offset>
LM_INLINE i32x16 start(const Meta* meta) {
  if constexpr (Offset == 0) return splat_i(0);
  if constexpr (Offset == 8) return splat_i(meta->n8);
  if constexpr (Offset == 16) return shl<1>(splat_i(meta->n8));
  if constexpr (Offset == 128) return splat_i(meta->n128);
}

template <class L, int T>
void tile(const TileArgs& args) {
  f32x16 acc[T];
  unroll<T>([&](auto t) LM_LAMBDA { acc[t] = splat(0.0f); });
  const uint8_t* w = args.panel;
  const uint8_t* x = args.x;
  const uint8_t* meta = args.x + meta_offset(args.width);
  const int64_t stride = args.x_stride;
  for (int64_t k = 0; k < args.width; k += 32) {
    Block b;
    L::load_block(w, b);
    unroll<T>([&](auto t) LM_LAMBDA {
      const Meta* m = meta_at(meta + t * stride);
      const int8_t* q = reinterpret_cast<const int8_t*>(x + t * stride);
      const f32x16 idot = to_f32(dot<L::kBits, 8>(start<L::kOffset>(m), b.g, q));
      acc[t] = fma(b.d * splat(m->d), idot, acc[t]);
      if constexpr (L::kMin) acc[t] = fma(b.m, splat(m->s), acc[t]);
    });
    w += L::kBytes;
    x += 32;
    meta += sizeof(Meta);
  }
  unroll<T>([&](auto t) LM_LAMBDA { store(args.out + 16 * t, acc[t]); });
}

template <class L>
constexpr Tiles kTiles = {{tile<L, 16>, tile<L, 8>, tile<L, 4>, tile<L, 2>, tile<L, 1>}};

}  // namespace

const Tiles& block32_tiles(Layout layout) {
  switch (layout) {
    case Layout::q4_0: return kTiles<Q4_0>;
    case Layout::q4_1: return kTiles<Q4_1>;
    case Layout::q5_0: return kTiles<Q5_0>;
    case Layout::q8_0: return kTiles<Q8_0>;
    default: return kTiles<Generic32>;
  }
}

}  // namespace lmclock::LMCLOCK_PATH
