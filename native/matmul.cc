// linear and glu: which tile computes what, and what is done to a tile before it is stored.

#include "mathfun.h"
#include "tables.h"

namespace lmclock::LMCLOCK_PATH {

namespace {

// Weights that one sweep over the rows reads again and again: half of the smallest second-level
// cache aimed at (1 MB, Zen 4), the other half is for activations.
constexpr int64_t kSweepBytes = 512 * 1024;

const Tiles* fast_tiles(Layout layout, Act act) {
  switch (layout) {
    case Layout::f32:
    case Layout::f16: return act == Act::none ? &float_tiles(layout) : nullptr;
    case Layout::bf16:
      if (act == Act::bf16 && !wide_bf16) return &bf16_tiles();
      return act != Act::q8_32 ? &float_tiles(layout) : nullptr;
    case Layout::q4_k:
    case Layout::q6_k:
    case Layout::generic16: return act == Act::q8_32 ? &kquant_tiles(layout) : nullptr;
    default: return act == Act::q8_32 ? &block32_tiles(layout) : nullptr;
  }
}

struct Product {  // one weight matrix and the activations it meets
  const Matrix* w;
  const Rows* x;
  const Tiles* tiles;
  const ManyRows* many;

  LM_INLINE Product of(const Matrix& w, const Rows& x, const ManyRows* many) {
    return {&w, &x, fast_tiles(w.layout, x.act), many};
  }
};

int64_t taken(const Product& p, int64_t rows) {
  return p.many ? p.many->take(p.w->layout, *p.x, rows) : 0;
}

// size = index into kTileRows, or kTileSizes for the many-row kernel; first: no other tile has read
// the panel yet
void compute(const Product& p, ManyConfig& config, int64_t panel, int64_t row, int64_t rows,
             int size, bool first, float* out) {
  const TileArgs args = {p.w->data + panel * p.w->panel_stride,
                         static_cast<const uint8_t*>(p.x->data) + row * p.x->stride,
                         p.x->stride,
                         p.w->width,
                         out,
                         stream_ahead,
                         first ? rows_ahead : 0};
  if (size == kTileSizes) return p.many->run(config, p.w->layout, args, rows);
  if (p.tiles) return p.tiles->by_rows[size](args);
  tile_f32(p.w->layout, p.x->act, args, size);
}

int outputs_in(const Matrix& w, int64_t panel) {
  const int64_t left = w.outputs - panel * kPanel;
  return static_cast<int>(left < kPanel ? left : kPanel);
}

struct Range {
  int64_t r0, r1, p0, p1;
};

// Calls f(row, rows, size, panel) for all tiles of the range, panels in groups of about kSweepBytes
// that stay in cache while the rows pass. many(left) says what the many-row kernel takes.
template <class M, class F>
LM_INLINE void for_tiles(const Range& range, int64_t bytes, M&& many, F&& f) {
  const int64_t fit = kSweepBytes / (bytes > 0 ? bytes : 1);
  const int64_t group = fit < 1 ? 1 : fit;
  for (int64_t g0 = range.p0; g0 < range.p1; g0 += group) {
    const int64_t g1 = g0 + group < range.p1 ? g0 + group : range.p1;
    for (int64_t row = range.r0; row < range.r1;) {
      const int64_t left = range.r1 - row, wanted = many(left);
      int size = wanted ? kTileSizes : 0;
      while (!wanted && kTileRows[size] > left) ++size;
      const int64_t rows = wanted ? wanted : kTileRows[size];
      for (int64_t panel = g0; panel < g1; ++panel) f(row, rows, size, panel);
      row += rows;
    }
  }
}

// A full panel's vector, or its first n lanes.
LM_INLINE f32x16 load_part(const float* p, int n) { return n == 16 ? load(p) : load_n(p, n); }
LM_INLINE void store_part(float* p, f32x16 x, int n) {
  if (n == 16) return store(p, x);
  store_n(p, x, n);
}

}  // namespace

void linear_with(const ManyRows* many, const Linear& l, int64_t r0, int64_t r1, int64_t p0,
                 int64_t p1) {
  const Product product = Product::of(l.w, l.x, many);
  ManyConfig config;
  alignas(64) float out[kMostRows * kPanel];
  auto tile = [&](int64_t row, int64_t rows, int size, int64_t panel) {
    compute(product, config, panel, row, rows, size, row == r0, out);
    const int n = outputs_in(l.w, panel);
    const int64_t o = panel * kPanel;
    const f32x16 bias = l.bias ? load_part(l.bias + o, n) : splat(0.0f);
    for (int64_t t = 0; t < rows; ++t) {
      f32x16 y = load(out + kPanel * t);
      if (l.bias) y = y + bias;
      if (l.add) y = y + load_part(l.add + (row + t) * l.add_stride + o, n);
      store_part(l.y + (row + t) * l.y_stride + o, y, n);
    }
  };
  for_tiles(
      {r0, r1, p0, p1}, panel_bytes(l.w.layout, l.w.width),
      [&](int64_t left) { return taken(product, left); }, tile);
  if (config.rows) many->end();
}

void glu_with(const ManyRows* many, const Glu& g, int64_t r0, int64_t r1, int64_t p0, int64_t p1) {
  const Product gate = Product::of(g.gate, g.x, many), up = Product::of(g.up, g.x, many);
  ManyConfig config;
  alignas(64) float a[kMostRows * kPanel], b[kMostRows * kPanel];
  auto tile = [&](int64_t row, int64_t rows, int size, int64_t panel) {
    compute(gate, config, panel, row, rows, size, row == r0, a);
    compute(up, config, panel, row, rows, size, row == r0, b);
    const int n = outputs_in(g.gate, panel);
    const int64_t o = panel * kPanel;
    const f32x16 gate_bias = g.gate_bias ? load_part(g.gate_bias + o, n) : splat(0.0f);
    const f32x16 up_bias = g.up_bias ? load_part(g.up_bias + o, n) : splat(0.0f);
    for (int64_t t = 0; t < rows; ++t) {
      f32x16 x = load(a + kPanel * t), y = load(b + kPanel * t);
      if (g.gate_bias) x = x + gate_bias;
      if (g.up_bias) y = y + up_bias;
      store_part(g.y + (row + t) * g.y_stride + o, activation(g.kind, x) * y, n);
    }
  };
  for_tiles(
      {r0, r1, p0, p1},
      panel_bytes(g.gate.layout, g.gate.width) + panel_bytes(g.up.layout, g.up.width),
      [&](int64_t left) {
        const int64_t x = taken(gate, left), y = taken(up, left);
        return x < y ? x : y;
      },
      tile);
  if (config.rows) many->end();
}

void linear(const Linear& l, int64_t r0, int64_t r1, int64_t p0, int64_t p1) {
  linear_with(&kDecoded, l, r0, r1, p0, p1);
}

void glu(const Glu& g, int64_t r0, int64_t r1, int64_t p0, int64_t p1) {
  glu_with(&kDecoded, g, r0, r1, p0, p1);
}

}  // namespace lmclock::LMCLOCK_PATH
