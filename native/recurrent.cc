// lstm: the input products of all rows at once, then row after row of each sequence, all sequences
// side by side.

#include "cache.h"

namespace lmclock::LMCLOCK_PATH {

namespace {

struct Lstm {
  int64_t hidden, gates, stride;    // gates = 4 hidden, stride of its rows
  const Value *x, *y;
  const SpaceRows* rows;
  const State* state;               // null: sequences start from zeros and are forgotten
  const float* bias;                // added to the gates, may be null
  float *from_input, *from_state;   // (rows, gates), (sequences, gates)
  float *h, *c;                     // (sequences, hidden)
};

int64_t length_of(const Lstm& l, int64_t s) {
  return l.rows->live_starts[s + 1] - l.rows->live_starts[s];
}

// Position 0 starts from zeros: a slot needs no clearing.
void begin(const Frame& f, const Worker& w, const Lstm& l) {
  const Share mine = share(f, w, f.sequences);
  const size_t bytes = 4 * static_cast<size_t>(l.hidden);
  for (int64_t s = mine.first; s < mine.last; ++s) {
    float *h = l.h + s * l.hidden, *c = l.c + s * l.hidden;
    const bool fresh = !l.state || length_of(l, s) == 0 ||
                       l.rows->live_positions[l.rows->live_starts[s]] == 0;
    if (fresh) {
      std::memset(h, 0, bytes);
      std::memset(c, 0, bytes);
    } else {
      const float* held = l.state->current + f.slots[s] * l.state->width;
      std::memcpy(h, held, bytes);
      std::memcpy(c, held + l.hidden, bytes);
    }
  }
}

void finish(const Frame& f, const Worker& w, const Lstm& l) {
  const Share mine = share(f, w, f.sequences);
  for (int64_t s = mine.first; l.state && s < mine.last; ++s) {
    if (length_of(l, s) == 0) continue;
    float* next = l.state->next + f.slots[s] * l.state->width;
    std::memcpy(next, l.h + s * l.hidden, 4 * static_cast<size_t>(l.hidden));
    std::memcpy(next + l.hidden, l.c + s * l.hidden, 4 * static_cast<size_t>(l.hidden));
    round_to(l.state->layout.format, next, l.state->width, next);
    l.state->written[f.slots[s]] = 1;
  }
}

// One step of hidden units [k, k + n) of sequence s, which stands at row r.
LM_INLINE void step(const Lstm& l, int64_t s, int64_t r, int64_t k, int64_t n) {
  f32x16 gate[4];
  unroll<4>([&](auto g) LM_LAMBDA {
    const int64_t at = g * l.hidden + k;
    gate[g] = load_part(l.from_input + r * l.stride + at, n);
    if (l.bias) gate[g] = gate[g] + load_part(l.bias + at, n);
    gate[g] = gate[g] + load_part(l.from_state + s * l.stride + at, n);
  });
  float* cell = l.c + s * l.hidden + k;
  const f32x16 kept = sigmoid(gate[1]) * load_part(cell, n);
  const f32x16 c = kept + sigmoid(gate[0]) * tanh(gate[2]);
  const f32x16 h = sigmoid(gate[3]) * tanh(c);
  store_part(cell, c, n);
  store_part(l.h + s * l.hidden + k, h, n);
  store_part(l.y->row(r) + k, h, n);
}

void run_steps(Frame& f, const isa::Instruction& i, Worker& w, const Lstm& l, int64_t steps) {
  const int64_t vectors = (l.hidden + 15) / 16;
  const Part part = {&f.weights[i.weights[1]].matrix, l.from_state, l.stride, nullptr, nullptr, 0,
                     1.0f};
  const Share mine = share(f, w, f.sequences * vectors);
  for (int64_t t = 0; t < steps; ++t) {
    const Rows h = round_rows(f, w, static_cast<Act>(i.act), l.h, l.hidden, l.hidden, f.sequences,
                              f.records);
    multiply(f, w, &part, 1, h, f.sequences);
    barrier(f);
    for (int64_t u = mine.first; u < mine.last; ++u) {
      const int64_t s = u / vectors, k = u % vectors * 16, length = length_of(l, s);
      if (t >= length) continue;
      const int64_t n = l.rows->live_starts[s] + (i.reverse ? length - 1 - t : t);
      step(l, s, l.rows->live[n], k, l.hidden - k);
    }
    barrier(f);
  }
}

}  // namespace

void op_lstm(Frame& f, const isa::Instruction& i, Worker& w) {
  Lstm l = {};
  l.x = &f.values[i.ins[0]];
  l.y = &f.values[i.outs[0]];
  l.rows = &rows_of(f, *l.x);
  l.hidden = l.y->width;
  l.gates = 4 * l.hidden;
  l.stride = (l.gates + 15) / 16 * 16;
  if (i.state >= 0) l.state = &f.states[i.state];
  if (i.bias_k >= 0) l.bias = f.weights[i.bias_k].vector;
  l.from_input = f.shared;
  l.from_state = l.from_input + l.rows->count * l.stride;
  l.h = l.from_state + f.sequences * l.stride;
  l.c = l.h + f.sequences * l.hidden;
  const Part part = {&f.weights[i.weights[0]].matrix, l.from_input, l.stride,
                     i.bias < 0 ? nullptr : f.weights[i.bias].vector, nullptr, 0, 1.0f};
  multiply(f, w, &part, 1, prepare_rows(f, i, w, *l.x), l.rows->count);
  begin(f, w, l);
  const Share rows = share(f, w, l.rows->count);
  for (int64_t r = rows.first; r < rows.last; ++r)
    if (!l.rows->valid[r]) std::memset(l.y->row(r), 0, 4 * static_cast<size_t>(l.hidden));
  int64_t steps = 0;
  for (int64_t s = 0; s < f.sequences; ++s) steps = larger(steps, length_of(l, s));
  barrier(f);
  run_steps(f, i, w, l, steps);
  finish(f, w, l);
}

}  // namespace lmclock::LMCLOCK_PATH
