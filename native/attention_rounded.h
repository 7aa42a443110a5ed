// Attention of act=bf16, for paths with LM_HAS_PAIRS: products of 16-bit pairs, sums in 32 bits.
//
// Lanes are queries. A pair is two neighbouring elements of a query or a key, or the weights (or
// values) of two neighbouring positions. Each step of a kernel multiplies kVectors vectors of pairs
// by kBroadcasts broadcast ones: 24 sums, 3 vectors, and the broadcasts are operands in memory.
//
// Weights and values are bf16. Queries and keys are integers with one scale a row: as fast, and the
// divergence from fp32 on wikitext not measurably higher than with f32 attention, where bf16
// scores raised it by 4 % (docs/log.md).
#pragma once

#include "attention_kernels.h"

namespace lmclock::LMCLOCK_PATH {

namespace {

// 2^x for x <= 0, relative error below 1.6e-4 (a bf16 rounds by 3.9e-3); 1 at 0, and 0 at -127 and
// below, where masked scores are. Cubic in the distance to the nearest integer, own minimax fit.
LM_INLINE f32x16 rough_exp2(f32x16 x) {
  x = max(splat(-127.0f), x);  // the second operand passes NaN on
  const i32x16 n = round_i(x);
  const f32x16 r = x - to_f32(n);
  f32x16 p = fma(splat(0x1.c2a218p-5f), r, splat(0x1.f00c4ep-3f));
  p = fma(p, r, splat(0x1.62f5fap-1f));
  p = fma(p, r, splat(1.0f));
  return as_f32(as_i32(p) + shl<23>(n));
}

// The largest code of a row of `key` elements: it fits 16 bits, and sums of products 31.
LM_INLINE float largest_code(int key) {
  const float code = __builtin_floorf(__builtin_sqrtf(0x1.fffffcp30f / static_cast<float>(key)));
  return code < 32767.0f ? code : 32767.0f;
}

// scores[position][query] of V vectors of queries and kBroadcasts positions of a group.
template <int V>
LM_INLINE void score_pairs(const int32_t* q, const float* q_scales, int padded, int pairs,
                           const int32_t* k, const float* k_scales, float* out) {
  i32x16 acc[kBroadcasts][V];
  unroll<kBroadcasts * V>([&](auto i) LM_LAMBDA { acc[i / V][i % V] = splat_i(0); });
  for (int d = 0; d < pairs; ++d, q += padded, k += kGroup) {
    i32x16 x[V];
    unroll<V>([&](auto v) LM_LAMBDA { x[v] = load_i(q + 16 * v); });
    unroll<kBroadcasts>([&](auto j) LM_LAMBDA {
      unroll<V>([&](auto v) LM_LAMBDA { acc[j][v] = dot_i16(acc[j][v], x[v], k + j); });
    });
  }
  unroll<V>([&](auto v) LM_LAMBDA {
    const f32x16 scale = load(q_scales + 16 * v);
    unroll<kBroadcasts>([&](auto j) LM_LAMBDA {
      store(out + j * padded + 16 * v, to_f32(acc[j][v]) * (scale * splat(k_scales[j])));
    });
  });
}

// o[element][query] = factor[query] * o + weights . values, of V vectors of queries and kBroadcasts
// elements.
template <int V>
LM_INLINE void weigh_pairs(const int32_t* weights, int padded, int pairs, const int32_t* values,
                           int stride, const float* factors, float* o) {
  f32x16 acc[kBroadcasts][V];
  unroll<V>([&](auto v) LM_LAMBDA {
    const f32x16 factor = load(factors + 16 * v);
    unroll<kBroadcasts>([&](auto e)
                            LM_LAMBDA { acc[e][v] = load(o + e * padded + 16 * v) * factor; });
  });
  for (int j = 0; j < pairs; ++j, weights += padded, values += stride) {
    i32x16 w[V];
    unroll<V>([&](auto v) LM_LAMBDA { w[v] = load_i(weights + 16 * v); });
    unroll<kBroadcasts>([&](auto e) LM_LAMBDA {
      unroll<V>([&](auto v) LM_LAMBDA { acc[e][v] = dot_bf16(acc[e][v], w[v], values + e); });
    });
  }
  unroll<kBroadcasts>([&](auto e) LM_LAMBDA {
    unroll<V>([&](auto v) LM_LAMBDA { store(o + e * padded + 16 * v, acc[e][v]); });
  });
}

// Where the scales of a tile's queries and of a block's keys lie: what rounded tiles leave unused.
LM_INLINE float* query_scales(const Tile& t) { return t.factors + t.padded; }
LM_INLINE float* key_scales(const Tile& t) { return t.block.o; }

template <int V>
void score_block(const Tile& t, int count, int query) {
  const int pairs = (t.key + 1) / 2;
  const int32_t* q = reinterpret_cast<const int32_t*>(t.turned) + query;
  const int32_t* k = reinterpret_cast<const int32_t*>(t.keys);
  for (int j = 0; j < count; j += kBroadcasts)
    score_pairs<V>(q, query_scales(t) + query, t.padded, pairs,
                   k + j / kGroup * kGroup * pairs + j % kGroup, key_scales(t) + j,
                   t.scores + j * t.padded + query);
}

template <int V>
void weigh_block(const Tile& t, int count, int query) {
  const int32_t* weights = reinterpret_cast<const int32_t*>(t.scores) + query;
  const int32_t* v = reinterpret_cast<const int32_t*>(t.values);
  for (int e = 0; e < t.value_padded; e += kBroadcasts)
    weigh_pairs<V>(weights, t.padded, (count + 1) / 2, v + e, t.value_padded, t.factors + query,
                   t.sum.o + e * t.padded + query);
}

// Scores of 16 queries to pairs of weights, in place: a pair's row is not above its scores'. Maxima
// are those of score * factor, powers of two; the sum is that of the rounded weights.
LM_INLINE void soften_pairs(const Tile& t, int count, f32x16 factor, int query) {
  float* s = t.scores + query;
  const int64_t stride = t.padded;
  f32x16 most = minus_infinity(), other = minus_infinity();
  int j = 0;
  for (; j + 2 <= count; j += 2) {
    most = max(load(s + j * stride), most);
    other = max(load(s + (j + 1) * stride), other);
  }
  if (j < count) most = max(load(s + j * stride), most);
  const f32x16 old = load(t.sum.m + query), now = max(max(most, other) * factor, old);
  const f32x16 peak = select(now == minus_infinity(), splat(0.0f), now);
  const f32x16 kept = weight((old - peak) * splat(0x1.62e43p-1f)), less = splat(0.0f) - peak;
  store(t.factors + query, kept);
  store(t.sum.m + query, now);
  static const uint32_t kOnes = 0x3f803f80;
  f32x16 sum = load(t.sum.l + query) * kept;
  for (j = 0; j < count; j += 2) {
    const f32x16 a = rough_exp2(fma(load(s + j * stride), factor, less));
    f32x16 b = splat(0.0f);
    if (j + 1 < count) b = rough_exp2(fma(load(s + (j + 1) * stride), factor, less));
    const i32x16 pair = pair_bf16(a, b);
    store_i(s + j / 2 * stride, pair);
    sum = dot_bf16(sum, pair, &kOnes);
  }
  store(t.sum.l + query, sum);
}

// From the largest magnitude of a row: what turns elements into codes, and back. A NaN or an
// infinity makes all scores of its row NaN.
struct Scales {
  f32x16 code, value;

  LM_INLINE Scales of(i32x16 magnitude, float most) {
    const f32x16 a = as_f32(magnitude), usable = splat(0x1p-100f);
    const f32x16 finite = select(a < splat(__builtin_inff()), a, splat(__builtin_nanf("")));
    return {select(finite < usable, splat(0.0f), splat(most) / finite), finite / splat(most)};
  }
};

LM_INLINE i32x16 magnitude(f32x16 x) { return as_i32(x) & splat_i(0x7fffffff); }

// 16 keys, one in each lane.
template <class E>
void pair_keys(const E* k, int key, int32_t* to, float* scales) {
  i32x16 most = splat_i(0);
  for (int d = 0; d < key; ++d) most = max_i(most, magnitude(load_element(k + 16 * d)));
  const Scales scale = Scales::of(most, largest_code(key));
  store(scales, scale.value);
  for (int d = 0; d < key; d += 2) {
    const f32x16 second = d + 1 < key ? load_element(k + 16 * (d + 1)) : splat(0.0f);
    const i32x16 a = round_i(load_element(k + 16 * d) * scale.code);
    store_i(to + 8 * d, pair_i16(a, round_i(second * scale.code)));
  }
}

// Up to 16 values, two rows to one.
template <class E>
void pair_values(const E* v, int64_t stride, int rows, int width, int32_t* to) {
  for (int j = 0; j < rows; j += 2, v += 2 * stride)
    for (int e = 0; e < width; e += 16, to += 16) {
      const f32x16 second = j + 1 < rows ? load_element(v + stride + e) : splat(0.0f);
      store_i(to, pair_bf16(load_element(v + e), second));
    }
}

template <class E>
void pair_all(const Tile& t, const Block& b) {
  const int pairs = (t.key + 1) / 2;
  for (int g = 0; kGroup * g < b.count; ++g) {
    const int rows = b.count - kGroup * g < kGroup ? b.count - kGroup * g : kGroup;
    pair_keys(static_cast<const E*>(b.key[g]), t.key,
              reinterpret_cast<int32_t*>(t.keys) + g * kGroup * pairs, key_scales(t) + kGroup * g);
    pair_values(static_cast<const E*>(b.value[g]), b.value_stride, rows, t.value_padded,
                reinterpret_cast<int32_t*>(t.values) + g * kGroup / 2 * t.value_padded);
  }
}

// Queries of a tile as pairs of elements: (key / 2, padded).
void pair_queries(const Tile& t) {
  int32_t* to = reinterpret_cast<int32_t*>(t.turned);
  for (int q = 0; q < t.padded; ++q) {
    i32x16 most = splat_i(0);
    for (int d = 0; d < t.key && q < t.queries; d += 16)
      most = max_i(most, magnitude(load_part(t.q[q] + d, t.key - d)));
    const Scales scale = Scales::of(splat_i(reduce_max(most)), largest_code(t.key));
    store_n(query_scales(t) + q, scale.value, 1);
    for (int d = 0; d < t.key; d += 16) {
      int32_t codes[17] = {};
      if (q < t.queries) store_i(codes, round_i(load_part(t.q[q] + d, t.key - d) * scale.code));
      for (int j = 0; j < 16 && d + j < t.key; j += 2) {
        const uint32_t low = static_cast<uint32_t>(codes[j]) & 0xffff;
        to[(d + j) / 2 * t.padded + q] =
            static_cast<int32_t>(low | static_cast<uint32_t>(codes[j + 1]) << 16);
      }
    }
  }
}

}  // namespace

}  // namespace lmclock::LMCLOCK_PATH
