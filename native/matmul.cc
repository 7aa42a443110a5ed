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
      if (act == Act::bf16) return &bf16_tiles();
      return act == Act::none ? &float_tiles(layout) : nullptr;
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

  LM_INLINE Product of(const Matrix& w, const Rows& x) {
    return {&w, &x, fast_tiles(w.layout, x.act)};
  }
};

// size = index into kTileRows
void compute(const Product& p, int64_t panel, int64_t row, int size, float* out) {
  const TileArgs args = {p.w->data + panel * p.w->panel_stride,
                         static_cast<const uint8_t*>(p.x->data) + row * p.x->stride,
                         p.x->stride,
                         p.w->width,
                         out,
                         stream_ahead};
  if (p.tiles) return p.tiles->by_rows[size](args);
  tile_f32(p.w->layout, p.x->act, args, size);
}

int outputs_in(const Matrix& w, int64_t panel) {
  const int64_t left = w.outputs - panel * kPanel;
  return static_cast<int>(left < kPanel ? left : kPanel);
}

// Calls f(row, size, panel) for all tiles of the range, panels in groups that stay in cache while
// the rows pass.
template <class F>
LM_INLINE void for_tiles(int64_t bytes, int64_t r0, int64_t r1, int64_t p0, int64_t p1, F&& f) {
  const int64_t fit = kSweepBytes / (bytes > 0 ? bytes : 1);
  const int64_t group = fit < 1 ? 1 : fit;
  for (int64_t g0 = p0; g0 < p1; g0 += group) {
    const int64_t g1 = g0 + group < p1 ? g0 + group : p1;
    for (int64_t row = r0; row < r1;) {
      int size = 0;
      while (kTileRows[size] > r1 - row) ++size;
      for (int64_t panel = g0; panel < g1; ++panel) f(row, size, panel);
      row += kTileRows[size];
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

void linear(const Linear& l, int64_t r0, int64_t r1, int64_t p0, int64_t p1) {
  const Product product = Product::of(l.w, l.x);
  const int64_t bytes = panel_bytes(l.w.layout, l.w.width);
  alignas(64) float out[kTileRows[0] * kPanel];
  for_tiles(bytes, r0, r1, p0, p1, [&](int64_t row, int size, int64_t panel) {
    compute(product, panel, row, size, out);
    const int n = outputs_in(l.w, panel);
    const int64_t o = panel * kPanel;
    const f32x16 bias = l.bias ? load_part(l.bias + o, n) : splat(0.0f);
    for (int t = 0; t < kTileRows[size]; ++t) {
      f32x16 y = load(out + kPanel * t);
      if (l.bias) y = y + bias;
      if (l.add) y = y + load_part(l.add + (row + t) * l.add_stride + o, n);
      store_part(l.y + (row + t) * l.y_stride + o, y, n);
    }
  });
}

void glu(const Glu& g, int64_t r0, int64_t r1, int64_t p0, int64_t p1) {
  const Product gate = Product::of(g.gate, g.x), up = Product::of(g.up, g.x);
  const int64_t bytes =
      panel_bytes(g.gate.layout, g.gate.width) + panel_bytes(g.up.layout, g.up.width);
  alignas(64) float a[kTileRows[0] * kPanel], b[kTileRows[0] * kPanel];
  for_tiles(bytes, r0, r1, p0, p1, [&](int64_t row, int size, int64_t panel) {
    compute(gate, panel, row, size, a);
    compute(up, panel, row, size, b);
    const int n = outputs_in(g.gate, panel);
    const int64_t o = panel * kPanel;
    const f32x16 gate_bias = g.gate_bias ? load_part(g.gate_bias + o, n) : splat(0.0f);
    const f32x16 up_bias = g.up_bias ? load_part(g.up_bias + o, n) : splat(0.0f);
    for (int t = 0; t < kTileRows[size]; ++t) {
      f32x16 x = load(a + kPanel * t), y = load(b + kPanel * t);
      if (g.gate_bias) x = x + gate_bias;
      if (g.up_bias) y = y + up_bias;
      store_part(g.y + (row + t) * g.y_stride + o, activation(g.kind, x) * y, n);
    }
  });
}

}  // namespace lmclock::LMCLOCK_PATH
