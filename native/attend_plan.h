// What an `attend` is about to do: its sizes, the sequences and their rows, which keys a row sees.
#pragma once

#include "cache.h"

namespace lmclock::LMCLOCK_PATH {

namespace {

// Tiles per thread from which the last one is not worth splitting into blocks.
constexpr int64_t kTiles = 4;

struct Plan {
  int group, tile_rows;  // query heads of a key head; rows of a tile
  bool round;            // act=bf16, and this processor gains by it
  int together;          // rounded tiles that one thread does side by side
  int64_t kv_heads, key, value, value_padded;
  int32_t window;
  bool causal;
  const Value *q, *k, *v, *y;  // k, v: null with a state
  const State* state;
  const PageTable* table;
  const SpaceRows *rows, *key_rows;
  float *packed_keys, *packed_values;  // plain keys and values as a page would hold them
  float* partials;
  int64_t partial_floats;  // of one block
};

// One sequence as a tile sees it.
struct Sequence {
  int64_t number;
  const int32_t *live, *at;  // its valid rows and their positions
  int64_t rows;
  const int32_t* key_at;     // plain keys: their positions
  int64_t keys;
  bool rounded;
  int64_t unit_rows, tiles;  // what a thread takes at once, and how many of it one head has
};

LM_INLINE Sequence sequence_of(const Plan& p, int64_t s) {
  const SpaceRows& r = *p.rows;
  const int64_t first = r.live_starts[s];
  Sequence q = {s, r.live + first, r.live_positions + first, r.live_starts[s + 1] - first, nullptr,
                0, false, p.tile_rows, 0};
  if (q.rows == 0) return q;
  if (!p.state) {
    const SpaceRows& k = *p.key_rows;
    q.keys = k.live_starts[s + 1] - k.live_starts[s];
    q.key_at = k.live_positions + k.live_starts[s];
  } else if (p.state->frozen) {
    q.keys = p.table->lengths[s];
  } else {
    q.keys = q.at[q.rows - 1] + 1;
  }
  q.rounded = p.round && q.rows >= isa::kRoundedRows;
  if (q.rounded) q.unit_rows *= p.together;
  q.tiles = (q.rows + q.unit_rows - 1) / q.unit_rows;
  return q;
}

// How many keys stand at positions up to `limit`.
LM_INLINE int64_t keys_up_to(const Plan& p, const Sequence& s, int64_t limit) {
  if (p.state) return larger(0, smaller(limit + 1, s.keys));
  int64_t a = 0, b = s.keys;
  while (a < b) {
    const int64_t middle = (a + b) / 2;
    if (s.key_at[middle] <= limit) a = middle + 1;
    else b = middle;
  }
  return a;
}

// Keys [first, last) that row number n of the sequence sees.
LM_INLINE Share visible(const Plan& p, const Sequence& s, int64_t n) {
  const int64_t high = p.causal ? keys_up_to(p, s, s.at[n]) : s.keys;
  const int64_t low = p.window ? keys_up_to(p, s, s.at[n] - p.window) : 0;
  return {smaller(low, high), high};
}

// Rows [first, last) of a tile, counted within the sequence, and the blocks and keys they see.
struct Span {
  int64_t first, last;
  int64_t block, blocks_end;
  int64_t keys_end;
};

LM_INLINE Span span_of_rows(const Plan& p, const Sequence& s, int64_t first, int64_t rows) {
  Span span = {first, smaller(first + rows, s.rows), 0, 0, 0};
  span.block = visible(p, s, span.first).first / kPositions;
  span.keys_end = visible(p, s, span.last - 1).last;
  span.blocks_end = larger(span.block, (span.keys_end + kPositions - 1) / kPositions);
  return span;
}

LM_INLINE Span span_of(const Plan& p, const Sequence& s, int64_t tile) {
  return span_of_rows(p, s, tile * s.unit_rows, s.unit_rows);
}

// The first packed group of a sequence: room for a partly filled group of each one before.
LM_INLINE int64_t packed_group(const SpaceRows& keys, int64_t s) {
  return keys.live_starts[s] / kGroup + s;
}

LM_INLINE Plan plan_of(const Frame& f, const isa::Instruction& i) {
  Plan p = {};
  p.q = &f.values[i.ins[0]];
  p.y = &f.values[i.outs[0]];
  p.rows = &rows_of(f, *p.q);
  p.kv_heads = i.kv_heads ? i.kv_heads : i.heads;
  p.group = static_cast<int>(i.heads / p.kv_heads);
  p.tile_rows = p.group < kTileQueries ? static_cast<int>(kTileQueries) / p.group : 1;
  p.key = p.q->width / i.heads;
  p.value = p.y->width / i.heads;
  p.value_padded = (p.value + 15) / 16 * 16;
  p.window = i.window;
  p.causal = i.mask == static_cast<int32_t>(isa::Mask::causal);
  p.partials = f.shared;
  if (i.state >= 0) {
    p.state = &f.states[i.state];
    p.table = &f.tables[p.state->declared];
  } else {
    p.k = &f.values[i.ins[1]];
    p.v = &f.values[i.ins[2]];
    p.key_rows = &rows_of(f, *p.k);
    const int64_t floats = (packed_group(*p.key_rows, f.sequences) + 1) * p.kv_heads * kGroup;
    p.packed_keys = f.shared;
    p.packed_values = f.shared + floats * p.key;
    p.partials = p.packed_values + floats * p.value_padded;
  }
  p.round = rounds_attention() && i.act == static_cast<int32_t>(isa::Act::bf16);
  p.together = kTogether;
  const auto units = [&] { return p.rows->count / (p.tile_rows * p.together) * p.kv_heads; };
  while (p.together > 1 && units() < kTiles * f.threads) p.together /= 2;
  const int64_t padded = (p.tile_rows * p.group + 15) / 16 * 16;
  p.partial_floats = 2 * padded + padded * p.value_padded;
  return p;
}

}  // namespace

}  // namespace lmclock::LMCLOCK_PATH
