// What the sources of one SIMD path offer each other: the functions behind `Kernels` and the tile
// kernels.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace lmclock::LMCLOCK_PATH {

bool pack(int format, const uint8_t* rows, int64_t outputs, int64_t width, uint8_t* dst,
          int64_t panel_stride, int64_t p0, int64_t p1);
void unpack_rows(const Matrix& w, const int32_t* ids, int64_t count, float* out, int64_t stride);
void round_row(Act act, const float* x, int64_t width, int64_t k0, int64_t k1, void* record);
void linear(const Linear& l, int64_t r0, int64_t r1, int64_t p0, int64_t p1);
void glu(const Glu& g, int64_t r0, int64_t r1, int64_t p0, int64_t p1);
void apply(Function f, const float* x, float* y, int64_t count);
int64_t peak_int8(int64_t rounds);
int64_t peak_int16(int64_t rounds);
int64_t peak_bf16(int64_t rounds);
int64_t peak_f32(int64_t rounds);
int64_t stream(const uint8_t* data, int64_t bytes);

// The operands of a tile: `rows` activation rows (records, or f32 rows) against one panel.
struct TileArgs {
  const uint8_t* panel;
  const uint8_t* x;  // first row
  int64_t x_stride;  // bytes
  int64_t width;
  float* out;     // [rows][16]
  int64_t ahead;       // stream_ahead
  int64_t rows_ahead = 0;  // that of kernels.h, for weights that come from memory
};

// Computes all of k for a fixed number of rows. The order of accumulation over k is part of the
// layout: it does not depend on the number of rows.
using Tile = void (*)(const TileArgs&);

constexpr int kTileSizes = sizeof(kTileRows) / sizeof(kTileRows[0]);
struct Tiles {
  Tile by_rows[kTileSizes];  // as kTileRows
};

// {F::tile<16>, F::tile<8>, ...}: F has a static member function template over the number of rows.
template <class F>
constexpr Tiles make_tiles() {
  Tiles tiles = {};
  unroll<kTileSizes>([&](auto i) { tiles.by_rows[i] = &F::template tile<kTileRows[i]>; });
  return tiles;
}

const Tiles& block32_tiles(Layout layout);  // q8_32 with layouts of 32-blocks
const Tiles& kquant_tiles(Layout layout);   // q8_32 with 256-blocks and generic16
const Tiles& float_tiles(Layout layout);    // f32 activations with f32, f16, bf16
const Tiles& bf16_tiles();                  // bf16 with bf16

// A kernel that takes many rows at once in place of tiles, with the same bits where `take` says so.
constexpr int64_t kMostRows = 128;
struct ManyConfig {  // what the tile registers are set up for; 0: not in use
  int rows = 0, words = 0, words_b = 0;
};
struct ManyRows {
  // How many of the next `rows` rows it wants, at most kMostRows; 0 leaves them to the tiles.
  int64_t (*take)(Layout layout, const Rows& x, int64_t rows);
  // out as TileArgs, with room for a multiple of 16 rows.
  void (*run)(ManyConfig& config, Layout layout, const TileArgs& args, int64_t rows);
  void (*end)();  // after the last run with a config in use
};
extern const ManyRows kDecoded;  // decodes a panel once for several tiles, where that costs much
void linear_with(const ManyRows* many, const Linear& l, int64_t r0, int64_t r1, int64_t p0,
                 int64_t p1);
void glu_with(const ManyRows* many, const Glu& g, int64_t r0, int64_t r1, int64_t p0, int64_t p1);

// Any layout with any activations through f32; size is an index into kTileRows.
void tile_f32(Layout layout, Act act, const TileArgs& args, int size);

}  // namespace lmclock::LMCLOCK_PATH
