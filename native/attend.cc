// attend: which keys a row sees, the sharing out of tiles and blocks over the threads.
//
// A tile is a few rows of one sequence and the query heads that read one key head. Where there are
// many tiles, each thread takes the next one and goes through its blocks. Where there are few
// (decoding), blocks are shared out too: each gives a partial result in shared memory, and after a
// barrier the partials of a tile are merged in order. Both ways do the same arithmetic.

#include "cache.h"

namespace lmclock::LMCLOCK_PATH {

namespace {

// From here on lanes are queries: below, half of them or more would be idle.
constexpr int kManyQueries = 9;
// Tiles per thread from which the last one is not worth splitting into blocks.
constexpr int64_t kTiles = 4;

struct Plan {
  int group, tile_rows;  // query heads of a key head; rows of a tile
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
  int64_t tiles;             // of one head
};

Sequence sequence_of(const Plan& p, int64_t s) {
  const SpaceRows& r = *p.rows;
  const int64_t first = r.live_starts[s];
  Sequence q = {s, r.live + first, r.live_positions + first, r.live_starts[s + 1] - first, nullptr,
                0, 0};
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
  q.tiles = (q.rows + p.tile_rows - 1) / p.tile_rows;
  return q;
}

// How many keys stand at positions up to `limit`.
int64_t keys_up_to(const Plan& p, const Sequence& s, int64_t limit) {
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
Share visible(const Plan& p, const Sequence& s, int64_t n) {
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

Span span_of(const Plan& p, const Sequence& s, int64_t tile) {
  Span span = {tile * p.tile_rows, smaller((tile + 1) * p.tile_rows, s.rows), 0, 0, 0};
  span.block = visible(p, s, span.first).first / kPositions;
  span.keys_end = visible(p, s, span.last - 1).last;
  span.blocks_end = larger(span.block, (span.keys_end + kPositions - 1) / kPositions);
  return span;
}

void fill_tile(const Frame& f, const isa::Instruction& i, const Plan& p, const Sequence& s,
               int64_t h, const Span& span, float* memory, Tile& t) {
  t.queries = static_cast<int>(span.last - span.first) * p.group;
  t.padded = (t.queries + 15) / 16 * 16;
  t.many = t.queries >= kManyQueries;
  t.key = static_cast<int>(p.key);
  t.value = static_cast<int>(p.value);
  t.value_padded = static_cast<int>(p.value_padded);
  t.scale = i.qk_scale != 0.0f ? i.qk_scale : 1.0f / __builtin_sqrtf(static_cast<float>(p.key));
  t.softcap = i.softcap;
  t.bias = f.biases[&i - f.program];
  t.key_positions = s.key_at;
  place_tile(t, memory);
  for (int q = 0; q < t.padded; ++q) t.low[q] = t.high[q] = 0.0f;
  for (int q = 0; q < t.queries; ++q) {
    const int64_t n = span.first + q / p.group, row = s.live[n];
    const int64_t head = h * p.group + q % p.group;
    const Share see = visible(p, s, n);
    t.q[q] = p.q->row(row) + head * p.key;
    t.low[q] = static_cast<float>(see.first);
    t.high[q] = static_cast<float>(see.last);
    t.head[q] = static_cast<int32_t>(head);
    t.at[q] = s.at[n];
  }
  begin_tile(t);
}

// The first packed group of a sequence: room for a partly filled group of each one before.
int64_t packed_group(const SpaceRows& keys, int64_t s) {
  return keys.live_starts[s] / kGroup + s;
}

void find_packed(const Plan& p, const Sequence& s, int64_t h, Block& b) {
  b.value_stride = p.value_padded;
  for (int g = 0; kGroup * g < b.count; ++g) {
    const int64_t group = packed_group(*p.key_rows, s.number) + b.first / kGroup + g;
    b.key[g] = p.packed_keys + (group * p.kv_heads + h) * kGroup * p.key;
    b.value[g] = p.packed_values + (group * p.kv_heads + h) * kGroup * p.value_padded;
  }
}

// Keys in a format or a page size that the kernels do not read are copied to the tile's memory.
void copy_group(const Plan& p, const Sequence& s, int64_t h, int64_t first, int count, float* keys,
                float* values) {
  const PageLayout& l = p.state->layout;
  for (int j = 0; j < count;) {
    const Place at = place_of(*p.state, *p.table, s.number, first + j);
    const int run = static_cast<int>(smaller(count - j, l.page_size - at.offset));
    const uint8_t* head = p.state->head(at.page, h);
    read_keys(l, head, at.offset, run, j, keys);
    read_values(l, head, at.offset, run, values + j * p.value_padded);
    j += run;
  }
}

// The keys of position `position` in pages that the kernels read in place, else null.
const void* keys_at(const Plan& p, const Sequence& s, int64_t h, int64_t position) {
  if (!p.state || position >= s.keys) return nullptr;
  const PageLayout& l = p.state->layout;
  const Place at = place_of(*p.state, *p.table, s.number, position);
  return p.state->head(at.page, h) + at.offset / kGroup * l.group_bytes;
}

// Formats that are read in place have their values asked for in time; others are copied first, keys
// and values together.
bool read_in_place(const PageLayout& l) {
  return l.format != CacheFormat::q8_0 && l.page_size % kGroup == 0;
}

int64_t ahead_bytes(const PageLayout& l) {
  const bool whole = !read_in_place(l) && l.page_size == kPositions;
  return whole ? l.head_bytes : int64_t{kGroups} * l.group_bytes;
}

void find_paged(const Plan& p, const Sequence& s, int64_t h, const Tile& t, Block& b) {
  const PageLayout& l = p.state->layout;
  const bool direct = read_in_place(l);
  b.value_bytes = direct ? int64_t{b.count} * l.row_bytes : 0;
  b.half = direct && l.format == CacheFormat::f16;
  b.value_stride = p.value_padded;
  for (int g = 0; kGroup * g < b.count; ++g) {
    const int64_t first = b.first + kGroup * g;
    if (direct) {
      const Place at = place_of(*p.state, *p.table, s.number, first);
      const uint8_t* head = p.state->head(at.page, h);
      b.key[g] = head + at.offset / kGroup * l.group_bytes;
      b.value[g] = head + l.values_at + int64_t{at.offset} * l.row_bytes;
    } else {
      float* keys = t.keys + int64_t{g} * kGroup * p.key;
      float* values = t.values + int64_t{g} * kGroup * p.value_padded;
      const int count = b.count - kGroup * g;
      copy_group(p, s, h, first, count < kGroup ? count : kGroup, keys, values);
      b.key[g] = keys;
      b.value[g] = values;
    }
  }
}

Block find_block(const Plan& p, const Sequence& s, int64_t h, const Span& span, int64_t n,
                 const Tile& t) {
  Block b = {};
  b.first = n * kPositions;
  b.count = static_cast<int>(smaller(kPositions, span.keys_end - b.first));
  b.ahead = n + 1 < span.blocks_end ? keys_at(p, s, h, b.first + kPositions) : nullptr;
  if (b.ahead) b.ahead_bytes = ahead_bytes(p.state->layout);
  if (p.state) find_paged(p, s, h, t, b);
  else find_packed(p, s, h, b);
  return b;
}

Plan plan_of(const Frame& f, const isa::Instruction& i) {
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
  const int64_t padded = (p.tile_rows * p.group + 15) / 16 * 16;
  p.partial_floats = 2 * padded + padded * p.value_padded;
  return p;
}

// Plain keys and values into groups of 16, as a page would hold them in f32.
void pack_plain(const Frame& f, const Worker& w, const Plan& p) {
  const SpaceRows& k = *p.key_rows;
  for (int64_t s = 0; s < f.sequences; ++s) {
    const int64_t keys = k.live_starts[s + 1] - k.live_starts[s];
    const Share mine = share(f, w, keys * p.kv_heads);
    for (int64_t u = mine.first; u < mine.last; ++u) {
      const int64_t n = u / p.kv_heads, h = u % p.kv_heads, row = k.live[k.live_starts[s] + n];
      const int64_t group = (packed_group(k, s) + n / kGroup) * p.kv_heads + h;
      float* key = p.packed_keys + group * kGroup * p.key + n % kGroup;
      const float* x = p.k->row(row) + h * p.key;
      for (int64_t d = 0; d < p.key; ++d) key[kGroup * d] = x[d];
      std::memcpy(p.packed_values + (group * kGroup + n % kGroup) * p.value_padded,
                  p.v->row(row) + h * p.value, 4 * static_cast<size_t>(p.value));
    }
  }
}

// Calls visit(sequence, tile, head, running number of the tile) for all tiles.
template <class F>
LM_INLINE void for_tiles(const Frame& f, const Plan& p, F&& visit) {
  int64_t number = 0;
  for (int64_t n = 0; n < f.sequences; ++n) {
    const Sequence s = sequence_of(p, n);
    for (int64_t tile = 0; tile < s.tiles; ++tile)
      for (int64_t h = 0; h < p.kv_heads; ++h) visit(s, tile, h, number++);
  }
}

// A block's keys, or `offset` bytes after them its values, before anything else is done.
void ask_for_keys(const Plan& p, const Sequence& s, int64_t h, int64_t position,
                  int64_t offset = 0) {
  const char* keys = static_cast<const char*>(keys_at(p, s, h, position));
  const int64_t bytes = keys ? int64_t{kGroups} * p.state->layout.group_bytes : 0;
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(keys + offset + at, 0, 2);
}

void finish_tile(const Plan& p, const Sequence& s, int64_t h, const Span& span, const Tile& t) {
  for (int q = 0; q < t.queries; ++q) {
    float* y = p.y->row(s.live[span.first + q / p.group]);
    finish_query(t, q, y + (h * p.group + q % p.group) * p.value);
  }
}

void whole_tile(const Frame& f, const isa::Instruction& i, const Worker& w, const Plan& p,
                const Sequence& s, int64_t tile, int64_t h) {
  const Span span = span_of(p, s, tile);
  Tile t;
  ask_for_keys(p, s, h, span.block * kPositions);
  fill_tile(f, i, p, s, h, span, w.tile, t);
  for (int64_t n = span.block; n < span.blocks_end; ++n) {
    attend_block(t, find_block(p, s, h, span, n, t), t.block);
    merge_block(t, t.block);
  }
  finish_tile(p, s, h, span, t);
}

struct Sizes {
  int64_t tiles, blocks;
  bool shared_out;  // blocks are, not tiles
};

Sizes sizes_of(const Frame& f, const Plan& p) {
  Sizes n = {};
  int64_t most = 0;
  for_tiles(f, p, [&](const Sequence& s, int64_t tile, int64_t, int64_t) {
    const Span span = span_of(p, s, tile);
    ++n.tiles;
    n.blocks += span.blocks_end - span.block;
    most = larger(most, span.blocks_end - span.block);
  });
  const int64_t room = f.shared_floats - (p.partials - f.shared);
  n.shared_out = f.threads > 1 && most * kTiles * f.threads > n.blocks &&
                 n.blocks * p.partial_floats <= room && n.tiles <= kMerges;
  return n;
}

// Tiles from the last rows to the first, whose blocks are fewer.
void attend_tiles(Frame& f, const isa::Instruction& i, Worker& w, const Plan& p, int64_t tiles) {
  Counter& next = next_counter(f, w);
  const auto take = [&] { return tiles - 1 - next.value.fetch_add(1, std::memory_order_relaxed); };
  int64_t mine = take(), before = tiles;
  for (int64_t n = f.sequences; n-- > 0;) {
    const Sequence s = sequence_of(p, n);
    before -= s.tiles * p.kv_heads;
    for (; mine >= before && mine >= 0; mine = take())
      whole_tile(f, i, w, p, s, (mine - before) / p.kv_heads, (mine - before) % p.kv_heads);
  }
}

// Blocks of all tiles in one line, an equal part of it for each thread. Whoever finishes the last
// block of a tile merges them all, in order.
void attend_blocks(Frame& f, const isa::Instruction& i, Worker& w, const Plan& p, int64_t blocks) {
  const Share mine = share(f, w, blocks);
  int64_t before = 0;
  for_tiles(f, p, [&](const Sequence& s, int64_t tile, int64_t h, int64_t number) {
    const Span span = span_of(p, s, tile);
    const int64_t count = span.blocks_end - span.block;
    const int64_t first = larger(mine.first - before, 0);
    const int64_t last = smaller(mine.last - before, count);
    const auto partial = [&](const Tile& t, int64_t n) {
      return partial_at(t, p.partials + (before + n) * p.partial_floats);
    };
    // A tile that sees nothing belongs to the first thread.
    if (first < last || (count == 0 && w.thread == 0)) {
      Tile t;
      ask_for_keys(p, s, h, (span.block + first) * kPositions);
      fill_tile(f, i, p, s, h, span, w.tile, t);
      for (int64_t n = first; n < last; ++n)
        attend_block(t, find_block(p, s, h, span, span.block + n, t), partial(t, n));
      const int32_t done = static_cast<int32_t>(larger(last - first, 0));
      if (f.merges[number].fetch_add(done, std::memory_order_acq_rel) + done == count) {
        f.merges[number].store(0, std::memory_order_relaxed);
        for (int64_t n = 0; n < count; ++n) merge_block(t, partial(t, n));
        finish_tile(p, s, h, span, t);
      }
    }
    before += count;
  });
}

}  // namespace

void op_attend(Frame& f, const isa::Instruction& i, Worker& w) {
  const Plan p = plan_of(f, i);
  const Share rows = share(f, w, p.rows->count);
  for (int64_t r = rows.first; r < rows.last; ++r)
    if (!p.rows->valid[r])
      std::memset(p.y->row(r), 0, 4 * static_cast<size_t>(p.y->width));
  if (!p.state) {
    pack_plain(f, w, p);
    barrier(f);
  }
  const Sizes n = sizes_of(f, p);
  if (n.shared_out) attend_blocks(f, i, w, p, n.blocks);
  else attend_tiles(f, i, w, p, n.tiles);
}

void ask_for_blocks(const Frame& f, const isa::Instruction& i, const Worker& w) {
  if (i.state < 0) return;
  const Plan p = plan_of(f, i);
  const Sizes n = sizes_of(f, p);
  if (!n.shared_out) return;
  const Share mine = share(f, w, n.blocks);
  int64_t before = 0;
  for_tiles(f, p, [&](const Sequence& s, int64_t tile, int64_t h, int64_t) {
    const Span span = span_of(p, s, tile);
    const int64_t next = before + span.blocks_end - span.block;
    if (mine.first < mine.last && mine.first >= before && mine.first < next) {
      const int64_t position = (span.block + mine.first - before) * kPositions;
      ask_for_keys(p, s, h, position);
      ask_for_keys(p, s, h, position, p.state->layout.values_at);
    }
    before = next;
  });
}

}  // namespace lmclock::LMCLOCK_PATH
