// What int8 tile kernels are made of: rows of a tile, and one step over a block of k.
//
// The order of accumulation, per row and output and block after block in k, is
//   acc = fma(dw * dx, idot, acc)      idot exact in int32
//   acc = fma(m, dx * sum, acc)        where the format has a minimum
// and where 16 elements share a scale, for each 32 of them
//   t   = fma(d1, idot1, d0 * idot0)   then fma(m0, sum0, t), fma(m1, sum1, t)
//   acc = fma(dx, t, acc)              three multiplications and not four for the same terms
#pragma once

#include "layouts.h"
#include "tables.h"

namespace lmclock::LMCLOCK_PATH {

// Pointers to T activation rows at the current block. One base per four rows: the four addresses
// are base, base + s, base + 2 s and base + 3 s, which x86 forms inside the instruction; left to
// itself the compiler keeps T pointers and spills them.
template <int T>
struct RowSet {
  static constexpr int kGroup = T < 4 ? T : 4;
  static constexpr int kGroups = T / kGroup;
  const uint8_t* base[kGroups];
  int64_t s1, s3;

  LM_INLINE RowSet of(const TileArgs& a) {
    RowSet r;
    unroll<kGroups>([&](auto i) LM_LAMBDA { r.base[i] = a.x + 4 * i * a.x_stride; });
    r.s1 = a.x_stride;
    r.s3 = 3 * a.x_stride;
    return r;
  }

  // To be called once per loop turn: hides where s1 and s3 come from, so that sums with them stay
  // in the addresses.
  LM_INLINE void pin(RowSet& r) {
    if constexpr (T > 1) asm("" : "+r"(r.s1));
    if constexpr (T > 2) asm("" : "+r"(r.s3));
  }

  template <int t>
  LM_INLINE const uint8_t* row(const RowSet& r) {
    constexpr int in = t % kGroup;
    const uint8_t* b = r.base[t / kGroup];
    if constexpr (in == 1) return b + r.s1;
    if constexpr (in == 2) return b + 2 * r.s1;
    if constexpr (in == 3) return b + r.s3;
    return b;
  }

  LM_INLINE void next(RowSet& r) {
    unroll<kGroups>([&](auto i) LM_LAMBDA { r.base[i] += sizeof(Q8Block); });
  }
};

// Asks for the `Bytes` that lie `ahead` bytes after p: 3 into the first-level cache, 2 into the
// second.
template <int Bytes, int Level = 3>
LM_INLINE void prefetch(const uint8_t* p, int64_t ahead) {
  if (!ahead) return;
  unroll<(Bytes + 63) / 64>([&](auto i)
                                LM_LAMBDA { __builtin_prefetch(p + ahead + 64 * i, 0, Level); });
}
template <int Bytes>
LM_INLINE void prefetch(const uint8_t* p, const TileArgs& args) {
  prefetch<Bytes>(p, args.ahead);
  prefetch<Bytes, 2>(p, args.rows_ahead);
}

template <int T>
LM_INLINE void clear(f32x16 (&acc)[T]) {
  unroll<T>([&](auto t) LM_LAMBDA { acc[t] = splat(0.0f); });
}

template <int T>
LM_INLINE void store_all(float* out, const f32x16 (&acc)[T]) {
  unroll<T>([&](auto t) LM_LAMBDA { store(out + 16 * t, acc[t]); });
}

// Integer start of a block of 32 whose codes are stored with `Offset` added.
template <int Offset>
LM_INLINE i32x16 start32(const Q8Block& x) {
  if constexpr (Offset == 8) return splat_i(x.n8);
  if constexpr (Offset == 16) return shl<1>(splat_i(x.n8));
  if constexpr (Offset == 128) return splat_i(x.n128);
  return splat_i(0);
}

template <int Offset>
LM_INLINE i32x16 start16(const Q8Block& x, int half) {
  if constexpr (Offset == 128) return shl<2>(splat_i(x.n32[half]));
  return splat_i(x.n32[half]);
}

// What two sums of 16 elements are together, before the activations' scale. m is the minima times
// -1 / 32, since the record holds sums of codes times -32.
template <bool Min>
LM_INLINE f32x16 scaled16(i32x16 a, i32x16 b, const f32x16 (&d)[2], const f32x16 (&m)[2],
                          const Q8Block& x) {
  f32x16 t = fma(d[1], to_f32(b), d[0] * to_f32(a));
  if constexpr (Min) {
    t = fma(m[0], to_f32(splat_i(x.n32[0])), t);
    t = fma(m[1], to_f32(splat_i(x.n32[1])), t);
  }
  return t;
}

// 32 elements: 8 code vectors, R rows at once.
template <int R, int Bits, int Offset, bool Min, int T>
LM_INLINE void step32(f32x16 (&acc)[T], f32x16 d, f32x16 m, const i32x16 (&g)[8],
                      const RowSet<T>& rows) {
  constexpr int G = T < R ? T : R;
  unroll<T / G>([&](auto group) LM_LAMBDA {
    i32x16 sums[G];
    const int8_t* x[G];
    unroll<G>([&](auto i) LM_LAMBDA {
      x[i] = reinterpret_cast<const int8_t*>(RowSet<T>::template row<group * G + i>(rows));
      sums[i] = start32<Offset>(q8(RowSet<T>::template row<group * G + i>(rows)));
    });
    dot_group<Bits>(sums, g, x);
    unroll<G>([&](auto i) LM_LAMBDA {
      constexpr int t = group * G + i;
      const Q8Block& b = q8(RowSet<T>::template row<t>(rows));
      acc[t] = fma(d * splat(b.d), to_f32(sums[i]), acc[t]);
      if constexpr (Min) acc[t] = fma(m, splat(b.s), acc[t]);
    });
  });
}

// 32 elements with two scales d and minima m, of 16 elements each; the offset is 32 or 128.
template <int Bits, int Offset, bool Min, int T>
LM_INLINE void step16(f32x16 (&acc)[T], const f32x16 (&d)[2], const f32x16 (&m)[2],
                      const i32x16 (&g)[8], const RowSet<T>& rows) {
  constexpr int G = T < 2 ? 1 : 2;  // rows at once: with both halves four sums
  const i32x16 first[4] = {g[0], g[1], g[2], g[3]}, second[4] = {g[4], g[5], g[6], g[7]};
  unroll<T / G>([&](auto group) LM_LAMBDA {
    i32x16 a[G], b[G];
    const int8_t *x[G], *y[G];
    unroll<G>([&](auto i) LM_LAMBDA {
      const uint8_t* p = RowSet<T>::template row<group * G + i>(rows);
      x[i] = reinterpret_cast<const int8_t*>(p);
      y[i] = reinterpret_cast<const int8_t*>(p) + 16;
      a[i] = start16<Offset>(q8(p), 0);
      b[i] = start16<Offset>(q8(p), 1);
    });
    dot_group<Bits>(a, first, x);
    dot_group<Bits>(b, second, y);
    unroll<G>([&](auto i) LM_LAMBDA {
      constexpr int t = group * G + i;
      const Q8Block& q = q8(RowSet<T>::template row<t>(rows));
      acc[t] = fma(splat(q.d), scaled16<Min>(a[i], b[i], d, m, q), acc[t]);
    });
  });
}

}  // namespace lmclock::LMCLOCK_PATH
