// The native machine: a loaded program, its buffers and states, and one call per run.
//
// Everything an opcode needs is laid out at load and bind; a run interprets encoded instructions on
// all threads of the team, with a barrier after each and a time stamp before and after each
// thread's share.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "frame.h"
#include "memory.h"
#include "prepared.h"
#include "sampler.h"

namespace lmclock {

// Becomes the exception of lmclock/errors.py called `kind`.
struct Failure {
  const char* kind;
  std::string message;
};

struct WeightSource {
  std::string name;
  int32_t format = -1;  // isa::Format
  int64_t rows = 0, width = 0;
  int64_t row_bytes = 0;
  const uint8_t* data = nullptr;  // stored rows
  const float* vector = nullptr;  // f32 content, where an instruction reads it as a vector
  bool mapped = false;            // data lies in a shared read-only map of a file
};

struct ValueSource {
  int32_t space, width, ids, slot;  // slot: the buffer; shared with every value of the same number
};

struct SectionSource {
  const isa::Instruction* code = nullptr;
  int64_t instructions = 0;
  const ValueSource* values = nullptr;
  int64_t value_count = 0;
};

constexpr int32_t kPaged = 0, kFixed = 1, kFrozen = 2;  // kinds of states, as program.STATE_KINDS

struct StateSource {
  int32_t kind;
  int32_t count, heads, key, value, width, format, pages;
};

struct Capacity {
  int64_t rows, picks, slots, page_size;
};

struct ProgramSource {
  std::vector<WeightSource> weights;
  std::vector<SectionSource> sections;
  std::vector<StateSource> states;
  int64_t inputs = 0;  // the first values of every section
  int64_t slots = 0;   // buffers
  Capacity capacity{};
};

template <class T>
struct Span {
  const T* data = nullptr;
  int64_t size = 0;
};

// One batch as it comes from Python; everything is checked and copied by bind.
struct BatchSource {
  struct Rows {
    Span<int32_t> starts, positions;
    Span<uint8_t> valid;
  };
  Rows tok, src;
  std::vector<Span<uint8_t>> inputs;               // by input; no data: not given
  Span<int32_t> slots, pick;
  std::vector<std::vector<Span<int32_t>>> pages;   // by state declaration, by sequence
  std::vector<Span<int32_t>> lengths;              // by state declaration
  Span<uint8_t> sampling, adjust;                  // records
};

// A value that an instruction reads is not in its buffer.
struct NotLive {
  int32_t value;
};

// What follows from one cycle for the next when each sequence has one row: values of the section.
struct Feed {
  int32_t ids = -1, positions = -1;  // inputs that take the new tokens and their positions, or -1
  int32_t next = -1;                 // the tokens sampled
  Span<int32_t> stops, stop_starts;  // ids that end a sequence; bounds of each one's (rows + 1)
};

// A fault of the last run, or none.
struct RunFault {
  Fault fault;
  int64_t instruction, value, limit;
};

class Machine {
 public:
  Machine(int threads, const Kernels* kernels);

  int threads() const { return team_.size(); }
  const char* path() const { return frame_.kernels->name; }

  // Whether this build has a function for the opcode.
  static bool has(const Kernels& kernels, int opcode);

  // Failure names a tensor whose scales are not finite; then, or without memory, nothing is loaded.
  void load(const ProgramSource& source);
  // Weights of about so many bytes are to be loaded: their memory is made ready meanwhile.
  void prepare(int64_t bytes);
  void bind(const BatchSource& batch);
  // Stamps: [thread][instruction][begin, end] for instructions first .. last - 1.
  RunFault run(int section, int64_t first, int64_t last, int64_t* stamps);
  // At most `most` whole cycles of the bound batch, each fed by the one before and committed, and
  // no further than the first in which a sequence ends. Stamps as of `run`, `bounds` begin and end
  // of each run, `tokens` (most, rows). Gives how many are done; a fault only of the first.
  int64_t run_many(int section, int64_t most, const Feed& feed, int64_t* stamps, int64_t* bounds,
                   int32_t* tokens, RunFault* fault);
  void commit();
  void copy(int state, const int32_t* pairs, int64_t count);

  // Rows and memory of a value while its buffer holds it; no data otherwise.
  struct View {
    float* data;
    int64_t rows, width, stride;
    bool ids;
  };
  View view(int section, int value) const;

#if LMCLOCK_UNCLOCKED
  bool clocked = true;  // false: runs take no stamps, and leave the tables as they are
#endif

 private:
  // Up to `rows` rows of `space` are too little work to be shared out.
  struct Alone {
    int32_t space, rows;
  };
  struct Section {
    std::vector<isa::Instruction> code;
    std::vector<Value> values;
    std::vector<RopeTable> ropes;
    std::vector<int> rope_of;  // by instruction, -1: none
    std::vector<Bias> biases;
    std::vector<Alone> alone;  // by instruction
    std::vector<const uint8_t*> starts;  // by thread and instruction: first weights read, or null
    std::vector<int32_t> stores;  // by instruction: the `store` that soon follows it, or -1
    // A run of all instructions: what must be there before, and what the buffers hold after.
    bool whole = false;  // no instruction reads a value whose buffer another one has taken
    bool samples = false;
    std::vector<int32_t> needs;      // inputs
    std::vector<int32_t> state_uses; // instructions, one for each declared state and row space
    std::vector<std::pair<int32_t, int64_t>> holds;  // slot, holder
  };
  struct Rope {
    double base, scale;
    int64_t half;
    const float* speeds;  // explicit inverse frequencies, or null
    std::vector<float> table;
  };
  struct StateGroup {
    StateSource source;
    int first;  // running number of its first state
    Memory memory, next;
    std::vector<uint8_t> written;
  };
  struct SpaceMemory {
    std::vector<int32_t> starts, positions, owners, live, live_positions, live_starts;
    std::vector<uint8_t> valid;
  };

  void unload();
  void load_all(const ProgramSource& source);
  void load_weights(const ProgramSource& source);
  void load_values(const ProgramSource& source);
  void load_states(const ProgramSource& source);
  void load_ropes(Section& section);
  void load_biases(Section& section);
  void load_workers();
  void load_schedule(int number);
  void find_whole(int number);
  void reserve(const Section& section, const isa::Instruction& i);
  void bind_space(isa::Space space, const BatchSource::Rows& rows, const char* what);
  void bind_derived(const BatchSource& batch);
  void bind_inputs(const BatchSource& batch);
  void bind_pages(const BatchSource& batch);
  void bind_sampling(const BatchSource& batch);
  void extend_ropes();
  void check_feed(int section, const Feed& feed) const;
  void advance(const Feed& feed, const int32_t* tokens);
  template <bool kClocked>
  void interpret(const Section& section, int64_t first, int64_t last, int thread, int64_t* stamps);
  // Whether an instruction is too little work to be shared out, and whether a `store` is of so few
  // rows that its memory is worth asking for ahead.
  bool little(const Section& section, int64_t instruction) const;
  bool few(const Section& section, int32_t store) const;
  void check_state(const Section& section, const isa::Instruction& i);
  // What `value` of a section is called in holder_.
  int64_t holder_of(int section, int32_t value) const {
    return value < inputs_ ? value : (int64_t{section} + 1) << 32 | value;
  }
  void check_span(int section, int64_t first, int64_t last);
  void check_whole(int section);
  int64_t rows_capacity(int32_t space) const;
  // Sequences that read no fixed state need no slot of their own.
  int64_t sequences_capacity() const { return std::max(capacity_.rows, capacity_.slots); }

  Team team_;
  Frame frame_;
  FaultBox fault_;
  const Ops* ops_ = nullptr;
  Capacity capacity_{};
  std::vector<Section> sections_;
  std::vector<WeightView> weights_;
  std::vector<std::vector<Matrix>> parts_;
  std::vector<std::vector<float>> vectors_;
  Memory packed_, buffers_, shared_, records_;
  Prepared prepared_;  // what packed_ will be
  // By slot, the value it holds: an input's number, or section + 1 << 32 | value; -1 for none.
  std::vector<int64_t> holder_, held_;
  std::vector<StateGroup> groups_;
  std::vector<State> states_;
  std::vector<Rope> ropes_;
  std::vector<std::vector<float>> bias_tables_;
  std::vector<Counter> counters_;
  std::vector<std::atomic<int32_t>> merges_;
  std::vector<Sampler> samplers_;
  // On cache lines of its own: a thread that waits writes to its worker while others read theirs.
  struct alignas(64) Private {
    Memory memory;
    Worker worker;
  };
  std::vector<Private> workers_;
  int64_t inputs_ = 0;
  struct Need {  // working memory: floats, but bytes of a record
    int64_t tile = 16, row = 16, shared = 16, record = kAlign, record_rows = 1;
  } need_;

  bool loaded_ = false, bound_ = false, samples_given_ = false;
  SpaceMemory spaces_[4];
  std::vector<int32_t> slots_, pick_, page_numbers_, page_starts_, lengths_;
  std::vector<size_t> table_firsts_;
  std::vector<PageTable> tables_;
  std::vector<isa::Sampling> sampling_;
  std::vector<isa::Adjust> adjust_;
  std::vector<int32_t> adjust_starts_;
};

}  // namespace lmclock
