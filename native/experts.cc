// route and experts: the best experts of each row, and their products grouped by expert.

#include "ops.h"

namespace lmclock::LMCLOCK_PATH {

namespace {

// The `top` largest of p (ties: the lower number) to out_p and out_e; p is used up.
void choose(float* p, int64_t experts, int64_t top, bool renorm, float* out_p, int32_t* out_e) {
  float sum = 0.0f;
  for (int64_t n = 0; n < top; ++n) {
    int64_t best = 0;
    for (int64_t e = 1; e < experts; ++e)
      if (p[e] > p[best]) best = e;
    out_p[n] = p[best];
    out_e[n] = static_cast<int32_t>(best);
    sum += p[best];
    p[best] = -1.0f;  // probabilities are not negative
  }
  for (int64_t n = 0; n < top && renorm; ++n) out_p[n] /= sum;
}

}  // namespace

void op_route(Frame& f, const isa::Instruction& i, Worker& w) {
  const Value &x = f.values[i.ins[0]], &p = f.values[i.outs[0]], &e = f.values[i.outs[1]];
  const int64_t rows = rows_of(f, x).count, stride = (i.experts + 15) / 16 * 16;
  const Part part = {&f.weights[i.weights[0]].matrix, f.shared, stride, nullptr, nullptr, 0, 1.0f};
  multiply(f, w, &part, 1, {x.data, x.stride * 4, Act::none}, rows);
  barrier(f);
  const Share s = share(f, w, rows);
  for (int64_t r = s.first; r < s.last; ++r) {
    float* scores = f.shared + r * stride;
    if (i.kind == static_cast<int32_t>(isa::RouteKind::softmax)) {
      softmax_row(scores, i.experts, false, scores);
    } else {
      for (int64_t k = 0; k < stride; k += 16) store(scores + k, sigmoid(load(scores + k)));
    }
    choose(scores, i.experts, i.top, i.renorm != 0, p.row(r), e.ids_row(r));
  }
}

namespace {

// A pair is a row and one of its experts; pairs of one expert lie side by side.
struct Pairs {
  int64_t top, count, experts, hidden, width;
  int64_t hidden_stride, width_stride;
  int32_t* starts;   // (experts + 1)
  int32_t* row;      // (count), of each pair
  int32_t* place;    // (rows x top), pair number of each choice
  float *inner, *outer;  // (count, hidden), (count, width)
};

Pairs pairs_of(const Frame& f, const isa::Instruction& i) {
  const Value &x = f.values[i.ins[0]], &p = f.values[i.ins[1]];
  Pairs g = {};
  g.top = p.width;
  g.count = rows_of(f, x).count * g.top;
  g.experts = i.experts;
  g.hidden = f.weights[i.weights[0]].parts[0].outputs;
  g.width = f.weights[i.weights[2]].parts[0].outputs;
  g.hidden_stride = (g.hidden + 15) / 16 * 16;
  g.width_stride = (g.width + 15) / 16 * 16;
  g.inner = f.shared;
  g.outer = g.inner + g.count * g.hidden_stride;
  g.starts = reinterpret_cast<int32_t*>(g.outer + g.count * g.width_stride);
  g.row = g.starts + g.experts + 1;
  g.place = g.row + g.count;
  return g;
}

void group(const Frame& f, const isa::Instruction& i, const Pairs& g) {
  const Value& e = f.values[i.ins[2]];
  for (int64_t k = 0; k <= g.experts; ++k) g.starts[k] = 0;
  const auto expert = [&](int64_t n) {
    const int32_t id = e.ids_row(n / g.top)[n % g.top];
    if (id >= 0 && id < g.experts) return id;
    f.fault->raise(Fault::row_out_of_range, i, id, g.experts);
    return 0;
  };
  for (int64_t n = 0; n < g.count; ++n) ++g.starts[expert(n) + 1];
  for (int64_t k = 0; k < g.experts; ++k) g.starts[k + 1] += g.starts[k];
  for (int64_t n = 0; n < g.count; ++n) {
    const int32_t at = g.starts[expert(n)]++;
    g.row[at] = static_cast<int32_t>(n / g.top);
    g.place[n] = at;
  }
  for (int64_t k = g.experts; k > 0; --k) g.starts[k] = g.starts[k - 1];
  g.starts[0] = 0;
}

// Calls work(expert, first pair, last pair, p0, p1) for this thread's panels of all experts that
// have pairs. The panels of these experts form one line: equal parts of it where pairs are few,
// else the next piece of it each time.
template <class F>
LM_INLINE void for_panels(Frame& f, Worker& w, const Pairs& g, int64_t panels, F&& work) {
  constexpr int64_t kFewPairs = 16, kPiece = 4;
  int64_t active = 0;
  for (int64_t e = 0; e < g.experts; ++e) active += g.starts[e] < g.starts[e + 1];
  const int64_t line = active * panels;
  const bool few = g.count <= kFewPairs;
  Counter* next = few ? nullptr : &next_counter(f, w);
  const auto take = [&] {
    const int64_t at = next->value.fetch_add(kPiece, std::memory_order_relaxed);
    return Share{smaller(at, line), smaller(at + kPiece, line)};
  };
  Share mine = few ? share(f, w, line) : take();
  while (mine.first < mine.last) {
    int64_t before = 0;
    for (int64_t e = 0; e < g.experts; ++e) {
      if (g.starts[e] == g.starts[e + 1]) continue;
      const int64_t a = larger(mine.first - before, 0), b = smaller(mine.last - before, panels);
      if (a < b) work(e, g.starts[e], g.starts[e + 1], a, b);
      before += panels;
    }
    mine = few ? Share{0, 0} : take();
  }
}

// Rows of f32 in pair order to what the kernels read, rounded into f.records; all threads meet.
Rows round_pairs(Frame& f, Worker& w, Act act, const Pairs& g, int64_t width,
                 const float* (*row)(const Frame&, const isa::Instruction&, const Pairs&, int64_t),
                 const isa::Instruction& i) {
  const int64_t bytes = (act_row_bytes(act, width) + kAlign - 1) / kAlign * kAlign;
  const Share s = share(f, w, g.count);
  for (int64_t n = s.first; n < s.last; ++n)
    f.kernels->round_row(act, row(f, i, g, n), width, 0, width, f.records + n * bytes);
  barrier(f);
  return {f.records, bytes, act};
}

const float* input_row(const Frame& f, const isa::Instruction& i, const Pairs& g, int64_t n) {
  return f.values[i.ins[0]].row(g.row[n]);
}

const float* inner_row(const Frame&, const isa::Instruction&, const Pairs& g, int64_t n) {
  return g.inner + n * g.hidden_stride;
}

// y = sum of p times the expert's row, in the order of the choices.
void combine(const Frame& f, const isa::Instruction& i, const Worker& w, const Pairs& g) {
  const Value &p = f.values[i.ins[1]], &y = f.values[i.outs[0]];
  const Share s = share(f, w, rows_of(f, y).count);
  for (int64_t r = s.first; r < s.last; ++r)
    for (int64_t k = 0; k < g.width; k += 16) {
      f32x16 sum = splat(0.0f);
      for (int64_t n = 0; n < g.top; ++n) {
        const float* part = g.outer + g.place[r * g.top + n] * g.width_stride;
        sum = fma(splat(p.row(r)[n]), load(part + k), sum);
      }
      store_part(y.row(r) + k, sum, g.width - k);
    }
}

}  // namespace

void op_experts(Frame& f, const isa::Instruction& i, Worker& w) {
  const Pairs g = pairs_of(f, i);
  const Act act = static_cast<Act>(i.act);
  const WeightView &gate = f.weights[i.weights[0]], &up = f.weights[i.weights[1]];
  const WeightView& down = f.weights[i.weights[2]];
  if (w.thread == 0) group(f, i, g);
  barrier(f);
  Rows x = round_pairs(f, w, act, g, gate.width, input_row, i);
  for_panels(f, w, g, panels_of(g.hidden),
             [&](int64_t e, int64_t first, int64_t last, int64_t p0, int64_t p1) {
               const Glu glu = {gate.parts[e], up.parts[e], x, g.inner, g.hidden_stride, nullptr,
                                nullptr, glu_kind(i.kind)};
               f.kernels->glu(glu, first, last, p0, p1);
             });
  barrier(f);
  x = round_pairs(f, w, act, g, down.width, inner_row, i);
  for_panels(f, w, g, panels_of(g.width),
             [&](int64_t e, int64_t first, int64_t last, int64_t p0, int64_t p1) {
               const Linear l = {down.parts[e], x, g.outer, g.width_stride, nullptr, nullptr, 0};
               f.kernels->linear(l, first, last, p0, p1);
             });
  barrier(f);
  combine(f, i, w, g);
}

}  // namespace lmclock::LMCLOCK_PATH
