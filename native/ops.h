// What the op families of one SIMD path offer each other. See frame.h for how an opcode runs.
#pragma once

#include "frame.h"
#include "mathfun.h"
#include "simd.h"

namespace lmclock::LMCLOCK_PATH {

void op_embed(Frame& f, const isa::Instruction& i, Worker& w);
void op_norm(Frame& f, const isa::Instruction& i, Worker& w);
void op_linear(Frame& f, const isa::Instruction& i, Worker& w);
void op_rope(Frame& f, const isa::Instruction& i, Worker& w);
void op_store(Frame& f, const isa::Instruction& i, Worker& w);
void op_attend(Frame& f, const isa::Instruction& i, Worker& w);
void op_act(Frame& f, const isa::Instruction& i, Worker& w);
void op_binary(Frame& f, const isa::Instruction& i, Worker& w);
void op_pick(Frame& f, const isa::Instruction& i, Worker& w);
void op_pool(Frame& f, const isa::Instruction& i, Worker& w);
void op_softmax(Frame& f, const isa::Instruction& i, Worker& w);
void op_concat(Frame& f, const isa::Instruction& i, Worker& w);
void op_lstm(Frame& f, const isa::Instruction& i, Worker& w);
void op_route(Frame& f, const isa::Instruction& i, Worker& w);
void op_experts(Frame& f, const isa::Instruction& i, Worker& w);
void op_sample(Frame& f, const isa::Instruction& i, Worker& w);
void op_qkv(Frame& f, const isa::Instruction& i, Worker& w);
void op_glu(Frame& f, const isa::Instruction& i, Worker& w);

// y = the normalised row of x; bias and weight may be null.
struct Norm {
  const float* weight = nullptr;
  const float* bias = nullptr;
  bool layer = false;  // else rms
  float eps = 0;
};
void norm_row(const Norm& norm, const float* x, int64_t width, float* y);

// Rows [0, count) of x as the products of `i` read them: normalised and rounded as the instruction
// says. Few rows are prepared by every thread for itself; many are shared out, and a barrier makes
// them whole.
Rows prepare_rows(Frame& f, const isa::Instruction& i, Worker& w, const Value& x);
Rows round_rows(Frame& f, Worker& w, Act act, const float* x, int64_t stride, int64_t width,
                int64_t count, uint8_t* shared);

// One product of a group that reads the same rows: y = scale x w^T + bias + add.
struct Part {
  const Matrix* matrix;
  float* y;
  int64_t y_stride;
  const float* bias;
  const float* add;
  int64_t add_stride;
  float scale;
};
void multiply(Frame& f, Worker& w, const Part* parts, int count, const Rows& x, int64_t rows);

// The first weights that a thread reads of linear, qkv or glu with few rows.
const uint8_t* start_of(const Frame& f, const isa::Instruction& i, int thread);

// Softmax of a row, or its logarithm; y may be x.
void softmax_row(const float* x, int64_t width, bool log, float* y);

GluKind glu_kind(int32_t kind);

// Asks for the first block of keys and values that a thread reads, where blocks are shared out.
void ask_for_blocks(const Frame& f, const isa::Instruction& i, const Worker& w);

// Asks for the memory that `store` will write, an equal part on each thread: a position's keys lie
// in as many cache lines as a head has pairs of elements.
void ask_to_store(const Frame& f, const isa::Instruction& i, const Worker& w);

// The first n lanes, or all 16: f32 rows end where their width ends.
LM_INLINE f32x16 load_part(const float* p, int64_t n) {
  return n >= 16 ? load(p) : load_n(p, static_cast<int>(n));
}
LM_INLINE void store_part(float* p, f32x16 x, int64_t n) {
  if (n >= 16) return store(p, x);
  store_n(p, x, static_cast<int>(n));
}

LM_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
LM_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace lmclock::LMCLOCK_PATH
