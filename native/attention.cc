// The two attention kernels and the merging of blocks; see attention.h.

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

template <int A, int B>
LM_INLINE void clear(f32x16 (&acc)[A][B]) {
  unroll<A * B>([&](auto i) LM_LAMBDA { acc[i / B][i % B] = splat(0.0f); });
}

LM_INLINE f32x16 load_element(const float* p) { return load(p); }
LM_INLINE f32x16 load_element(const uint16_t* p) { return load_f16(p); }

// --- lanes are positions

// R queries against C groups of keys: out[r][g] += q[r][d] * key[g][d], all d.
template <int R, int C, class E>
LM_INLINE void score_groups(const float* const* q, int key, const void* const* groups, float* out) {
  f32x16 acc[R][C];
  clear(acc);
  const E* k[C];
  unroll<C>([&](auto c) LM_LAMBDA { k[c] = static_cast<const E*>(groups[c]); });
  for (int d = 0; d < key; ++d) {
    f32x16 kv[C];
    unroll<C>([&](auto c) LM_LAMBDA { kv[c] = load_element(k[c] + kGroup * d); });
    unroll<R>([&](auto r) LM_LAMBDA {
      const f32x16 x = splat(q[r][d]);
      unroll<C>([&](auto c) LM_LAMBDA { acc[r][c] = fma(x, kv[c], acc[r][c]); });
    });
  }
  unroll<R>([&](auto r) LM_LAMBDA {
    unroll<C>([&](auto c) LM_LAMBDA { store(out + kBlock * r + kGroup * c, acc[r][c]); });
  });
}

template <int R, class E>
void score_rows(const float* const* q, int key, const Block& b, float* out) {
  const int groups = (b.count + kGroup - 1) / kGroup;
  int g = 0;
  for (; g + kColumns <= groups; g += kColumns)
    score_groups<R, kColumns, E>(q, key, b.key + g, out + kGroup * g);
  for (; g < groups; ++g) score_groups<R, 1, E>(q, key, b.key + g, out + kGroup * g);
}

// R queries' weights times C vectors of the values: out[r][c] = sum over positions of
// p[r][position] * value.
template <int R, int C, class E>
LM_INLINE void weigh_vectors(const float* p, const Block& b, int64_t at, float* out,
                             int64_t stride) {
  f32x16 acc[R][C];
  clear(acc);
  for (int j = 0; j < b.count; ++j) {
    const E* v = static_cast<const E*>(b.value[j / kGroup]) + j % kGroup * b.value_stride + at;
    f32x16 vv[C];
    unroll<C>([&](auto c) LM_LAMBDA { vv[c] = load_element(v + 16 * c); });
    unroll<R>([&](auto r) LM_LAMBDA {
      const f32x16 x = splat(p[kBlock * r + j]);
      unroll<C>([&](auto c) LM_LAMBDA { acc[r][c] = fma(x, vv[c], acc[r][c]); });
    });
  }
  unroll<R>([&](auto r) LM_LAMBDA {
    unroll<C>([&](auto c) LM_LAMBDA { store(out + stride * r + 16 * c, acc[r][c]); });
  });
}

template <int R, class E>
void weigh_rows(const float* p, const Block& b, int value_padded, float* out) {
  int at = 0;
  for (; at + 16 * kColumns <= value_padded; at += 16 * kColumns)
    weigh_vectors<R, kColumns, E>(p, b, at, out + at, value_padded);
  for (; at < value_padded; at += 16) weigh_vectors<R, 1, E>(p, b, at, out + at, value_padded);
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
  float lanes[kGroup];
  for (int i = 0; i < kGroup; ++i) lanes[i] = static_cast<float>(i);
  const f32x16 lane = load(lanes);
  unroll<kGroups>([&](auto g) LM_LAMBDA {
    const float first = static_cast<float>(b.first + kGroup * g);
    const f32x16 at = lane + splat(first);
    x[g] = kGroup * g < b.count ? load(s + kGroup * g) * splat(scale) : minus_infinity();
    x[g] = select(at < splat(high), x[g], minus_infinity());
    x[g] = select(at < splat(low), minus_infinity(), x[g]);
  });
  const float most = reduce_max(max(max(x[0], x[1]), max(x[2], x[3])));
  const f32x16 peak = splat(most == -__builtin_inff() ? 0.0f : most);
  unroll<kGroups>([&](auto g) LM_LAMBDA {
    x[g] = exp(x[g] - peak);
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
  for (int j = 0; j < b.count; ++j) {
    const float* row = static_cast<const float*>(b.value[j / kGroup]);
    row += j % kGroup * b.value_stride + at;
    f32x16 w[V];
    unroll<V>([&](auto v) LM_LAMBDA { w[v] = load(p + j * padded + 16 * v); });
    unroll<N>([&](auto e) LM_LAMBDA {
      const f32x16 x = splat(row[e]);
      unroll<V>([&](auto v) LM_LAMBDA { acc[e][v] = fma(w[v], x, acc[e][v]); });
    });
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

// Scores of 16 queries, one under the other, to weights. The sum is taken in the order of
// reduce_add.
void soften_queries(const Tile& t, const Block& b, float scale, int query, float* m, float* l) {
  float* s = t.scores + query;
  const f32x16 low = load(t.low + query), high = load(t.high + query);
  f32x16 most = minus_infinity();
  for (int j = 0; j < b.count; ++j) {
    const f32x16 at = splat(static_cast<float>(b.first + j));
    f32x16 x = load(s + j * t.padded) * splat(scale);
    x = select(at < high, x, minus_infinity());
    x = select(at < low, minus_infinity(), x);
    store(s + j * t.padded, x);
    most = max(x, most);
  }
  const f32x16 peak = select(most == minus_infinity(), splat(0.0f), most);
  f32x16 sum[kGroup];
  for (int i = 0; i < kGroup; ++i) {
    f32x16 p[kGroups];
    unroll<kGroups>([&](auto g) LM_LAMBDA {
      float* at = s + (kGroup * g + i) * t.padded;
      p[g] = kGroup * g + i < b.count ? exp(load(at) - peak) : splat(0.0f);
      store(at, p[g]);
    });
    sum[i] = (p[0] + p[1]) + (p[2] + p[3]);
  }
  for (int half = kGroup / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) sum[i] = sum[i] + sum[i + half];
  store(m + query, most);
  store(l + query, sum[0]);
}

// --- both

// Where scores need more than a factor: scale, softcap and bias beforehand.
void prepare_scores(const Tile& t, const Block& b) {
  const int64_t floats = t.many ? int64_t{b.count} * t.padded : int64_t{t.queries} * kBlock;
  for (int64_t i = 0; i < floats; i += 16) {
    f32x16 x = load(t.scores + i) * splat(t.scale);
    if (t.softcap != 0.0f) x = splat(t.softcap) * tanh(x / splat(t.softcap));
    store(t.scores + i, x);
  }
  if (!t.bias.table) return;
  const int span = t.bias.span;
  for (int q = 0; q < t.queries; ++q) {
    const float* table = t.bias.table + int64_t{t.head[q]} * (2 * span + 1) + span;
    for (int j = 0; j < b.count; ++j) {
      const int64_t key = t.key_positions ? t.key_positions[b.first + j] : b.first + j;
      const int64_t far = larger(-span, smaller(span, key - t.at[q]));
      t.scores[t.many ? j * t.padded + q : q * kBlock + j] += table[far];
    }
  }
}

template <class E>
void attend_positions(const Tile& t, const Block& b, float scale, bool prepared, Partial out) {
  for_rows(t.queries, [&](auto r, int q) LM_LAMBDA {
    score_rows<r.value, E>(t.q + q, t.key, b, t.scores + q * kBlock);
  });
  if (!prepared) prepare_scores(t, b);
  for (int q = 0; q < t.queries; ++q)
    soften_row(t.scores + q * kBlock, b, scale, t.low[q], t.high[q], out.m + q, out.l + q);
  for_rows(t.queries, [&](auto r, int q) LM_LAMBDA {
    weigh_rows<r.value, E>(t.scores + q * kBlock, b, t.value_padded, out.o + q * t.value_padded);
  });
}

// f16 keys and values to f32, since each is read as often as there are queries.
Block widen(const Tile& t, const Block& b) {
  Block wide = b;
  wide.half = false;
  wide.value_stride = t.value_padded;
  for (int g = 0; kGroup * g < b.count; ++g) {
    float* k = t.keys + int64_t{g} * kGroup * t.key;
    float* v = t.values + int64_t{g} * kGroup * t.value_padded;
    wide.key[g] = k;
    wide.value[g] = v;
    for (int d = 0; d < t.key; ++d)
      store(k + kGroup * d, load_f16(static_cast<const uint16_t*>(b.key[g]) + kGroup * d));
    const int rows = b.count - kGroup * g < kGroup ? b.count - kGroup * g : kGroup;
    for (int j = 0; j < rows; ++j)
      for (int e = 0; e < t.value_padded; e += 16)
        store(v + j * t.value_padded + e,
              load_f16(static_cast<const uint16_t*>(b.value[g]) + j * b.value_stride + e));
  }
  return wide;
}

}  // namespace

int64_t partial_floats(const Tile& t) {
  return 2 * t.padded + int64_t{t.padded} * t.value_padded;
}

Partial partial_at(const Tile& t, float* memory) {
  return {memory, memory + t.padded, memory + 2 * t.padded};
}

void place_tile(Tile& t, float* memory) {
  const auto take = [&](int64_t floats) {
    float* got = memory;
    memory += floats;
    return got;
  };
  t.turned = take(int64_t{t.padded} * t.key);
  t.scores = take(t.padded * kPositions);
  t.keys = take(kPositions * t.key);
  t.values = take(kPositions * t.value_padded);
  t.factors = take(2 * t.padded);
  t.sum = partial_at(t, take(partial_floats(t)));
  t.block = partial_at(t, take(partial_floats(t)));
  t.low = take(t.padded);
  t.high = take(t.padded);
  t.head = reinterpret_cast<int32_t*>(take(t.padded));
  t.at = reinterpret_cast<int32_t*>(take(t.padded));
  t.q = reinterpret_cast<const float**>(take(2 * t.padded));
}

void begin_tile(Tile& t) {
  for (int q = 0; q < t.padded; ++q) t.sum.m[q] = -__builtin_inff(), t.sum.l[q] = 0.0f;
  std::memset(t.sum.o, 0, 4 * static_cast<size_t>(t.padded) * static_cast<size_t>(t.value_padded));
  for (int q = 0; q < t.padded && !t.many; ++q) t.block.m[q] = t.sum.m[q], t.block.l[q] = 0.0f;
  if (!t.many) return;
  for (int d = 0; d < t.key; ++d)
    for (int q = 0; q < t.padded; ++q)
      t.turned[d * t.padded + q] = q < t.queries ? t.q[q][d] : 0.0f;
}

void attend_block(Tile& t, const Block& b, Partial out) {
  const bool plain = t.softcap == 0.0f && !t.bias.table;
  const float scale = plain ? t.scale : 1.0f;
  if (!t.many) {
    if (b.half) attend_positions<uint16_t>(t, b, scale, plain, out);
    else attend_positions<float>(t, b, scale, plain, out);
    return;
  }
  const Block wide = b.half ? widen(t, b) : b;
  for_vectors(t.padded, [&](auto v, int q) LM_LAMBDA { score_all<v.value>(t, wide, q); });
  if (!plain) prepare_scores(t, wide);
  for (int q = 0; q < t.padded; q += 16) soften_queries(t, wide, scale, q, out.m, out.l);
  for_vectors(t.padded, [&](auto v, int q) LM_LAMBDA { weigh_all<v.value>(t, wide, q, out.o); });
}

void merge_block(Tile& t, const Partial& block) {
  const f32x16 none = minus_infinity();
  float *before = t.factors, *added = t.factors + t.padded;
  for (int q = 0; q < t.padded; q += 16) {
    const f32x16 old = load(t.sum.m + q), m = load(block.m + q), both = max(m, old);
    const f32x16 peak = select(both == none, splat(0.0f), both);
    const f32x16 a = exp(old - peak), b = exp(m - peak);
    store(before + q, a);
    store(added + q, b);
    store(t.sum.m + q, both);
    store(t.sum.l + q, fma(load(block.l + q), b, load(t.sum.l + q) * a));
  }
  if (t.many) {
    for (int e = 0; e < t.value; ++e)
      for (int q = 0; q < t.padded; q += 16) {
        float* o = t.sum.o + e * t.padded + q;
        const f32x16 more = load(block.o + e * t.padded + q);
        store(o, fma(more, load(added + q), load(o) * load(before + q)));
      }
    return;
  }
  for (int q = 0; q < t.queries; ++q)
    for (int e = 0; e < t.value_padded; e += 16) {
      float* o = t.sum.o + q * t.value_padded + e;
      const f32x16 more = load(block.o + q * t.value_padded + e);
      store(o, fma(more, splat(added[q]), load(o) * splat(before[q])));
    }
}

void finish_query(const Tile& t, int query, float* y) {
  const float sum = t.sum.l[query], factor = sum > 0.0f ? 1.0f / sum : 0.0f;
  // Adding zero turns -0 into +0, which a masked position may or may not have done before.
  if (t.many) {
    for (int e = 0; e < t.value; ++e) y[e] = t.sum.o[e * t.padded + query] * factor + 0.0f;
    return;
  }
  for (int e = 0; e < t.value; e += 16) {
    const f32x16 o = load(t.sum.o + query * t.value_padded + e);
    store_part(y + e, o * splat(factor) + splat(0.0f), t.value - e);
  }
}

}  // namespace lmclock::LMCLOCK_PATH
