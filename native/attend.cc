// attend: which keys a row sees, the sharing out of tiles and blocks over the threads.
//
// A tile is a few rows of one sequence and the query heads that read one key head. Where there are
// many tiles, each thread takes the next one and goes through its blocks. Where there are few
// (decoding), blocks are shared out too: each gives a partial result in shared memory, and after a
// barrier the partials of a tile are merged in order. Both ways do the same arithmetic.

#include "attend_plan.h"

namespace lmclock::LMCLOCK_PATH {

namespace {

// From here on lanes are queries: below, half of them or more would be idle.
constexpr int kManyQueries = 9;
// As much as memory gives while one block is computed; with 32 KB the block waits for it.
constexpr int64_t kWeightsAhead = 16384;

void fill_tile(const Frame& f, const isa::Instruction& i, const Plan& p, const Sequence& s,
               int64_t h, const Span& span, float* memory, Tile& t) {
  t.queries = static_cast<int>(span.last - span.first) * p.group;
  t.padded = (t.queries + 15) / 16 * 16;
  t.rounded = s.rounded;
  t.many = s.rounded || t.queries >= kManyQueries;
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

// Blocks that are read in place have their values asked for in time; others are copied first, keys
// and values together. q8_0 is, where many queries read what is made of it.
bool read_in_place(const PageLayout& l, const Tile& t) {
  return (l.format != CacheFormat::q8_0 || !t.many) && l.page_size % kGroup == 0;
}

int64_t ahead_bytes(const PageLayout& l, const Tile& t) {
  const bool whole = !read_in_place(l, t) && l.page_size == kPositions;
  return whole ? l.head_bytes : int64_t{kGroups} * l.group_bytes;
}

void find_paged(const Plan& p, const Sequence& s, int64_t h, const Tile& t, Block& b) {
  const PageLayout& l = p.state->layout;
  const bool direct = read_in_place(l, t);
  b.value_bytes = direct ? int64_t{b.count} * l.row_bytes : 0;
  b.format = direct ? l.format : CacheFormat::f32;
  b.value_stride = b.format == CacheFormat::q8_0 ? l.row_bytes : p.value_padded;
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
  if (b.ahead) b.ahead_bytes = ahead_bytes(p.state->layout, t);
  if (p.state) find_paged(p, s, h, t, b);
  else find_packed(p, s, h, b);
  return b;
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
  for (int first = 0; first < t.queries; first += kGroup) {
    float* y[kGroup];
    const int count = static_cast<int>(smaller(kGroup, t.queries - first));
    for (int q = 0; q < count; ++q) {
      const int64_t n = first + q;
      y[q] = p.y->row(s.live[span.first + n / p.group]) + (h * p.group + n % p.group) * p.value;
    }
    finish_queries(t, first, count, y);
  }
}

// Several tiles of neighbouring rows, which read a block once it is converted.
void rounded_tiles(const Frame& f, const isa::Instruction& i, const Worker& w, const Plan& p,
                   const Sequence& s, int64_t unit, int64_t h) {
  const Span all = span_of(p, s, unit);
  const int64_t floats = tile_floats(p.tile_rows * p.group, p.key, p.value);
  Tile t[kTogether];
  Span span[kTogether];
  int tiles = 0;
  for (int64_t row = all.first; row < all.last; row += p.tile_rows, ++tiles) {
    Tile& own = t[tiles];
    span[tiles] = span_of_rows(p, s, row, smaller(p.tile_rows, all.last - row));
    fill_tile(f, i, p, s, h, span[tiles], w.tile + tiles * floats, own);
    own.scores = t[0].scores, own.keys = t[0].keys, own.values = t[0].values;
    own.block = t[0].block;
  }
  for (int64_t n = all.block; n < all.blocks_end; ++n) {
    Block b = find_block(p, s, h, all, n, t[0]);
    pair_block(t[0], b);
    for (int k = 0; k < tiles; ++k) {
      if (n < span[k].block || n >= span[k].blocks_end) continue;
      b.count = static_cast<int>(smaller(kPositions, span[k].keys_end - b.first));
      attend_rounded(t[k], b);
    }
  }
  for (int k = 0; k < tiles; ++k) finish_tile(p, s, h, span[k], t[k]);
}

void whole_tile(const Frame& f, const isa::Instruction& i, const Worker& w, const Plan& p,
                const Sequence& s, int64_t tile, int64_t h) {
  if (s.rounded) return rounded_tiles(f, i, w, p, s, tile, h);
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
  bool rounded = false;
  for_tiles(f, p, [&](const Sequence& s, int64_t tile, int64_t, int64_t) {
    const Span span = span_of(p, s, tile);
    rounded |= s.rounded;
    ++n.tiles;
    n.blocks += span.blocks_end - span.block;
    most = larger(most, span.blocks_end - span.block);
  });
  const int64_t room = f.shared_floats - (p.partials - f.shared);
  n.shared_out = f.threads > 1 && !rounded && most * kTiles * f.threads > n.blocks &&
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

// Where no keys follow, the weights that the next product starts with are asked for; not where
// lanes are queries: those kernels ask for nothing.
void ask_for_weights(Worker& w, Block& b) {
  const Ahead weights = w.ahead.take(kWeightsAhead);
  b.ahead = weights.at;
  b.ahead_bytes = weights.end - weights.at;
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
      for (int64_t n = first; n < last; ++n) {
        Block b = find_block(p, s, h, span, span.block + n, t);
        if (n + 1 == last && !t.many) ask_for_weights(w, b);
        attend_block(t, b, partial(t, n));
      }
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
