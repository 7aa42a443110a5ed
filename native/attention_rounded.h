// Attention of act=bf16, for paths with LM_HAS_PAIRS: products of 16-bit pairs, sums in 32 bits.
//
// Lanes are queries. A pair is two neighbouring elements of a query or a key, or the weights (or
// values) of two neighbouring positions. Each step of a kernel multiplies kVectors vectors of pairs
// by kBroadcasts broadcast ones: 24 sums, 3 vectors, and one register for the broadcasts, each of
// which serves all vectors. As operands in memory they would be loaded for each product: Zen 5 does
// two loads and two products a cycle, and reached 84 % of its peak so, 92-95 % now.
//
// Queries and keys are integers with one scale a row: as fast as bf16, and the divergence from fp32
// on wikitext not measurably higher than with f32 attention, where bf16 scores raised it by 4 %
// (docs/log.md). Weights and values are bf16 or, where the processor is slow at bf16, integers too:
// weights with one scale a query, values with one an element, for each block of positions.
#pragma once

#include "attention_kernels.h"

namespace lmclock::LMCLOCK_PATH {

namespace {

// Codes of weights and of values, so that 64 products add up to less than 2^31.
constexpr int kWeightBits = 13;
constexpr float kValueCode = 4095.0f;
static_assert(kPositions * (int64_t{1} << kWeightBits) * 4095 < int64_t{1} << 31);

// 2^x for x up to kWeightBits, relative error below 1.6e-4 (a bf16 rounds by 3.9e-3); exact at
// integers, and 0 at -127 and below, where masked scores are. Cubic in the distance to the nearest integer, own minimax fit.
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
      const i32x16 y = splat_i(k[j]);
      unroll<V>([&](auto v) LM_LAMBDA { acc[j][v] = dot_i16(acc[j][v], x[v], y); });
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
      const i32x16 y = splat_i(values[e]);
      unroll<V>([&](auto v) LM_LAMBDA { acc[e][v] = dot_bf16(acc[e][v], w[v], y); });
    });
  }
  unroll<kBroadcasts>([&](auto e) LM_LAMBDA {
    unroll<V>([&](auto v) LM_LAMBDA { store(o + e * padded + 16 * v, acc[e][v]); });
  });
}

// The same of integers, by the scales of the weights and of the elements.
template <int V>
LM_INLINE void weigh_codes(const int32_t* weights, int padded, int pairs, const int32_t* values,
                           int stride, const float* factors, const float* scales,
                           const float* value_scales, float* o) {
  i32x16 acc[kBroadcasts][V];
  unroll<kBroadcasts * V>([&](auto i) LM_LAMBDA { acc[i / V][i % V] = splat_i(0); });
  for (int j = 0; j < pairs; ++j, weights += padded, values += stride) {
    i32x16 w[V];
    unroll<V>([&](auto v) LM_LAMBDA { w[v] = load_i(weights + 16 * v); });
    unroll<kBroadcasts>([&](auto e) LM_LAMBDA {
      const i32x16 y = splat_i(values[e]);
      unroll<V>([&](auto v) LM_LAMBDA { acc[e][v] = dot_i16(acc[e][v], w[v], y); });
    });
  }
  unroll<V>([&](auto v) LM_LAMBDA {
    const f32x16 factor = load(factors + 16 * v), scale = load(scales + 16 * v);
    unroll<kBroadcasts>([&](auto e) LM_LAMBDA {
      float* to = o + e * padded + 16 * v;
      const f32x16 more = to_f32(acc[e][v]) * splat(value_scales[e]);
      store(to, fma(more, scale, load(to) * factor));
    });
  });
}

// Where scales lie, of a tile's queries and of a block's weights, keys and values: what rounded
// tiles leave unused.
LM_INLINE float* query_scales(const Tile& t) { return t.factors + t.padded; }
LM_INLINE float* weight_scales(const Tile& t) { return t.block.m; }
LM_INLINE float* key_scales(const Tile& t) { return t.block.o; }
LM_INLINE float* value_scales(const Tile& t) { return t.block.o + kPositions; }

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

template <int V, bool Codes>
void weigh_block(const Tile& t, int count, int query) {
  const int32_t* weights = reinterpret_cast<const int32_t*>(t.scores) + query;
  const int32_t* v = reinterpret_cast<const int32_t*>(t.values);
  const int pairs = (count + 1) / 2;
  for (int e = 0; e < t.value_padded; e += kBroadcasts) {
    float* o = t.sum.o + e * t.padded + query;
    if constexpr (Codes)
      weigh_codes<V>(weights, t.padded, pairs, v + e, t.value_padded, t.factors + query,
                     weight_scales(t) + query, value_scales(t) + e, o);
    else
      weigh_pairs<V>(weights, t.padded, pairs, v + e, t.value_padded, t.factors + query, o);
  }
}

// Scores of V vectors of queries to pairs of weights, in place: a pair's row is not above its
// scores'. Maxima are those of score * factor, powers of two. bf16 weights are relative to the
// maximum so far, and their sum is that of the rounded ones. Codes are relative to the maximum of
// the block, which keeps their precision beside a larger one elsewhere; their sum is that of the
// weights before rounding, for codes would hide a NaN. Several vectors, since a sum is a chain.
template <int V, bool Codes>
LM_INLINE void soften_pairs(const Tile& t, int count, f32x16 factor, int query) {
  float* s = t.scores + query;
  const int64_t stride = t.padded;
  f32x16 most[V], less[V], sum[V], scale[V];
  unroll<V>([&](auto v) LM_LAMBDA { most[v] = minus_infinity(); });
  for (int j = 0; j < count; ++j)
    unroll<V>([&](auto v) LM_LAMBDA { most[v] = max(load(s + j * stride + 16 * v), most[v]); });
  unroll<V>([&](auto v) LM_LAMBDA {
    constexpr float kLn2 = 0x1.62e43p-1f;
    const int at = query + 16 * v;
    const f32x16 here = most[v] * factor, old = load(t.sum.m + at), now = max(here, old);
    const f32x16 none = minus_infinity(), zero = splat(0.0f);
    const f32x16 peak = select(now == none, zero, now);
    const f32x16 kept = weight((old - peak) * splat(kLn2));
    store(t.factors + at, kept);
    store(t.sum.m + at, now);
    sum[v] = load(t.sum.l + at) * kept;
    less[v] = zero - peak;
    if constexpr (Codes) {
      scale[v] = weight((here - peak) * splat(kLn2)) * splat(1.0f / (1 << kWeightBits));
      less[v] = splat(kWeightBits) - select(here == none, zero, here);
      sum[v] = zero;
    }
  });
  const i32x16 ones = splat_i(0x3f803f80);
  for (int j = 0; j < count; j += 2)
    unroll<V>([&](auto v) LM_LAMBDA {
      const float* at = s + j * stride + 16 * v;
      const f32x16 a = rough_exp2(fma(load(at), factor, less[v]));
      f32x16 b = splat(0.0f);
      if (j + 1 < count) b = rough_exp2(fma(load(at + stride), factor, less[v]));
      i32x16 pair;
      if constexpr (Codes) {
        pair = pair_i16(round_i(a), round_i(b));
        sum[v] = sum[v] + (a + b);
      } else {
        pair = pair_bf16(a, b);
        sum[v] = dot_bf16(sum[v], pair, ones);
      }
      store_i(s + j / 2 * stride + 16 * v, pair);
    });
  unroll<V>([&](auto v) LM_LAMBDA {
    float* l = t.sum.l + query + 16 * v;
    if constexpr (Codes) {
      const f32x16 nan = sum[v] * splat(0.0f);  // or zero: codes do not hold one
      store(weight_scales(t) + query + 16 * v, scale[v] + nan);
      sum[v] = fma(sum[v], scale[v], load(l) * load(t.factors + query + 16 * v));
    }
    store(l, sum[v]);
  });
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

// 16 queries or keys, one in each lane, whose elements lie `stride` apart; `to` may be x.
template <class E>
void pair_elements(const E* x, int64_t stride, int key, int32_t* to, float* scales) {
  i32x16 most = splat_i(0), other = splat_i(0);
  int d = 0;
  for (; d + 2 <= key; d += 2) {
    most = max_i(most, magnitude(load_element(x + stride * d)));
    other = max_i(other, magnitude(load_element(x + stride * d + stride)));
  }
  if (d < key) most = max_i(most, magnitude(load_element(x + stride * d)));
  most = max_i(most, other);
  const Scales scale = Scales::of(most, largest_code(key));
  store(scales, scale.value);
  for (d = 0; d < key; d += 2, x += 2 * stride, to += stride) {
    const f32x16 second = d + 1 < key ? load_element(x + stride) : splat(0.0f);
    const i32x16 a = round_i(load_element(x) * scale.code);
    store_i(to, pair_i16(a, round_i(second * scale.code)));
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

// All values of a block as codes, with a scale for each element.
template <class E>
void code_values(const Tile& t, const Block& b) {
  const auto row = [&](int j) LM_LAMBDA {
    return static_cast<const E*>(b.value[j / kGroup]) + j % kGroup * b.value_stride;
  };
  for (int e = 0; e < t.value_padded; e += 16) {
    i32x16 most = splat_i(0);
    for (int j = 0; j < b.count; ++j) most = max_i(most, magnitude(load_element(row(j) + e)));
    const Scales scale = Scales::of(most, kValueCode);
    store(value_scales(t) + e, scale.value);
    int32_t* to = reinterpret_cast<int32_t*>(t.values) + e;
    for (int j = 0; j < b.count; j += 2, to += t.value_padded) {
      const f32x16 second = j + 1 < b.count ? load_element(row(j + 1) + e) : splat(0.0f);
      const i32x16 a = round_i(load_element(row(j) + e) * scale.code);
      store_i(to, pair_i16(a, round_i(second * scale.code)));
    }
  }
}

template <class E>
void pair_all(const Tile& t, const Block& b, bool codes) {
  const int pairs = (t.key + 1) / 2;
  for (int g = 0; kGroup * g < b.count; ++g) {
    const int rows = b.count - kGroup * g < kGroup ? b.count - kGroup * g : kGroup;
    pair_elements(static_cast<const E*>(b.key[g]), kGroup, t.key,
                  reinterpret_cast<int32_t*>(t.keys) + g * kGroup * pairs,
                  key_scales(t) + kGroup * g);
    if (codes) continue;
    pair_values(static_cast<const E*>(b.value[g]), b.value_stride, rows, t.value_padded,
                reinterpret_cast<int32_t*>(t.values) + g * kGroup / 2 * t.value_padded);
  }
  if (codes) code_values<E>(t, b);
}

}  // namespace

}  // namespace lmclock::LMCLOCK_PATH
