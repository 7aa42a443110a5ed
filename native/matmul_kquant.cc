// int8 tiles for q4_k, q6_k and generic16.
//
// Order per row and output, sub-block after sub-block in k: acc = fma(dw * dx, idot, acc), then
// acc = fma(m, dx * sum, acc) for q4_k; generic16 has its minimum's sum per 16 elements.

#include "layouts.h"
#include "tables.h"

namespace lmclock::LMCLOCK_PATH {

namespace {

// Where the T rows of a tile stand at the current k.
struct Cursor {
  const uint8_t* x;
  const uint8_t* meta;
  const uint8_t* sums;
  int64_t stride;

  LM_INLINE Cursor at(const TileArgs& a) {
    return {a.x, a.x + meta_offset(a.width), a.x + sums_offset(a.width), a.x_stride};
  }
  LM_INLINE void next32(Cursor& c) {
    c.x += 32;
    c.meta += sizeof(Meta);
    c.sums += 8;
  }
  LM_INLINE const int8_t* codes(const Cursor& c, int t) {
    return reinterpret_cast<const int8_t*>(c.x + t * c.stride);
  }
  LM_INLINE const Meta* meta_of(const Cursor& c, int t) { return meta_at(c.meta + t * c.stride); }
  LM_INLINE int32_t sum16(const Cursor& c, int t, int half) {  // -32 * sum
    return reinterpret_cast<const int32_t*>(c.sums + t * c.stride)[half];
  }
};

template <int T>
LM_INLINE void step_q4k(f32x16 (&acc)[T], f32x16 d, f32x16 m, const i32x16 (&g)[8], Cursor& c) {
  unroll<T>([&](auto t) LM_LAMBDA {
    const Meta* meta = Cursor::meta_of(c, t);
    const f32x16 idot = to_f32(dot<4, 8>(splat_i(0), g, Cursor::codes(c, t)));
    acc[t] = fma(d * splat(meta->d), idot, acc[t]);
    acc[t] = fma(m, splat(meta->s), acc[t]);
  });
  Cursor::next32(c);
}

template <int T>
void tile_q4k(const TileArgs& args) {
  f32x16 acc[T];
  unroll<T>([&](auto t) LM_LAMBDA { acc[t] = splat(0.0f); });
  const uint8_t* w = args.panel;
  Cursor c = Cursor::at(args);
  const i32x16 low = splat_i(0x0f0f0f0f);
  for (int64_t k = 0; k < args.width; k += 256, w += Q4_K::kBytes) {
    K4Scales s;
    load_scales(w, s);
    const uint8_t* p = w + Q4_K::kCodes;
    for (int pair = 0; pair < 8; pair += 2, p += 512) {
      i32x16 g[8];
      unroll<8>([&](auto i) LM_LAMBDA { g[i] = load_i(p + 64 * i) & low; });
      step_q4k<T>(acc, s.d[pair], s.m[pair], g, c);
      unroll<8>([&](auto i) LM_LAMBDA { g[i] = shr<4>(load_i(p + 64 * i)) & low; });
      step_q4k<T>(acc, s.d[pair + 1], s.m[pair + 1], g, c);
    }
  }
  unroll<T>([&](auto t) LM_LAMBDA { store(args.out + 16 * t, acc[t]); });
}

// One row: the eight dot products of a half stay in registers while its bytes are read once, in order.
void row_q6k(const TileArgs& args) {
  f32x16 acc = splat(0.0f);
  const uint8_t* w = args.panel;
  Cursor c = Cursor::at(args);
  for (int64_t k = 0; k < args.width; k += 256, w += Q6_K::kBytes) {
    const f32x16 d = load_f16(w);
    for (int h = 0; h < 2; ++h) {
      const uint8_t* half = w + 32 + Q6_K::kHalf * h;
      i32x16 sums[8];
      unroll<8>([&](auto j) LM_LAMBDA { sums[j] = splat_i(Cursor::sum16(c, 0, j)); });
      unroll<8>([&](auto g) LM_LAMBDA {
        i32x16 codes[4];
        q6k_codes(half, g, codes);
        unroll<4>([&](auto j) LM_LAMBDA {
          const i32x16 one[1] = {codes[j]};
          sums[2 * j + g / 4] =
              dot<6, 1>(sums[2 * j + g / 4], one, Cursor::codes(c, 0) + 32 * j + 4 * g);
        });
      });
      unroll<8>([&](auto j) LM_LAMBDA {
        const Meta* meta = Cursor::meta_of(c, 0) + j / 2;
        acc = fma(q6k_scale<j>(half, d) * splat(meta->d), to_f32(sums[j]), acc);
      });
      unroll<4>([&](auto) LM_LAMBDA { Cursor::next32(c); });
    }
  }
  store(args.out, acc);
}

// 16 elements of a half's codes, decoded by group, back in k order.
LM_INLINE void decode_half(const uint8_t* half, uint8_t* out) {
  unroll<8>([&](auto g) LM_LAMBDA {
    i32x16 codes[4];
    q6k_codes(half, g, codes);
    unroll<4>([&](auto j) LM_LAMBDA { store_i(out + 64 * (8 * j + g), codes[j]); });
  });
}

template <int T>
void tile_q6k(const TileArgs& args) {
  f32x16 acc[T];
  unroll<T>([&](auto t) LM_LAMBDA { acc[t] = splat(0.0f); });
  const uint8_t* w = args.panel;
  Cursor c = Cursor::at(args);
  alignas(64) uint8_t codes[2048];
  for (int64_t k = 0; k < args.width; k += 256, w += Q6_K::kBytes) {
    const f32x16 d = load_f16(w);
    for (int h = 0; h < 2; ++h) {
      const uint8_t* half = w + 32 + Q6_K::kHalf * h;
      decode_half(half, codes);
      unroll<8>([&](auto j) LM_LAMBDA {
        const f32x16 scale = q6k_scale<j>(half, d);
        i32x16 g[4];
        unroll<4>([&](auto i) LM_LAMBDA { g[i] = load_i(codes + 64 * (4 * j + i)); });
        unroll<T>([&](auto t) LM_LAMBDA {
          const i32x16 idot = dot<6, 4>(splat_i(Cursor::sum16(c, t, j % 2)), g,
                                        Cursor::codes(c, t) + 16 * (j % 2));
          acc[t] = fma(scale * splat(Cursor::meta_of(c, t)->d), to_f32(idot), acc[t]);
        });
        if constexpr (j % 2 == 1) Cursor::next32(c);
      });
    }
  }
  unroll<T>([&](auto t) LM_LAMBDA { store(args.out + 16 * t, acc[t]); });
}

template <int T>
void tile_generic16(const TileArgs& args) {
  f32x16 acc[T];
  unroll<T>([&](auto t) LM_LAMBDA { acc[t] = splat(0.0f); });
  const uint8_t* w = args.panel;
  Cursor c = Cursor::at(args);
  for (int64_t k = 0; k < args.width; k += 32) {
    unroll<2>([&](auto h) LM_LAMBDA {
      const f32x16 d = as_f32(load_i(w)), m = as_f32(load_i(w + 64));
      i32x16 g[4];
      unroll<4>([&](auto i) LM_LAMBDA { g[i] = load_i(w + 128 + 64 * i); });
      unroll<T>([&](auto t) LM_LAMBDA {
        const float dx = Cursor::meta_of(c, t)->d;
        const int32_t sum = Cursor::sum16(c, t, h);
        const i32x16 idot = dot<8, 4>(shl<2>(splat_i(sum)), g, Cursor::codes(c, t) + 16 * h);
        acc[t] = fma(d * splat(dx), to_f32(idot), acc[t]);
        acc[t] = fma(m, splat(dx * (static_cast<float>(sum) * -0x1p-5f)), acc[t]);
      });
      w += 384;
    });
    Cursor::next32(c);
  }
  unroll<T>([&](auto t) LM_LAMBDA { store(args.out + 16 * t, acc[t]); });
}

constexpr Tiles kQ4K = {{tile_q4k<16>, tile_q4k<8>, tile_q4k<4>, tile_q4k<2>, tile_q4k<1>}};
constexpr Tiles kQ6K = {{tile_q6k<16>, tile_q6k<8>, tile_q6k<4>, tile_q6k<2>, row_q6k}};
constexpr Tiles kGeneric16 = {{tile_generic16<16>, tile_generic16<8>, tile_generic16<4>,
                               tile_generic16<2>, tile_generic16<1>}};

}  // namespace

const Tiles& kquant_tiles(Layout layout) {
  if (layout == Layout::q4_k) return kQ4K;
  return layout == Layout::q6_k ? kQ6K : kGeneric16;
}

}  // namespace lmclock::LMCLOCK_PATH
