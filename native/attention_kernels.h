// The two attention kernels: scores of queries against keys, their softening to weights, and the
// weighed sum of values. attention.h says why they give the same bits.
#pragma once

#include "attention.h"

namespace lmclock::LMCLOCK_PATH {

namespace {

constexpr int kBlock = static_cast<int>(kPositions);

// What stays in registers at once; it decides the speed, not the bits. Lanes are positions: queries
// (kRows) times vectors of positions or elements (kColumns). Lanes are queries: vectors of them
// (kVectors) times positions or elements (kBroadcasts). Two FMA pipes of latency 4 need 8
// accumulators; a vector takes 1, 2 or 4 of the registers.
#if defined(__AVX512F__)
constexpr int kRows = 4, kColumns = 4, kVectors = 3, kBroadcasts = 8;
#elif defined(__AVX2__) || defined(__ARM_NEON)
constexpr int kRows = 2, kColumns = 2, kVectors = 1, kBroadcasts = 4;
#else
constexpr int kRows = 1, kColumns = 1, kVectors = 1, kBroadcasts = 1;
#endif

LM_INLINE f32x16 minus_infinity() { return splat(-__builtin_inff()); }

// e^x for x <= 0 with the polynomial of mathfun.h, but zero where it would be subnormal: a masked
// score costs no microcode then, and one power of two is enough.
LM_INLINE f32x16 weight(f32x16 x) {
  const f32x16 least = splat(-87.0f), inside = max(least, x);
  const i32x16 n = round_i(inside * splat(0x1.715476p0f));
  const f32x16 nf = to_f32(n);
  f32x16 r = fma(nf, splat(-0x1.62e4p-1f), inside);
  r = fma(nf, splat(-0x1.7f7d1cp-20f), r);
  f32x16 p = splat(0x1.6d75e6p-10f);
  p = fma(p, r, splat(0x1.120be6p-7f));
  p = fma(p, r, splat(0x1.5554b8p-5f));
  p = fma(p, r, splat(0x1.5554dcp-3f));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r * r, r) + splat(1.0f);
  return select(x < least, splat(0.0f), p * exp2_int(n));
}

template <int A, int B>
LM_INLINE void clear(f32x16 (&acc)[A][B]) {
  unroll<A * B>([&](auto i) LM_LAMBDA { acc[i / B][i % B] = splat(0.0f); });
}

LM_INLINE f32x16 load_element(const float* p) { return load(p); }
LM_INLINE f32x16 load_element(const uint16_t* p) { return load_f16(p); }

// A group of keys, and rows of values, of elements E.
template <class E>
struct Keys {
  const E* data;

  LM_INLINE Keys of(const void* group, int) { return {static_cast<const E*>(group)}; }
  LM_INLINE void scale(Keys&, int) {}  // before dims [d, d + kScaleBlock) are read
  LM_INLINE f32x16 get(const Keys& k, int d) { return load_element(k.data + kGroup * d); }
};

// C vectors of a row of `width`, from element `at` on.
template <int C, class E>
LM_INLINE void load_values(const E* row, int, int64_t at, f32x16 (&out)[C]) {
  unroll<C>([&](auto c) LM_LAMBDA { out[c] = load_element(row + at + 16 * c); });
}

// q8_0: codes, then scales in f16; multiplied as read_keys and read_values do.
struct Q8 {
  int8_t code;
};

template <>
struct Keys<Q8> {
  const int8_t* data;
  const uint16_t* scales;
  f32x16 d;

  LM_INLINE Keys of(const void* group, int key) {
    const int8_t* codes = static_cast<const int8_t*>(group);
    return {codes, reinterpret_cast<const uint16_t*>(codes + key * kGroup), splat(0.0f)};
  }
  LM_INLINE void scale(Keys& k, int d) { k.d = load_f16(k.scales + d / kScaleBlock * kGroup); }
  LM_INLINE f32x16 get(const Keys& k, int d) { return k.d * to_f32(load_i8(k.data + kGroup * d)); }
};

template <int C>
LM_INLINE void load_values(const Q8* row, int width, int64_t at, f32x16 (&out)[C]) {
  static_assert(C == 1 || C % 2 == 0, "two vectors share a scale");
  f32x16 d = splat(0.0f);
  unroll<C>([&](auto c) LM_LAMBDA {
    if constexpr (c % 2 == 0) {  // `at` is a multiple of 16 C: vectors 2 n and 2 n + 1 share one
      uint16_t bits, lanes[16];
      std::memcpy(&bits, row + width + (at + 16 * c) / kScaleBlock * 2, 2);
      for (uint16_t& lane : lanes) lane = bits;
      d = load_f16(lanes);
    }
    out[c] = d * to_f32(load_i8(row + at + 16 * c));
  });
}

// --- lanes are positions

// Memory asked for while something else is computed: the values of a block during its scores, the
// next keys while the values are weighed. Keys and values of 64 positions are 8 KB each, too short
// for the processor's own prefetching to get going. Into the second-level cache: asked into the
// first, as many lines wait for memory as for no prefetch at all (Zen 4, 1k to 4k positions: 54
// against 30 us a layer).
struct Steps {
  const char* data;
  int lines;  // per step

  // `bytes` in so many steps.
  LM_INLINE Steps of(const void* data, int64_t bytes, int64_t steps) {
    if (!data || steps == 0) return {nullptr, 0};
    const int64_t lines = (bytes + 64 * steps - 1) / (64 * steps);
    return {static_cast<const char*>(data), static_cast<int>(lines)};
  }
  LM_INLINE void step(Steps& a) {
    for (int n = 0; n < a.lines; ++n, a.data += 64) __builtin_prefetch(a.data, 0, 2);
  }
};

// R queries against C groups of keys: out[r][g] += q[r][d] * key[g][d], all d.
template <int R, int C, class E>
LM_INLINE void score_groups(const float* const* q, int key, const void* const* groups, Steps ahead,
                            float* out) {
  f32x16 acc[R][C];
  clear(acc);
  Keys<E> k[C];
  unroll<C>([&](auto c) LM_LAMBDA { k[c] = Keys<E>::of(groups[c], key); });
  for (int d = 0; d < key;) {
    unroll<C>([&](auto c) LM_LAMBDA { Keys<E>::scale(k[c], d); });
    for (const int end = key - d < kScaleBlock ? key : d + kScaleBlock; d < end; ++d) {
      Steps::step(ahead);
      f32x16 kv[C];
      unroll<C>([&](auto c) LM_LAMBDA { kv[c] = Keys<E>::get(k[c], d); });
      unroll<R>([&](auto r) LM_LAMBDA {
        const f32x16 x = splat(q[r][d]);
        unroll<C>([&](auto c) LM_LAMBDA { acc[r][c] = fma(x, kv[c], acc[r][c]); });
      });
    }
  }
  unroll<R>([&](auto r) LM_LAMBDA {
    unroll<C>([&](auto c) LM_LAMBDA { store(out + kBlock * r + kGroup * c, acc[r][c]); });
  });
}

// As many groups at once as there are, up to C: one after the other would wait for its sums.
template <int R, class E, int C = kColumns>
void score_rows(const float* const* q, int key, const Block& b, Steps ahead, float* out,
                int g = 0) {
  const int groups = (b.count + kGroup - 1) / kGroup;
  for (; g + C <= groups; g += C, ahead = {})
    score_groups<R, C, E>(q, key, b.key + g, ahead, out + kGroup * g);
  if constexpr (C > 1) score_rows<R, E, C - 1>(q, key, b, ahead, out, g);
}

// R queries' weights times C vectors of the values: out[r][c] = sum over positions of
// p[r][position] * value.
template <int R, int C, class E>
LM_INLINE void weigh_vectors(const float* p, const Block& b, int64_t at, Steps ahead, float* out,
                             int64_t stride) {
  f32x16 acc[R][C];
  clear(acc);
  const int64_t step = b.value_stride;
  for (int left = b.count, g = 0; left > 0; left -= kGroup, ++g, p += kGroup) {
    const E* v = static_cast<const E*>(b.value[g]);
    const int rows = left < kGroup ? left : kGroup;
    for (int j = 0; j < rows; ++j, v += step) {
      Steps::step(ahead);
      f32x16 vv[C];
      load_values(v, static_cast<int>(stride), at, vv);
      unroll<R>([&](auto r) LM_LAMBDA {
        const f32x16 x = splat(p[kBlock * r + j]);
        unroll<C>([&](auto c) LM_LAMBDA { acc[r][c] = fma(x, vv[c], acc[r][c]); });
      });
    }
  }
  unroll<R>([&](auto r) LM_LAMBDA {
    unroll<C>([&](auto c) LM_LAMBDA { store(out + stride * r + 16 * c, acc[r][c]); });
  });
}

template <int R, class E>
void weigh_rows(const float* p, const Block& b, int value_padded, Steps ahead, float* out) {
  int at = 0;
  for (; at + 16 * kColumns <= value_padded; at += 16 * kColumns, ahead = {})
    weigh_vectors<R, kColumns, E>(p, b, at, ahead, out + at, value_padded);
  for (; at < value_padded; at += 16, ahead = {})
    weigh_vectors<R, 1, E>(p, b, at, ahead, out + at, value_padded);
}

// f(Index<R>, first query) over all queries, R = kRows while they last.
template <int R = kRows, class F>
LM_INLINE void for_rows(int queries, F&& f, int q = 0) {
  for (; q + R <= queries; q += R) f(Index<R>{}, q);
  if constexpr (R > 1) for_rows<R - 1>(queries, f, q);
}

// Scores of one query to weights; its maximum and sum go to m and l.
LM_INLINE void soften_row(float* s, const Block& b, float scale, float low, float high, float* m,
                          float* l) {
  f32x16 x[kGroups];
  unroll<kGroups>([&](auto g) LM_LAMBDA {
    x[g] = kGroup * g < b.count ? load(s + kGroup * g) * splat(scale) : minus_infinity();
  });
  const float first = static_cast<float>(b.first);
  if (low > first || high < first + kBlock) {
    float lanes[kGroup];
    for (int i = 0; i < kGroup; ++i) lanes[i] = first + static_cast<float>(i);
    unroll<kGroups>([&](auto g) LM_LAMBDA {
      const f32x16 at = load(lanes) + splat(static_cast<float>(kGroup * g));
      x[g] = select(at < splat(high), x[g], minus_infinity());
      x[g] = select(at < splat(low), minus_infinity(), x[g]);
    });
  }
  const float most = reduce_max(max(max(x[0], x[1]), max(x[2], x[3])));
  const f32x16 peak = splat(most == -__builtin_inff() ? 0.0f : most);
  unroll<kGroups>([&](auto g) LM_LAMBDA {
    x[g] = weight(x[g] - peak);
    store(s + kGroup * g, x[g]);
  });
  *m = most;
  *l = reduce_add((x[0] + x[1]) + (x[2] + x[3]));
}

// --- lanes are queries

// scores[position][query] of V vectors of queries and kBroadcasts positions of a group.
template <int V>
LM_INLINE void score_queries(const float* turned, int padded, int key, const float* k, float* out) {
  f32x16 acc[kBroadcasts][V];
  clear(acc);
  for (int d = 0; d < key; ++d) {
    f32x16 q[V];
    unroll<V>([&](auto v) LM_LAMBDA { q[v] = load(turned + d * padded + 16 * v); });
    unroll<kBroadcasts>([&](auto j) LM_LAMBDA {
      const f32x16 x = splat(k[kGroup * d + j]);
      unroll<V>([&](auto v) LM_LAMBDA { acc[j][v] = fma(q[v], x, acc[j][v]); });
    });
  }
  unroll<kBroadcasts>([&](auto j) LM_LAMBDA {
    unroll<V>([&](auto v) LM_LAMBDA { store(out + j * padded + 16 * v, acc[j][v]); });
  });
}

// o[element][query] of V vectors of queries and N elements of the values.
template <int V, int N>
LM_INLINE void weigh_queries(const float* p, int padded, const Block& b, int64_t at, float* out) {
  f32x16 acc[N][V];
  clear(acc);
  const int64_t step = b.value_stride;
  for (int left = b.count, g = 0; left > 0; left -= kGroup, ++g) {
    const float* row = static_cast<const float*>(b.value[g]) + at;
    const int rows = left < kGroup ? left : kGroup;
    for (int j = 0; j < rows; ++j, row += step, p += padded) {
      f32x16 w[V];
      unroll<V>([&](auto v) LM_LAMBDA { w[v] = load(p + 16 * v); });
      unroll<N>([&](auto e) LM_LAMBDA {
        const f32x16 x = splat(row[e]);
        unroll<V>([&](auto v) LM_LAMBDA { acc[e][v] = fma(w[v], x, acc[e][v]); });
      });
    }
  }
  unroll<N>([&](auto e) LM_LAMBDA {
    unroll<V>([&](auto v) LM_LAMBDA { store(out + e * padded + 16 * v, acc[e][v]); });
  });
}

template <int V>
void score_all(const Tile& t, const Block& b, int query) {
  for (int j = 0; j < b.count; j += kBroadcasts)
    score_queries<V>(t.turned + query, t.padded, t.key,
                     static_cast<const float*>(b.key[j / kGroup]) + j % kGroup,
                     t.scores + j * t.padded + query);
}

template <int V>
void weigh_all(const Tile& t, const Block& b, int query, float* o) {
  int e = 0;
  for (; e + kBroadcasts <= t.value; e += kBroadcasts)
    weigh_queries<V, kBroadcasts>(t.scores + query, t.padded, b, e, o + e * t.padded + query);
  for (; e < t.value; ++e)
    weigh_queries<V, 1>(t.scores + query, t.padded, b, e, o + e * t.padded + query);
}

// f(Index<V>, first query) over the padded queries, V = kVectors while they last.
template <int V = kVectors, class F>
LM_INLINE void for_vectors(int padded, F&& f, int q = 0) {
  for (; q + 16 * V <= padded; q += 16 * V) f(Index<V>{}, q);
  if constexpr (V > 1) for_vectors<V - 1>(padded, f, q);
}

// Scores of 16 queries, one under the other, to weights; those a query does not see are -infinity.
// The sum is taken in the order of reduce_add.
void soften_queries(const Tile& t, int count, f32x16 factor, int query, const Partial& out) {
  float* s = t.scores + query;
  const int64_t stride = t.padded;
  f32x16 most = minus_infinity(), other = minus_infinity();
  int j = 0;
  for (; j + 2 <= count; j += 2) {
    most = max(load(s + j * stride) * factor, most);
    other = max(load(s + (j + 1) * stride) * factor, other);
  }
  if (j < count) most = max(load(s + j * stride) * factor, most);
  most = max(most, other);
  const f32x16 peak = select(most == minus_infinity(), splat(0.0f), most);
  f32x16 sum[kGroup];
  for (int i = 0; i < kGroup; ++i) {
    f32x16 p[kGroups];
    unroll<kGroups>([&](auto g) LM_LAMBDA {
      float* at = s + (kGroup * g + i) * stride;
      p[g] = kGroup * g + i < count ? weight(load(at) * factor - peak) : splat(0.0f);
      store(at, p[g]);
    });
    sum[i] = (p[0] + p[1]) + (p[2] + p[3]);
  }
  for (int half = kGroup / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) sum[i] = sum[i] + sum[i + half];
  store(out.m + query, most);
  store(out.l + query, sum[0]);
}

// Scores of keys that a query does not see become -infinity, where there are any.
void mask_queries(const Tile& t, const Block& b, int query) {
  const f32x16 low = load(t.low + query), high = load(t.high + query);
  const f32x16 first = splat(static_cast<float>(b.first));
  const f32x16 seen = select(first < low, splat(1.0f), splat(0.0f)) +
                      select(high < first + splat(kBlock), splat(1.0f), splat(0.0f));
  if (reduce_max(seen) == 0.0f) return;
  float* s = t.scores + query;
  for (int j = 0; j < b.count; ++j, s += t.padded) {
    const f32x16 at = splat(static_cast<float>(b.first + j));
    const f32x16 x = select(at < high, load(s), minus_infinity());
    store(s, select(at < low, minus_infinity(), x));
  }
}

}  // namespace

}  // namespace lmclock::LMCLOCK_PATH
