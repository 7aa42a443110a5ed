// linear, qkv, glu: preparing the rows, sharing out panels and rows, the kernels do the rest.

#include "ops.h"

namespace lmclock::LMCLOCK_PATH {

namespace {

// Up to here all threads take all rows and each its own panels; beyond, rows are split as well.
constexpr int64_t kFewRows = 16;
// Rows of one share: four tiles of the kernels, so that the last, partial tile costs little.
constexpr int64_t kShareRows = 64;
// Shares per thread: with the last one lost to imbalance, 1 / 8 of a thread's part is the most that
// can be waited for.
constexpr int64_t kShares = 8;

// Weights asked for while the rows they meet are prepared: what memory gives in that time.
constexpr int64_t kAskedBefore = 4096;

Norm fused_norm(const Frame& f, const isa::Instruction& i) {
  return {i.norm < 0 ? nullptr : f.weights[i.norm].vector,
          i.norm_bias < 0 ? nullptr : f.weights[i.norm_bias].vector,
          i.norm_kind == static_cast<int32_t>(isa::NormKind::layer), i.eps};
}

int64_t bytes_of(const Matrix& m) { return panel_bytes(m.layout, m.width); }

// The first panel of thread t, when each thread takes the same number of bytes.
int64_t panel_boundary(const Part* parts, int count, int t, int threads) {
  int64_t total = 0, panel = 0;
  for (int n = 0; n < count; ++n)
    total += panels_of(parts[n].matrix->outputs) * bytes_of(*parts[n].matrix);
  int64_t before = total * t / threads;
  for (int n = 0; n < count; ++n) {
    const int64_t bytes = bytes_of(*parts[n].matrix);
    const int64_t panels = panels_of(parts[n].matrix->outputs);
    if (before < panels * bytes) return panel + before / bytes;
    before -= panels * bytes;
    panel += panels;
  }
  return panel;
}

const uint8_t* panel_at(const Part* parts, int count, int64_t panel) {
  for (int n = 0; n < count; ++n) {
    const Matrix& m = *parts[n].matrix;
    if (panel < panels_of(m.outputs)) return m.data + panel * m.panel_stride;
    panel -= panels_of(m.outputs);
  }
  return nullptr;
}

// Calls work(r0, r1, p0, p1) for this thread's shares of rows x panels; `first` and `last` are its
// panels when there are few rows.
template <class F>
LM_INLINE void for_shares(Frame& f, Worker& w, int64_t rows, int64_t panels, int64_t first,
                          int64_t last, F&& work) {
  if (rows == 0) return;
  if (rows <= kFewRows || f.threads == 1) {
    if (first < last) work(int64_t{0}, rows, first, last);
    return;
  }
  const int64_t row_shares = (rows + kShareRows - 1) / kShareRows;
  const int64_t wanted = (kShares * f.threads + row_shares - 1) / row_shares;
  const int64_t panel_shares = smaller(wanted, panels);
  Counter& next = next_counter(f, w);
  for (;;) {
    const int64_t u = next.value.fetch_add(1, std::memory_order_relaxed);
    if (u >= row_shares * panel_shares) return;
    const int64_t r = u % row_shares * kShareRows, p = u / row_shares;
    work(r, smaller(r + kShareRows, rows), panels * p / panel_shares,
         panels * (p + 1) / panel_shares);
  }
}

// y = scale y + bias + add on outputs [o0, o1) of rows [r0, r1).
void scale_outputs(const Part& part, int64_t r0, int64_t r1, int64_t o0, int64_t o1) {
  for (int64_t r = r0; r < r1; ++r)
    for (int64_t o = o0; o < o1; o += 16) {
      const int64_t n = o1 - o;
      float* at = part.y + r * part.y_stride + o;
      f32x16 y = load_part(at, n) * splat(part.scale);
      if (part.bias) y = y + load_part(part.bias + o, n);
      if (part.add) y = y + load_part(part.add + r * part.add_stride + o, n);
      store_part(at, y, n);
    }
}

void multiply_part(Frame& f, const Part& part, const Rows& x, int64_t r0, int64_t r1, int64_t p0,
                   int64_t p1) {
  const bool plain = part.scale == 1.0f;
  const Linear l = {*part.matrix, x, part.y, part.y_stride, plain ? part.bias : nullptr,
                    plain ? part.add : nullptr, part.add_stride};
  f.kernels->linear(l, r0, r1, p0, p1);
  if (!plain)
    scale_outputs(part, r0, r1, p0 * kPanel, smaller(p1 * kPanel, part.matrix->outputs));
}

}  // namespace

Rows round_rows(Frame& f, Worker& w, Act act, const float* x, int64_t stride, int64_t width,
                int64_t count, uint8_t* shared) {
  if (act == Act::none) return {x, stride * 4, act};
  const int64_t bytes = act_row_bytes(act, width);
  const bool own = count <= kPrivateRows;
  if (own) w.ahead.ask(kAskedBefore);
  uint8_t* to = own ? w.records : shared;
  const Share s = own ? Share{0, count} : share(f, w, count);
  for (int64_t r = s.first; r < s.last; ++r)
    f.kernels->round_row(act, x + r * stride, width, 0, width, to + r * bytes);
  if (!own) barrier(f);
  return {to, bytes, act};
}

Rows prepare_rows(Frame& f, const isa::Instruction& i, Worker& w, const Value& x) {
  const Act act = static_cast<Act>(i.act);
  const int64_t count = rows_of(f, x).count;
  if (i.norm < 0) return round_rows(f, w, act, x.data, x.stride, x.width, count, f.records);
  const Norm norm = fused_norm(f, i);
  const int64_t bytes = act_row_bytes(act, x.width);
  const bool own = count <= kPrivateRows;
  if (own) w.ahead.ask(kAskedBefore);
  uint8_t* to = own ? w.records : f.records;
  const Share s = own ? Share{0, count} : share(f, w, count);
  for (int64_t r = s.first; r < s.last; ++r) {
    uint8_t* record = to + r * bytes;
    norm_row(norm, x.row(r), x.width, act == Act::none ? reinterpret_cast<float*>(record) : w.row);
    if (act != Act::none) f.kernels->round_row(act, w.row, x.width, 0, x.width, record);
  }
  if (!own) barrier(f);
  return {to, bytes, act};
}

void multiply(Frame& f, Worker& w, const Part* parts, int count, const Rows& x, int64_t rows) {
  int64_t panels = 0;
  for (int n = 0; n < count; ++n) panels += panels_of(parts[n].matrix->outputs);
  const int64_t first = panel_boundary(parts, count, w.thread, f.threads);
  const int64_t last = panel_boundary(parts, count, w.thread + 1, f.threads);
  for_shares(f, w, rows, panels, first, last,
             [&](int64_t r0, int64_t r1, int64_t p0, int64_t p1) {
               for (int n = 0; n < count; ++n) {
                 const int64_t own = panels_of(parts[n].matrix->outputs);
                 const int64_t a = larger(p0, 0), b = smaller(p1, own);
                 if (a < b) multiply_part(f, parts[n], x, r0, r1, a, b);
                 p0 -= own;
                 p1 -= own;
               }
             });
}

namespace {

Part part_of(const Frame& f, const isa::Instruction& i, int n, int32_t bias) {
  const Value& y = f.values[i.outs[n]];
  Part part = {&f.weights[i.weights[n]].matrix, y.data, y.stride, nullptr, nullptr, 0, 1.0f};
  if (bias >= 0) part.bias = f.weights[bias].vector;
  return part;
}

}  // namespace

void op_linear(Frame& f, const isa::Instruction& i, Worker& w) {
  const Value& x = f.values[i.ins[0]];
  Part part = part_of(f, i, 0, i.bias);
  part.scale = i.scale;
  if (i.add >= 0) {
    part.add = f.values[i.add].data;
    part.add_stride = f.values[i.add].stride;
  }
  multiply(f, w, &part, 1, prepare_rows(f, i, w, x), rows_of(f, x).count);
}

void op_qkv(Frame& f, const isa::Instruction& i, Worker& w) {
  const Value& x = f.values[i.ins[0]];
  const Part parts[3] = {part_of(f, i, 0, i.bias), part_of(f, i, 1, i.bias_k),
                         part_of(f, i, 2, i.bias_v)};
  multiply(f, w, parts, 3, prepare_rows(f, i, w, x), rows_of(f, x).count);
}

GluKind glu_kind(int32_t kind) {
  switch (static_cast<isa::GluKind>(kind)) {
    case isa::GluKind::silu: return GluKind::silu;
    case isa::GluKind::gelu: return GluKind::gelu;
    case isa::GluKind::gelu_tanh: return GluKind::gelu_tanh;
    default: return GluKind::relu;
  }
}

void op_glu(Frame& f, const isa::Instruction& i, Worker& w) {
  const Value &x = f.values[i.ins[0]], &y = f.values[i.outs[0]];
  const Rows rows = prepare_rows(f, i, w, x);
  const Matrix &gate = f.weights[i.weights[0]].matrix, &up = f.weights[i.weights[1]].matrix;
  const Glu g = {gate, up, rows, y.data, y.stride,
                 i.bias < 0 ? nullptr : f.weights[i.bias].vector,
                 i.bias_k < 0 ? nullptr : f.weights[i.bias_k].vector, glu_kind(i.kind)};
  const int64_t panels = panels_of(gate.outputs);
  const Share s = share(f, w, panels);
  for_shares(f, w, rows_of(f, x).count, panels, s.first, s.last,
             [&](int64_t r0, int64_t r1, int64_t p0, int64_t p1) {
               f.kernels->glu(g, r0, r1, p0, p1);
             });
}

const uint8_t* start_of(const Frame& f, const isa::Instruction& i, int thread) {
  int count = 0;
  switch (static_cast<isa::Op>(i.op)) {
    case isa::Op::linear: count = 1; break;
    case isa::Op::qkv: count = 3; break;
    case isa::Op::glu: {
      const Matrix& gate = f.weights[i.weights[0]].matrix;
      return gate.data + panels_of(gate.outputs) * thread / f.threads * gate.panel_stride;
    }
    default: return nullptr;
  }
  Part parts[3] = {};
  for (int n = 0; n < count; ++n) parts[n].matrix = &f.weights[i.weights[n]].matrix;
  return panel_at(parts, count, panel_boundary(parts, count, thread, f.threads));
}

}  // namespace lmclock::LMCLOCK_PATH
