// Row by row and element by element: embed, rope, act, binary, pick, pool, softmax, concat.

#include "ops.h"

namespace lmclock::LMCLOCK_PATH {

namespace {

// Calls apply(row, k, n) for this thread's vectors of a (rows, width) value: n lanes from element k
// on, n >= 16 when the vector is whole.
template <class F>
LM_INLINE void for_vectors(const Frame& f, const Worker& w, int64_t rows, int64_t width,
                           F&& apply) {
  const int64_t vectors = (width + 15) / 16;
  const Share s = share(f, w, rows * vectors);
  int64_t row = vectors ? s.first / vectors : 0, at = vectors ? s.first % vectors : 0;
  for (int64_t u = s.first; u < s.last; ++u) {
    apply(row, at * 16, width - at * 16);
    if (++at == vectors) at = 0, ++row;
  }
}

LM_INLINE f32x16 softcap(f32x16 x, float cap) { return splat(cap) * tanh(x / splat(cap)); }

template <class F>
LM_INLINE void map_values(const Frame& f, const isa::Instruction& i, const Worker& w, F&& apply) {
  const Value &x = f.values[i.ins[0]], &y = f.values[i.outs[0]];
  for_vectors(f, w, rows_of(f, x).count, x.width, [&](int64_t r, int64_t k, int64_t n) LM_LAMBDA {
    store_part(y.row(r) + k, apply(load_part(x.row(r) + k, n)), n);
  });
}

template <class F>
LM_INLINE void zip_values(const Frame& f, const isa::Instruction& i, const Worker& w, F&& apply) {
  const Value &a = f.values[i.ins[0]], &b = f.values[i.ins[1]], &y = f.values[i.outs[0]];
  for_vectors(f, w, rows_of(f, a).count, a.width, [&](int64_t r, int64_t k, int64_t n) LM_LAMBDA {
    store_part(y.row(r) + k, apply(load_part(a.row(r) + k, n), load_part(b.row(r) + k, n)), n);
  });
}

}  // namespace

void op_embed(Frame& f, const isa::Instruction& i, Worker& w) {
  const Value &ids = f.values[i.ins[0]], &y = f.values[i.outs[0]];
  const Matrix& table = f.weights[i.weights[0]].matrix;
  const SpaceRows& rows = rows_of(f, ids);
  const Share s = share(f, w, rows.count);
  for (int64_t r = s.first; r < s.last; ++r) {
    float* to = y.row(r);
    const int64_t id = int64_t{ids.ids_row(r)[0]} + i.offset;
    const bool exists = id >= 0 && id < table.outputs;
    if (!rows.valid[r] || !exists) {
      if (rows.valid[r]) f.fault->raise(Fault::row_out_of_range, i, id, table.outputs);
      std::memset(to, 0, 4 * static_cast<size_t>(y.width));
      continue;
    }
    const int32_t chosen = static_cast<int32_t>(id);
    f.kernels->unpack_rows(table, &chosen, 1, to, y.stride);
    if (i.scale == 1.0f) continue;
    for (int64_t k = 0; k < y.width; k += 16)
      store_part(to + k, load_part(to + k, y.width - k) * splat(i.scale), y.width - k);
  }
}

namespace {

// x and y: the rotated part of one head. cos and sin: `half` numbers each.
LM_INLINE void rotate_halves(const float* x, const float* cos, const float* sin, int64_t half,
                             float* y) {
  for (int64_t k = 0; k < half; k += 16) {
    const int64_t n = half - k;
    const f32x16 a = load_part(x + k, n), b = load_part(x + half + k, n);
    const f32x16 c = load_part(cos + k, n), s = load_part(sin + k, n);
    store_part(y + k, a * c - b * s, n);
    store_part(y + half + k, a * s + b * c, n);
  }
}

LM_INLINE void rotate_adjacent(const float* __restrict x, const float* __restrict cos,
                               const float* __restrict sin, int64_t half, float* __restrict y) {
  for (int64_t k = 0; k < half; ++k) {
    const float a = x[2 * k], b = x[2 * k + 1];
    y[2 * k] = a * cos[k] - b * sin[k];
    y[2 * k + 1] = a * sin[k] + b * cos[k];
  }
}

}  // namespace

void op_rope(Frame& f, const isa::Instruction& i, Worker& w) {
  const Value &x = f.values[i.ins[0]], &y = f.values[i.outs[0]];
  const SpaceRows& rows = rows_of(f, x);
  const RopeTable& table = f.ropes[&i - f.program];
  const int64_t head = x.width / i.heads, half = table.half, rest = head - 2 * half;
  const bool adjacent = i.pairs == static_cast<int32_t>(isa::Pairs::adjacent);
  const Share s = share(f, w, rows.count * i.heads);
  for (int64_t u = s.first; u < s.last; ++u) {
    const int64_t r = u / i.heads, at = u % i.heads * head;
    const float* from = x.row(r) + at;
    float* to = y.row(r) + at;
    // The table reaches as far as the valid rows do.
    const int64_t position = rows.valid[r] ? rows.positions[r] : 0;
    const float* cos = table.data + 2 * half * position;
    if (adjacent) rotate_adjacent(from, cos, cos + half, half, to);
    else rotate_halves(from, cos, cos + half, half, to);
    if (rest) std::memcpy(to + 2 * half, from + 2 * half, 4 * static_cast<size_t>(rest));
  }
}

void op_act(Frame& f, const isa::Instruction& i, Worker& w) {
  switch (static_cast<isa::ActKind>(i.kind)) {
    case isa::ActKind::silu:
      return map_values(f, i, w, [](f32x16 x) LM_LAMBDA { return silu(x); });
    case isa::ActKind::gelu:
      return map_values(f, i, w, [](f32x16 x) LM_LAMBDA { return gelu(x); });
    case isa::ActKind::gelu_tanh:
      return map_values(f, i, w, [](f32x16 x) LM_LAMBDA { return gelu_tanh(x); });
    case isa::ActKind::quick_gelu:
      return map_values(f, i, w, [](f32x16 x) LM_LAMBDA { return x * sigmoid(splat(1.702f) * x); });
    case isa::ActKind::relu:
      return map_values(f, i, w, [](f32x16 x) LM_LAMBDA { return relu(x); });
    case isa::ActKind::tanh:
      return map_values(f, i, w, [](f32x16 x) LM_LAMBDA { return tanh(x); });
    case isa::ActKind::sigmoid:
      return map_values(f, i, w, [](f32x16 x) LM_LAMBDA { return sigmoid(x); });
    case isa::ActKind::softcap:
      return map_values(f, i, w, [&](f32x16 x) LM_LAMBDA { return softcap(x, i.cap); });
  }
}

void op_binary(Frame& f, const isa::Instruction& i, Worker& w) {
  switch (static_cast<isa::BinaryKind>(i.kind)) {
    case isa::BinaryKind::add:
      return zip_values(f, i, w, [](f32x16 a, f32x16 b) LM_LAMBDA { return a + b; });
    case isa::BinaryKind::sub:
      return zip_values(f, i, w, [](f32x16 a, f32x16 b) LM_LAMBDA { return a - b; });
    case isa::BinaryKind::mul:
      return zip_values(f, i, w, [](f32x16 a, f32x16 b) LM_LAMBDA { return a * b; });
  }
}

void op_pick(Frame& f, const isa::Instruction& i, Worker& w) {
  const Value &x = f.values[i.ins[0]], &y = f.values[i.outs[0]];
  const Share s = share(f, w, rows_of(f, y).count);
  for (int64_t r = s.first; r < s.last; ++r)
    std::memcpy(y.row(r), x.row(f.pick[r]), 4 * static_cast<size_t>(x.width));
}

void op_pool(Frame& f, const isa::Instruction& i, Worker& w) {
  const Value &x = f.values[i.ins[0]], &y = f.values[i.outs[0]];
  const SpaceRows& rows = rows_of(f, x);
  const auto kind = static_cast<isa::PoolKind>(i.kind);
  for_vectors(f, w, f.sequences, x.width, [&](int64_t s, int64_t k, int64_t n) LM_LAMBDA {
    f32x16 sum = splat(0.0f);
    int64_t seen = 0;
    for (int64_t r = rows.starts[s]; r < rows.starts[s + 1]; ++r) {
      if (!rows.valid[r]) continue;
      const f32x16 v = load_part(x.row(r) + k, n);
      ++seen;
      if (kind == isa::PoolKind::mean) sum = sum + v;
      else if (seen == 1 || kind == isa::PoolKind::last) sum = v;
      else if (kind == isa::PoolKind::max) sum = max(v, sum);
    }
    if (kind == isa::PoolKind::mean && seen) sum = sum / splat(static_cast<float>(seen));
    store_part(y.row(s) + k, sum, n);
  });
}

namespace {

// The largest element, -infinity for none.
float row_max(const float* x, int64_t width) {
  float most = -__builtin_inff();
  int64_t k = 0;
  if (width >= 16) {
    f32x16 m = load(x);
    for (k = 16; k + 16 <= width; k += 16) m = max(m, load(x + k));
    most = reduce_max(m);
  }
  for (; k < width; ++k) most = x[k] > most ? x[k] : most;
  return most;
}

}  // namespace

void softmax_row(const float* x, int64_t width, bool log, float* y) {
  const f32x16 peak = splat(row_max(x, width));
  f32x16 sum = splat(0.0f);
  for (int64_t k = 0; k < width; k += 16) {
    const int64_t n = width - k;
    float lanes[16] = {};
    const f32x16 d = load_part(x + k, n) - peak;
    store_part(lanes, exp(d), n);  // lanes past the end stay zero
    sum = sum + load(lanes);
    store_part(y + k, log ? d : load(lanes), n);
  }
  const float total = reduce_add(sum);
  const f32x16 by = splat(log ? __builtin_logf(total) : total);
  for (int64_t k = 0; k < width; k += 16) {
    const f32x16 v = load_part(y + k, width - k);
    store_part(y + k, log ? v - by : v / by, width - k);
  }
}

void op_softmax(Frame& f, const isa::Instruction& i, Worker& w) {
  const Value &x = f.values[i.ins[0]], &y = f.values[i.outs[0]];
  const int64_t part = x.width / i.groups;
  const Share s = share(f, w, rows_of(f, x).count * i.groups);
  for (int64_t u = s.first; u < s.last; ++u) {
    const int64_t r = u / i.groups, at = u % i.groups * part;
    softmax_row(x.row(r) + at, part, i.log != 0, y.row(r) + at);
  }
}

void op_concat(Frame& f, const isa::Instruction& i, Worker& w) {
  const Value &a = f.values[i.ins[0]], &b = f.values[i.ins[1]], &y = f.values[i.outs[0]];
  const Share s = share(f, w, rows_of(f, a).count);
  for (int64_t r = s.first; r < s.last; ++r) {
    std::memcpy(y.row(r), a.row(r), 4 * static_cast<size_t>(a.width));
    std::memcpy(y.row(r) + a.width, b.row(r), 4 * static_cast<size_t>(b.width));
  }
}

}  // namespace lmclock::LMCLOCK_PATH
