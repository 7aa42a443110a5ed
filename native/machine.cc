// The native machine's runs: what is live, the interpreter on all threads, states. load and bind
// are in files of their own.

#include "machine.h"

#include <cstring>

namespace lmclock {

namespace scalar { extern const Ops kOps; }
#if defined(LMCLOCK_X86)
namespace avx2 { extern const Ops kOps; }
namespace avx512 { extern const Ops kOps; }
#endif
#if defined(LMCLOCK_NEON)
namespace neon { extern const Ops kOps; }
namespace neon_i8mm { extern const Ops kOps; }
#endif

namespace {

// The op families of a kernel table's path; amx is avx512 with other kernels for products.
const Ops* ops_of(const Kernels& kernels) {
  const std::string name = kernels.name;
#if defined(LMCLOCK_X86)
  if (name == "avx2") return &avx2::kOps;
  if (name == "avx512" || name == "amx" || name == "amx_emulated") return &avx512::kOps;
#endif
#if defined(LMCLOCK_NEON)
  if (name == "neon") return &neon::kOps;
  if (name == "neon_i8mm") return &neon_i8mm::kOps;
#endif
  return &scalar::kOps;
}

}  // namespace

void barrier(Frame& f) { f.team->barrier(); }

Counter& next_counter(Frame& f, Worker& w) {
  const unsigned n = w.counter++;
  // No thread is nearer to the counter half a round ahead than a barrier, so it can be made ready
  // for its next use.
  f.counters[(n + kCounters / 2) % kCounters].value.store(0, std::memory_order_relaxed);
  return f.counters[n % kCounters];
}

void FaultBox::raise(Fault what, const isa::Instruction& i, int64_t offending, int64_t most) {
  if (set.exchange(1) == 0) fault = what, at = &i, value = offending, limit = most;
}

int64_t tile_floats(int64_t queries, int64_t key, int64_t value) {
  const int64_t q = (queries + 15) / 16 * 16, v = (value + 15) / 16 * 16;
  // turned, scores, keys and values, factors, two partial results, what each query sees and where
  // it stands
  return q * key + q * kPositions + kPositions * (key + v) + 2 * q + 2 * (2 * q + q * v) + 6 * q;
}

Machine::Machine(int threads, const Kernels* kernels)
    : team_(threads),
      ops_(ops_of(*kernels)),
      counters_(kCounters),
      merges_(kMerges),
      workers_(static_cast<size_t>(threads)) {
  frame_.kernels = kernels;
  frame_.team = &team_;
  frame_.threads = threads;
  frame_.counters = counters_.data();
  frame_.merges = merges_.data();
  frame_.fault = &fault_;
}

bool Machine::has(const Kernels& kernels, int opcode) {
  return opcode >= 0 && opcode < kOpcodes && ops_of(kernels)->run[opcode] != nullptr;
}

// Pages for every position that the rows of a state's instruction reach.
void Machine::check_state(const Section& s, const isa::Instruction& i) {
  const State& state = states_[static_cast<size_t>(i.state)];
  const StateGroup& group = groups_[static_cast<size_t>(state.declared)];
  const bool stores = static_cast<isa::Op>(i.op) == isa::Op::store;
  if (group.source.kind == kFixed || (state.frozen && !stores)) return;
  const SpaceRows& rows = frame_.rows[s.values[static_cast<size_t>(i.ins[0])].space];
  const PageTable& table = frame_.tables[state.declared];
  for (int64_t q = 0; q < frame_.sequences && rows.live_starts; ++q) {
    const int32_t end = rows.live_starts[q + 1];
    if (end == rows.live_starts[q]) continue;
    const int64_t page = rows.live_positions[end - 1] / capacity_.page_size;
    const int64_t pages = table.starts[q + 1] - table.starts[q];
    if (page >= pages)
      throw Failure{"ProgramError",
                    "sequence " + std::to_string(q) + " reaches page " + std::to_string(page) +
                        " of its positions, but the batch gives it " + std::to_string(pages) +
                        " pages"};
  }
}

namespace {

const Failure kNoSampling = {"ProgramError",
                             "the batch brings no sampling settings for its picked rows"};

}  // namespace

// Every value that instructions first .. last - 1 read must be in its buffer when its turn comes.
void Machine::check_span(int section, int64_t first, int64_t last) {
  const Section& s = sections_[static_cast<size_t>(section)];
  held_ = holder_;
  for (int64_t n = first; n < last; ++n) {
    const isa::Instruction& i = s.code[static_cast<size_t>(n)];
    if (i.state >= 0) check_state(s, i);
    if (static_cast<isa::Op>(i.op) == isa::Op::sample && !samples_given_) throw kNoSampling;
    const auto holder = [&](int32_t value) -> int64_t& {
      return held_[static_cast<size_t>(s.values[static_cast<size_t>(value)].slot)];
    };
    for (int32_t value : {i.ins[0], i.ins[1], i.ins[2], i.add})
      if (value >= 0 && holder(value) != holder_of(section, value)) throw NotLive{value};
    for (int32_t value : i.outs)
      if (value >= 0) holder(value) = holder_of(section, value);
  }
  holder_.swap(held_);
}

// The same for all instructions, by what load has found out: every cycle asks for this.
void Machine::check_whole(int section) {
  const Section& s = sections_[static_cast<size_t>(section)];
  for (int32_t value : s.needs)
    if (holder_[static_cast<size_t>(s.values[static_cast<size_t>(value)].slot)] != value)
      throw NotLive{value};
  for (int32_t n : s.state_uses) check_state(s, s.code[static_cast<size_t>(n)]);
  if (s.samples && !samples_given_) throw kNoSampling;
  for (const auto& [slot, holder] : s.holds) holder_[static_cast<size_t>(slot)] = holder;
}

namespace {

// Rows up to which memory to be stored to is asked for ahead: more would not stay in the
// second-level cache beside the weights.
constexpr int64_t kAskedRows = 16;

template <bool kClocked>
inline void stamp(int64_t& at) {
  if constexpr (kClocked) at = ticks();
}

// Weights of the next product that a thread may ask for before it comes to it: what two threads
// read in the time of a short `attend`. 32 and 128 KB are as good; a short list of lines at a time,
// so that a thread that waits notices soon that it need not.
constexpr int64_t kAheadBytes = 65536, kAskedAtOnce = 256;

// The weights that the first product from instruction n on starts with.
Ahead weights_ahead(const uint8_t* const* starts, int64_t n, int64_t last) {
  while (n + 1 < last && !starts[n]) ++n;
  return {starts[n], starts[n] ? starts[n] + kAheadBytes : nullptr};
}

}  // namespace

bool Machine::little(const Section& s, int64_t n) const {
  const Alone& a = s.alone[static_cast<size_t>(n)];
  return frame_.rows[a.space].count <= a.rows;
}

bool Machine::few(const Section& s, int32_t store) const {
  const Value& keys = s.values[static_cast<size_t>(s.code[static_cast<size_t>(store)].ins[0])];
  return frame_.rows[keys.space].count <= kAskedRows;
}

// One thread's part of a run. Instructions of little work between two shared ones are done by the
// thread that comes last to the barrier, so that they cost no barrier of their own.
template <bool kClocked>
void Machine::interpret(const Section& s, int64_t first, int64_t last, int thread,
                        int64_t* stamps) {
  Worker& worker = workers_[static_cast<size_t>(thread)].worker;
  worker.ahead = {};  // the run before may have left weights that are gone
  Frame alone = frame_;
  alone.threads = 1;
  Worker single = worker;
  single.thread = 0;
  const isa::Instruction* code = s.code.data();
  const uint8_t* const* starts = s.starts.data() + thread * static_cast<int64_t>(s.code.size());
  const auto do_alone = [&](int64_t from, int64_t to) {
    int64_t* at = stamps + 2 * (from - first);
    if (from < to) stamp<kClocked>(at[0]);
    // Each thread has asked for its part, but all of it is this one's to write.
    for (int64_t n = from; n < to; ++n)
      if (static_cast<isa::Op>(code[n].op) == isa::Op::store)
        ops_->ask_to_store(alone, code[n], single);
    for (int64_t n = from; n < to; ++n, at += 2) {
      ops_->run[code[n].op](alone, code[n], single);
      stamp<kClocked>(at[1]);
      if (kClocked && n + 1 < to) at[2] = at[1];  // one tick ends it and begins the next
    }
  };
  const auto skip = [&](int64_t from, int64_t to) {
    while (to < last && little(s, to)) ++to;
    return to > from ? to : from;
  };
  int64_t n = skip(first, first);
  if (n > first) {
    for (int64_t k = 0; k < 2 * (n - first); ++k) stamp<kClocked>(stamps[k]);
    if (thread == 0) do_alone(first, n);
    team_.barrier();
  }
  // An instruction begins, on all threads, with the last tick of who let them go on.
  int64_t begin = kClocked ? ticks() : 0;
  while (n < last) {
    int64_t* at = stamps + 2 * (n - first);
    if (kClocked) at[0] = begin;
    if (const int32_t store = s.stores[static_cast<size_t>(n)]; store >= 0 && few(s, store))
      ops_->ask_to_store(frame_, code[store], worker);
    ops_->run[code[n].op](frame_, code[n], worker);
    const int64_t next = skip(n + 1, n + 1);
    // Once a thread has come to the barrier: on Golden Cove a tick that follows loads takes 50 to 80
    // ns and not 10, and before the barrier the others would wait for it (1.5 % of a decode cycle).
    const auto done = [&] {
      stamp<kClocked>(at[1]);
      // Who does them stamps them again.
      for (int64_t k = 2; kClocked && k < 2 * (next - n); ++k) at[k] = at[1];
    };
    if (n + 1 == last) return done();
    if (next < last) {
      Ahead{reinterpret_cast<const uint8_t*>(code + next),
            reinterpret_cast<const uint8_t*>(code + next + 1)}.ask(sizeof(isa::Instruction));
      worker.ahead = weights_ahead(starts, next, last);
      if (starts[next]) worker.ahead.ask(kStreamAhead);
    }
    begin = team_.barrier(
        [&] {
          done();
          do_alone(n + 1, next);
          return kClocked ? at[2 * (next - n) - 1] : 0;
        },
        [&](auto&& waiting) {
          done();
          if (next < last && static_cast<isa::Op>(code[next].op) == isa::Op::attend)
            ops_->ask(frame_, code[next], worker);
          while (worker.ahead.any() && waiting()) worker.ahead.ask(kAskedAtOnce);
        });
    n = next;
  }
}

RunFault Machine::run(int section, int64_t first, int64_t last, int64_t* stamps) {
  if (!bound_) throw Failure{"ProgramError", "no batch is bound"};
  Section& s = sections_[static_cast<size_t>(section)];
  const int64_t size = static_cast<int64_t>(s.code.size());
  if (first == 0 && last == size && s.whole) check_whole(section);
  else check_span(section, first, last);
  frame_.program = s.code.data();
  frame_.values = s.values.data();
  frame_.weights = weights_.data();
  frame_.states = states_.data();
  frame_.ropes = s.ropes.data();
  frame_.biases = s.biases.data();
  fault_.set.store(0);
  fault_.fault = Fault::none;
  const bool there = team_.run([&](int thread) {
    // Each thread fills its own part of the caller's table: lines that two of them write to would
    // travel between their caches, and to put the parts together afterwards costs more than ticks.
    int64_t* own = stamps + 2 * thread * (last - first);
#if LMCLOCK_UNCLOCKED
    if (!clocked) return interpret<false>(s, first, last, thread, own);
#endif
    interpret<true>(s, first, last, thread, own);
  });
  if (!there)
    throw Failure{"LmclockError",
                  "this machine belongs to the process before fork; make a new one"};
  return {fault_.fault, fault_.fault == Fault::none ? 0 : fault_.at - s.code.data(), fault_.value,
          fault_.limit};
}

void Machine::commit() {
  for (StateGroup& group : groups_) {
    if (group.source.kind != kFixed) continue;
    const size_t width = static_cast<size_t>(group.source.width);
    float *now = group.memory.as<float>(), *next = group.next.as<float>();
    for (size_t slot = 0; slot < group.written.size(); ++slot) {
      if (!group.written[slot]) continue;
      std::memcpy(now + slot * width, next + slot * width, 4 * width);
      group.written[slot] = 0;
    }
  }
}

void Machine::copy(int state, const int32_t* pairs, int64_t count) {
  StateGroup& group = groups_[static_cast<size_t>(state)];
  const StateSource& source = group.source;
  const bool fixed = source.kind == kFixed;
  const int64_t limit = fixed ? capacity_.slots : source.pages;
  for (int64_t n = 0; n < 2 * count; ++n)
    if (pairs[n] < 0 || pairs[n] >= limit)
      throw Failure{"ProgramError", (fixed ? "slot " : "page ") + std::to_string(pairs[n]) +
                                        " does not exist; valid: 0 to " +
                                        std::to_string(limit - 1)};
  for (int64_t n = 0; n < count; ++n) {
    const int64_t from = pairs[2 * n], to = pairs[2 * n + 1];
    if (!fixed) {
      const int64_t bytes = states_[static_cast<size_t>(group.first)].page_stride;
      std::memmove(group.memory.data() + to * bytes, group.memory.data() + from * bytes,
                   static_cast<size_t>(bytes));
      continue;
    }
    const int64_t bytes = 4 * source.width;
    for (int64_t one = 0; one < source.count; ++one) {
      uint8_t* base = group.memory.data() + one * capacity_.slots * bytes;
      std::memmove(base + to * bytes, base + from * bytes, static_cast<size_t>(bytes));
    }
  }
}

Machine::View Machine::view(int section, int value) const {
  if (!bound_) return {};
  const Value& v = sections_[static_cast<size_t>(section)].values[static_cast<size_t>(value)];
  if (holder_[static_cast<size_t>(v.slot)] != holder_of(section, value)) return {};
  return {v.data, frame_.rows[v.space].count, v.width, v.stride, v.ids};
}

}  // namespace lmclock
