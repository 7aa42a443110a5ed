// What an opcode sees while a section runs: plain pointers into the machine, the same for every
// thread.
//
// Each op family is one source, compiled once per SIMD path like the kernels, and exports functions
// of type OpFunction. All threads of the team call the function of an instruction, each does its
// share; the machine puts a barrier after every instruction. Inside, `barrier(f)` separates phases,
// and `take(f, w, ...)` hands out shares by a shared counter.
#pragma once

#include "isa.h"
#include "kernels.h"
#include "state.h"
#include "threads.h"

// Inlined everywhere: a copy compiled for one SIMD path must never serve the others.
#define LM_ALWAYS inline __attribute__((always_inline))

namespace lmclock {

class Sampler;

// One value of the running section: (rows of its space, width); f32 unless `ids`.
struct Value {
  float* data = nullptr;
  int64_t stride = 0;  // elements from row to row
  int32_t width = 0;
  int32_t space = 0;
  int32_t slot = 0;  // the buffer it shares with others
  bool ids = false;

  LM_ALWAYS float* row(int64_t r) const { return data + r * stride; }
  LM_ALWAYS int32_t* ids_row(int64_t r) const {
    return reinterpret_cast<int32_t*>(data) + r * stride;
  }
};

struct WeightView {
  Matrix matrix;                  // packed for products and row gather
  const Matrix* parts = nullptr;  // one matrix per expert
  const float* vector = nullptr;  // unpacked f32, row by row
  int64_t rows = 0, width = 0;
};

struct SpaceRows {
  int64_t count = 0;
  const int32_t* starts = nullptr;     // (sequences + 1)
  const int32_t* positions = nullptr;  // (count)
  const int32_t* owners = nullptr;     // (count), sequence of each row
  const uint8_t* valid = nullptr;      // (count)
  const int32_t* live = nullptr;         // the valid rows, sequence after sequence
  const int32_t* live_positions = nullptr;
  const int32_t* live_starts = nullptr;  // (sequences + 1), into both
};

// Cosines, then sines, `half` of each per position; owned by the machine, filled as far as the
// batch reaches.
struct RopeTable {
  const float* data = nullptr;
  int64_t half = 0;
};

// Relative position bias: of head h at distance d (key minus query), table[h * (2 span + 1) +
// clip(d) + span].
struct Bias {
  const float* table = nullptr;
  int32_t span = 0;
};

// The first thing that went wrong in a run, reported to Python after it; later ones are dropped.
enum class Fault : int32_t { none, row_out_of_range, logits_not_finite };
struct FaultBox {
  std::atomic<int64_t> set{0};
  Fault fault = Fault::none;
  int64_t value = 0, limit = 0;  // the offending number, and the first one past the valid ones
  const isa::Instruction* at = nullptr;

  void raise(Fault what, const isa::Instruction& i, int64_t offending, int64_t most);
};

constexpr int64_t kPrivateRows = 4;   // rows that each thread prepares for itself, without barrier
constexpr int64_t kPositions = 64;    // positions of one attention block
constexpr int kCounters = 16;         // shared counters, used in turn
constexpr int64_t kMerges = 512;      // attention tiles whose blocks can be shared out
constexpr int64_t kTogether = 8;      // tiles of act=bf16 that share the conversion of a block
constexpr int64_t kTileQueries = 48;  // queries of an attention tile, unless one row has more

struct Frame {
  const Kernels* kernels = nullptr;
  const isa::Instruction* program = nullptr;  // of the running section
  Team* team = nullptr;
  int threads = 1;
  const Value* values = nullptr;
  const WeightView* weights = nullptr;
  const State* states = nullptr;
  const PageTable* tables = nullptr;     // by declaration
  const RopeTable* ropes = nullptr;      // by instruction
  const Bias* biases = nullptr;          // by instruction
  SpaceRows rows[4];                     // by isa::Space
  int32_t sequences = 0;
  const int32_t* slots = nullptr;
  const int32_t* pick = nullptr;
  const isa::Sampling* sampling = nullptr;
  const isa::Adjust* adjust = nullptr;
  const int32_t* adjust_starts = nullptr;  // (picks + 1)
  Sampler* samplers = nullptr;           // by pick row
  uint8_t* records = nullptr;            // activation records of all rows
  float* shared = nullptr;               // working memory that threads share
  int64_t shared_floats = 0;
  Counter* counters = nullptr;
  std::atomic<int32_t>* merges = nullptr;  // kMerges, zero between instructions
  FaultBox* fault = nullptr;
};

// Memory that a thread will read, as far as it has not asked for it yet. While threads wait for
// each other, attend or round activations, memory would be idle; these lines fill the time.
struct Ahead {
  const uint8_t* at = nullptr;
  const uint8_t* end = nullptr;

  LM_ALWAYS bool any() const { return at < end; }
  LM_ALWAYS Ahead take(int64_t bytes) {
    const uint8_t* from = at;
    at = end - at < bytes ? end : at + bytes;
    return {from, at};
  }
  // Asks for so many bytes more, into the second-level cache.
  LM_ALWAYS void ask(int64_t bytes) {
    for (Ahead now = take(bytes); now.any(); now.at += 64) __builtin_prefetch(now.at, 0, 2);
  }
};

// One thread's own memory.
struct Worker {
  int thread = 0;
  unsigned counter = 0;       // shared counters taken so far, the same number on every thread
  float* row = nullptr;       // one row as wide as the widest value
  uint8_t* records = nullptr; // kPrivateRows activation records
  float* tile = nullptr;      // working set of attention or sampling
  Ahead ahead;                // weights of the next product
};

using OpFunction = void (*)(Frame&, const isa::Instruction&, Worker&);
constexpr int kOpcodes = static_cast<int>(isa::Op::glu) + 1;

// What one SIMD path offers, by opcode.
struct Ops {
  OpFunction run[kOpcodes];  // null where the machine lacks it
  // It neither meets other threads nor uses shared memory: one thread can do it alone.
  bool simple[kOpcodes];
  // Where thread `thread` starts to read weights when rows are few, or null.
  const uint8_t* (*start)(const Frame&, const isa::Instruction&, int thread);
  // Asks for the keys and values that `attend` reads first, and for what `store` will write.
  void (*ask)(const Frame&, const isa::Instruction&, const Worker&);
  void (*ask_to_store)(const Frame&, const isa::Instruction&, const Worker&);
};

// A share [first, last) of n units: thread t of all threads, boundaries at multiples of `grain`.
struct Share {
  int64_t first, last;
};

LM_ALWAYS Share share(const Frame& f, const Worker& w, int64_t n, int64_t grain = 1) {
  const int64_t units = (n + grain - 1) / grain;
  const int64_t a = units * w.thread / f.threads * grain;
  const int64_t b = units * (w.thread + 1) / f.threads * grain;
  return {a < n ? a : n, b < n ? b : n};
}

LM_ALWAYS const SpaceRows& rows_of(const Frame& f, const Value& v) {
  return f.rows[v.space];
}

void barrier(Frame& f);

// The counter of this point of the run: all threads get the same one, starting at zero. There must
// be a barrier between one counter and the next.
Counter& next_counter(Frame& f, Worker& w);

// Floats of working memory of an attention tile of so many queries, for heads of so many elements.
int64_t tile_floats(int64_t queries, int64_t key, int64_t value);

}  // namespace lmclock
