// Attention of a tile of queries over one block of keys, and how blocks are put together.
//
// Bits. A score is one chain of fused multiply-adds over the elements of the key; an output element
// is one chain over the positions of a block of 64, aligned to position 0; blocks merge in
// ascending order. Both kernels keep to that: lanes are positions (and output elements) where
// queries are few, and queries where they are many. So a row gets the same bits alone or among
// others, whatever the paging, the threads and the chunks its prompt came in.
#pragma once

#include "ops.h"

namespace lmclock::LMCLOCK_PATH {

constexpr int kGroups = static_cast<int>(kPositions) / kGroup;

// act=bf16 (attention_rounded.h) has another order, which does not depend on the tile either: an
// output is one chain over all positions, rescaled where a block raises the maximum. Which
// sequences are computed so depends on their rows in the cycle, so chunks change the bits, company
// does not.

// Keys and values of up to 64 positions of one head. Groups past the last position are not read.
struct Block {
  const void* key[kGroups];    // (dim, 16 positions)
  const void* value[kGroups];  // first row of the group
  int64_t value_stride;        // elements from row to row, q8_0: bytes
  CacheFormat format;          // of keys and values here
  int64_t first;               // position (or index) of the first key
  int count;                   // 1 .. 64
  const void* ahead;           // what is read next, keys or weights, or null; so many bytes
  int64_t ahead_bytes;
  int64_t value_bytes;         // of this block's values where they still lie in memory, else 0
};

// What one block, or all blocks so far, give each query: maximum of the scores, sum of exp(score -
// maximum), and the values weighted by these. The layout of `o` depends on the kernel.
struct Partial {
  float *m, *l, *o;
};

// The queries that read one key head: `rows` rows of a sequence times the group of heads.
struct Tile {
  int queries, padded;            // padded to a multiple of 16
  bool many;                      // lanes are queries
  bool rounded;                   // by pairs of 16 bits, straight into `sum`
  int key, value, value_padded;   // elements of a head
  float scale, softcap;
  const float** q;                // (queries)
  float *low, *high;              // (padded): keys low .. high - 1 are visible; 0, 0 for padding
  Bias bias;
  int32_t* head;                  // (queries): query head, the row of the bias table
  int32_t* at;                    // (queries): position of the query
  const int32_t* key_positions;   // of the keys, by index; null where the index is the position
  float *turned, *scores, *keys, *values, *factors;  // working memory
  Partial sum, block;
};

int64_t partial_floats(const Tile& t);
Partial partial_at(const Tile& t, float* memory);

// Lays out the working memory of a tile: `tile_floats` of frame.h.
void place_tile(Tile& t, float* memory);

void begin_tile(Tile& t);                               // before the first block
void attend_block(Tile& t, const Block& b, const Partial& out);
void merge_block(Tile& t, const Partial& block);

// Rounded tiles, where this path and processor gain by them: a block's keys and values become pairs
// of 16 bits in t.keys and t.values, from where any tile of the same head attends to it.
bool rounds_attention();
void begin_rounded(const Tile& t);
void pair_block(const Tile& t, const Block& b);
void attend_rounded(Tile& t, const Block& b);

// The output rows of queries query .. query + count - 1, at most 16; query a multiple of 16.
void finish_queries(const Tile& t, int query, int count, float* const* y);

}  // namespace lmclock::LMCLOCK_PATH
