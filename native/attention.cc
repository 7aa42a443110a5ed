// A tile of queries against a block of keys, and the merging of blocks; see attention.h.

#include "attention_kernels.h"
#if defined(LM_HAS_PAIRS)
#include "attention_rounded.h"
#endif

namespace lmclock::LMCLOCK_PATH {

namespace {

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
void attend_positions(const Tile& t, const Block& b, float scale, bool prepared,
                      const Partial& out) {
  const Steps values = Steps::of(b.value_bytes ? b.value[0] : nullptr, b.value_bytes, t.key);
  const Steps keys = Steps::of(b.ahead, b.ahead_bytes, b.count);
  for_rows(t.queries, [&](auto r, int q) LM_LAMBDA {
    score_rows<r.value, E>(t.q + q, t.key, b, q == 0 ? values : Steps{}, t.scores + q * kBlock);
  });
  if (!prepared) prepare_scores(t, b);
  for (int q = 0; q < t.queries; ++q)
    soften_row(t.scores + q * kBlock, b, scale, t.low[q], t.high[q], out.m + q, out.l + q);
  for_rows(t.queries, [&](auto r, int q) LM_LAMBDA {
    weigh_rows<r.value, E>(t.scores + q * kBlock, b, t.value_padded, q == 0 ? keys : Steps{},
                           out.o + q * t.value_padded);
  });
}

// `vectors` vectors of f16 to f32.
LM_INLINE void widen_run(const void* from, int64_t vectors, float* __restrict to) {
  const uint16_t* x = static_cast<const uint16_t*>(from);
  for (int64_t n = 0; n < vectors; ++n) store(to + 16 * n, load_f16(x + 16 * n));
}

// f16 keys and values to f32, since each is read as often as there are queries.
Block widen(const Tile& t, const Block& b) {
  Block wide = b;
  wide.format = CacheFormat::f32;
  wide.value_stride = t.value_padded;
  for (int g = 0; kGroup * g < b.count; ++g) {
    float* k = t.keys + int64_t{g} * kGroup * t.key;
    float* v = t.values + int64_t{g} * kGroup * t.value_padded;
    wide.key[g] = k;
    wide.value[g] = v;
    widen_run(b.key[g], t.key, k);
    const int rows = b.count - kGroup * g < kGroup ? b.count - kGroup * g : kGroup;
    widen_run(b.value[g], int64_t{rows} * t.value_padded / 16, v);  // rows are value_padded apart
  }
  return wide;
}

}  // namespace

#if defined(LM_HAS_PAIRS)
bool rounds_attention() { return true; }

void begin_rounded(const Tile& t) {
  for (int q = 0; q < t.padded; q += 16)
    pair_elements(t.turned + q, t.padded, t.key, reinterpret_cast<int32_t*>(t.turned) + q,
                  query_scales(t) + q);
}

void pair_block(const Tile& t, const Block& b) {
  if (b.format == CacheFormat::f16) pair_all<uint16_t>(t, b, weighs_codes);
  else pair_all<float>(t, b, weighs_codes);
}

template <bool Codes>
void weigh_rounded(const Tile& t, const Block& b, float factor) {
  for_vectors(t.padded, [&](auto v, int q) LM_LAMBDA {
    soften_pairs<v.value, Codes>(t, b.count, splat(factor), q);
  });
  for_vectors(t.padded,
              [&](auto v, int q) LM_LAMBDA { weigh_block<v.value, Codes>(t, b.count, q); });
}

void attend_rounded(Tile& t, const Block& b) {
  constexpr float kLog2E = 0x1.715476p0f;
  const bool plain = t.softcap == 0.0f && !t.bias.table && t.scale > 0.0f;
  for_vectors(t.padded, [&](auto v, int q) LM_LAMBDA { score_block<v.value>(t, b.count, q); });
  if (!plain) prepare_scores(t, b);
  for (int q = 0; q < t.padded; q += 16) mask_queries(t, b, q);
  const float factor = plain ? t.scale * kLog2E : kLog2E;
  if (weighs_codes) weigh_rounded<true>(t, b, factor);
  else weigh_rounded<false>(t, b, factor);
}

#else  // attend.cc asks before it calls them
bool rounds_attention() { return false; }
void begin_rounded(const Tile&) {}
void pair_block(const Tile&, const Block&) {}
void attend_rounded(Tile&, const Block&) {}
#endif

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

namespace {

// Queries of a tile from rows to lanes: (key, padded).
void turn_queries(const Tile& t) {
  for (int q = 0; q < t.padded; q += 16)
    for (int d = 0; d < t.key; d += 16) {
      i32x16 x[16];
      unroll<16>([&](auto j) LM_LAMBDA {
        const bool there = q + j < t.queries;
        x[j] = there ? as_i32(load_part(t.q[q + j] + d, t.key - d)) : splat_i(0);
      });
      turn(x);
      float* to = t.turned + d * t.padded + q;
      unroll<16>([&](auto i) LM_LAMBDA {
        if (d + i < t.key) store(to + i * t.padded, as_f32(x[i]));
      });
    }
}

}  // namespace

void begin_tile(Tile& t) {
  for (int q = 0; q < t.padded; ++q) t.sum.m[q] = -__builtin_inff(), t.sum.l[q] = 0.0f;
  std::memset(t.sum.o, 0, 4 * static_cast<size_t>(t.padded) * static_cast<size_t>(t.value_padded));
  for (int q = 0; q < t.padded && !t.many; ++q) t.block.m[q] = t.sum.m[q], t.block.l[q] = 0.0f;
  if (!t.many) return;
  turn_queries(t);
  if (t.rounded) begin_rounded(t);
}

void attend_block(Tile& t, const Block& b, const Partial& out) {
  const bool plain = t.softcap == 0.0f && !t.bias.table && t.scale > 0.0f;
  const float scale = plain ? t.scale : 1.0f;
  if (!t.many) {
    if (b.format == CacheFormat::q8_0) attend_positions<Q8>(t, b, scale, plain, out);
    else if (b.format == CacheFormat::f16) attend_positions<uint16_t>(t, b, scale, plain, out);
    else attend_positions<float>(t, b, scale, plain, out);
    return;
  }
  const Block wide = b.format == CacheFormat::f16 ? widen(t, b) : b;
  for_vectors(t.padded, [&](auto v, int q) LM_LAMBDA { score_all<v.value>(t, wide, q); });
  if (!plain) prepare_scores(t, wide);
  for (int q = 0; q < t.padded; q += 16) {
    mask_queries(t, wide, q);
    soften_queries(t, wide.count, splat(scale), q, out);
  }
  for_vectors(t.padded, [&](auto v, int q) LM_LAMBDA { weigh_all<v.value>(t, wide, q, out.o); });
}

void merge_block(Tile& t, const Partial& block) {
  const f32x16 none = minus_infinity();
  float *before = t.factors, *added = t.factors + t.padded;
  for (int q = 0; q < t.padded; q += 16) {
    const f32x16 old = load(t.sum.m + q), m = load(block.m + q), both = max(m, old);
    const f32x16 peak = select(both == none, splat(0.0f), both);
    const f32x16 a = weight(old - peak), b = weight(m - peak);
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

void finish_queries(const Tile& t, int query, int count, float* const* y) {
  const f32x16 zero = splat(0.0f);
  // Adding zero turns -0 into +0, which a masked position may or may not have done before.
  if (t.many) {
    const f32x16 sum = load(t.sum.l + query);
    const f32x16 factor = select(zero < sum, splat(1.0f) / sum, zero);
    for (int e = 0; e < t.value; e += 16) {
      const float* o = t.sum.o + e * t.padded + query;
      i32x16 x[16];
      unroll<16>([&](auto i) LM_LAMBDA { x[i] = as_i32(load(o + i * t.padded) * factor + zero); });
      turn(x);
      unroll<16>([&](auto j) LM_LAMBDA {
        if (j < count) store_part(y[j] + e, as_f32(x[j]), t.value - e);
      });
    }
    return;
  }
  for (int q = 0; q < count; ++q) {
    const float sum = t.sum.l[query + q], factor = sum > 0.0f ? 1.0f / sum : 0.0f;
    for (int e = 0; e < t.value; e += 16) {
      const f32x16 o = load(t.sum.o + (query + q) * t.value_padded + e);
      store_part(y[q] + e, o * splat(factor) + zero, t.value - e);
    }
  }
}

}  // namespace lmclock::LMCLOCK_PATH
