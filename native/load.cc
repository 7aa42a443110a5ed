// Machine::load: buffers, states, tables and working memory; the weights are in weights.cc.

#include <algorithm>
#include <cmath>

#include "machine.h"

namespace lmclock {

namespace {

using isa::Op;

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Rows start on cache lines, and not a multiple of 4 KB apart, where they would compete for the
// same cache sets.
int64_t stride_of(const ValueSource& v) {
  if (v.ids) return v.width;
  const int64_t stride = round_up(v.width, 16);
  return stride % 1024 == 0 ? stride + 16 : stride;
}

// Partial results of attention blocks: beyond this, blocks of a tile are not shared out. It holds a
// context of 32k with 8 key heads of 128 and 4 queries each.
constexpr int64_t kPartialFloats = int64_t{4} << 20;

CacheFormat cache_format(int32_t format) {
  switch (static_cast<isa::Format>(format)) {
    case isa::Format::f32: return CacheFormat::f32;
    case isa::Format::f16: return CacheFormat::f16;
    default: return CacheFormat::q8_0;
  }
}

// T5's rule (Raffel et al. 2020, section 2.1): key position minus query position to a bucket. In
// float32 as in the published models, so that distances on the border of two buckets fall alike.
int64_t bucket_of(int64_t distance, int64_t buckets, int64_t most, bool both_ways) {
  int64_t offset = 0, back = std::max<int64_t>(-distance, 0);
  if (both_ways) {
    buckets /= 2;
    if (distance > 0) offset = buckets;
    back = std::abs(distance);
  }
  const int64_t exact = buckets / 2;
  if (back < exact) return offset + back;
  const float whole = static_cast<float>(exact);
  const double span = static_cast<double>(most) / static_cast<double>(exact);
  const float range = static_cast<float>(std::log(span));
  const float ratio = std::log(static_cast<float>(back) / whole) / range;
  const int64_t far = exact + static_cast<int64_t>(ratio * static_cast<float>(buckets - exact));
  return offset + std::min(far, buckets - 1);
}

}  // namespace

int64_t Machine::rows_capacity(int32_t space) const {
  if (space == static_cast<int32_t>(isa::Space::pick)) return capacity_.picks;
  if (space == static_cast<int32_t>(isa::Space::seq)) return sequences_capacity();
  return capacity_.rows;
}

// What a load that fails half-way would leave: states without memory, sections without weights.
void Machine::unload() {
  loaded_ = bound_ = false;
  sections_.clear();
  states_.clear();
  groups_.clear();
  ropes_.clear();
  bias_tables_.clear();
  holder_.clear();
  packed_ = Memory();
  buffers_ = Memory();
}

void Machine::prepare(int64_t bytes) {
  if (!loaded_) prepared_.start(bytes);  // else there would be weights twice
}

void Machine::load(const ProgramSource& source) {
  unload();
  capacity_ = source.capacity;
  inputs_ = source.inputs;
  try {
    load_all(source);
  } catch (const std::bad_alloc&) {
    prepared_.drop();
    unload();
    throw Failure{"ContextError", "the weights, the cache and the buffers of " +
                                      std::to_string(capacity_.rows) +
                                      " rows do not fit into memory"};
  } catch (...) {
    prepared_.drop();
    unload();
    throw;
  }
  loaded_ = true;
}

void Machine::load_all(const ProgramSource& source) {
  load_weights(source);
  load_values(source);
  load_states(source);
  need_ = {};
  need_.record_rows = capacity_.rows;
  for (Section& section : sections_) {
    load_ropes(section);
    load_biases(section);
    for (const isa::Instruction& i : section.code) reserve(section, i);
  }
  load_workers();
  for (size_t n = 0; n < sections_.size(); ++n) load_schedule(static_cast<int>(n));
}

void Machine::load_values(const ProgramSource& source) {
  std::vector<int64_t> floats(static_cast<size_t>(source.slots));
  for (const SectionSource& section : source.sections)
    for (int64_t n = 0; n < section.value_count; ++n) {
      const ValueSource& v = section.values[n];
      int64_t& most = floats[static_cast<size_t>(v.slot)];
      most = std::max(most, rows_capacity(v.space) * stride_of(v));
    }
  std::vector<int64_t> offsets(floats.size());
  int64_t total = 0;
  for (size_t n = 0; n < floats.size(); ++n) {
    offsets[n] = total;
    total += round_up(floats[n], 16) + 16;  // the last vector may be read whole
  }
  buffers_ = Memory();
  buffers_ = Memory(4 * total);
  holder_.assign(floats.size(), -1);
  sections_.assign(source.sections.size(), {});
  for (size_t s = 0; s < sections_.size(); ++s) {
    const SectionSource& from = source.sections[s];
    sections_[s].code.assign(from.code, from.code + from.instructions);
    for (int64_t n = 0; n < from.value_count; ++n) {
      const ValueSource& v = from.values[n];
      float* data = buffers_.as<float>() + offsets[static_cast<size_t>(v.slot)];
      sections_[s].values.push_back({data, stride_of(v), v.width, v.space, v.slot, v.ids != 0});
    }
  }
}

void Machine::load_states(const ProgramSource& source) {
  groups_.clear();
  states_.clear();
  for (const StateSource& from : source.states) {
    StateGroup& group = groups_.emplace_back();
    group.source = from;
    group.first = static_cast<int>(states_.size());
    State state;
    state.declared = static_cast<int32_t>(groups_.size()) - 1;
    state.frozen = from.kind == kFrozen;
    state.width = from.width;
    state.layout = PageLayout::of(cache_format(from.format), from.heads, from.key, from.value,
                                  static_cast<int>(capacity_.page_size));
    const int64_t slots = capacity_.slots;
    if (from.kind == kFixed) {
      group.memory = Memory(4 * slots * from.count * from.width);
      group.next = Memory(4 * slots * from.count * from.width);
      group.written.assign(static_cast<size_t>(slots * from.count), 0);
    } else {
      state.page_stride = state.layout.layer_bytes * from.count;
      group.memory = Memory(state.page_stride * from.pages);
    }
    for (int32_t n = 0; n < from.count; ++n) {
      State one = state;
      if (from.kind == kFixed) {
        one.current = group.memory.as<float>() + n * slots * from.width;
        one.next = group.next.as<float>() + n * slots * from.width;
        one.written = group.written.data() + n * slots;
      } else {
        one.base = group.memory.data() + n * state.layout.layer_bytes;
      }
      states_.push_back(one);
    }
  }
}

void Machine::load_ropes(Section& section) {
  section.rope_of.assign(section.code.size(), -1);
  section.ropes.assign(section.code.size(), {});
  for (size_t n = 0; n < section.code.size(); ++n) {
    const isa::Instruction& i = section.code[n];
    if (static_cast<Op>(i.op) != Op::rope) continue;
    const int64_t head = section.values[static_cast<size_t>(i.ins[0])].width / i.heads;
    const Rope rope = {i.base, i.scale, (i.dims ? i.dims : head) / 2,
                       i.freqs < 0 ? nullptr : weights_[static_cast<size_t>(i.freqs)].vector, {}};
    const auto same = [&](const Rope& r) {
      return r.base == rope.base && r.scale == rope.scale && r.half == rope.half &&
             r.speeds == rope.speeds;
    };
    auto at = std::find_if(ropes_.begin(), ropes_.end(), same);
    if (at == ropes_.end()) at = ropes_.insert(at, rope);
    section.rope_of[n] = static_cast<int>(at - ropes_.begin());
  }
}

void Machine::load_biases(Section& section) {
  section.biases.assign(section.code.size(), {});
  for (size_t n = 0; n < section.code.size(); ++n) {
    const isa::Instruction& i = section.code[n];
    if (static_cast<Op>(i.op) != Op::attend || i.rel_bias < 0) continue;
    const WeightView& w = weights_[static_cast<size_t>(i.rel_bias)];
    const int64_t span = i.max_distance;
    const bool both_ways = i.mask == static_cast<int32_t>(isa::Mask::full);
    std::vector<float> table;
    for (int64_t head = 0; head < w.width; ++head)
      for (int64_t distance = -span; distance <= span; ++distance)
        table.push_back(w.vector[bucket_of(distance, w.rows, span, both_ways) * w.width + head]);
    bias_tables_.push_back(std::move(table));
    section.biases[n] = {bias_tables_.back().data(), i.max_distance};
  }
}

// Elements of a row below which meeting at a barrier costs more than doing all of them.
constexpr int64_t kAloneElements = 4096;
// The same for `store`, whose elements lie in a cache line for every two.
constexpr int64_t kAloneStored = 512;

void Machine::load_schedule(int number) {
  Section& s = sections_[static_cast<size_t>(number)];
  frame_.weights = weights_.data();
  for (const isa::Instruction& i : s.code) {
    const Value& x = s.values[static_cast<size_t>(i.ins[0])];
    const Value& y = i.outs[0] < 0 ? x : s.values[static_cast<size_t>(i.outs[0])];
    const bool stores = static_cast<Op>(i.op) == Op::store;
    const int64_t elements = stores ? kAloneStored : kAloneElements;
    const int32_t rows = static_cast<int32_t>(elements / std::max(x.width, y.width));
    s.alone.push_back({x.space, ops_->simple[i.op] ? rows : -1});
  }
  s.stores.assign(s.code.size(), -1);
  for (size_t n = 0; n < s.code.size(); ++n) {
    if (static_cast<Op>(s.code[n].op) != Op::store) continue;
    size_t before = n;  // the last instruction that all threads work on
    while (before > 0 && ops_->simple[s.code[before - 1].op]) --before;
    if (before > 0) s.stores[before - 1] = static_cast<int32_t>(n);
  }
  for (int thread = 0; thread < team_.size(); ++thread)
    for (const isa::Instruction& i : s.code) s.starts.push_back(ops_->start(frame_, i, thread));
  find_whole(number);
}

// What a run of the whole section needs and leaves; see Section.
void Machine::find_whole(int number) {
  Section& s = sections_[static_cast<size_t>(number)];
  std::vector<int64_t> held(holder_.size(), -1);
  std::vector<std::pair<int32_t, int32_t>> seen;  // declared state, row space
  s.whole = true;
  for (size_t n = 0; n < s.code.size(); ++n) {
    const isa::Instruction& i = s.code[n];
    const auto value = [&](int32_t v) -> const Value& { return s.values[static_cast<size_t>(v)]; };
    for (int32_t v : {i.ins[0], i.ins[1], i.ins[2], i.add}) {
      if (v < 0) continue;
      if (v >= inputs_) {
        s.whole &= held[static_cast<size_t>(value(v).slot)] == holder_of(number, v);
      } else if (std::find(s.needs.begin(), s.needs.end(), v) == s.needs.end()) {
        s.needs.push_back(v);
      }
    }
    for (int32_t v : i.outs)
      if (v >= 0) held[static_cast<size_t>(value(v).slot)] = holder_of(number, v);
    s.samples |= static_cast<Op>(i.op) == Op::sample;
    if (i.state < 0) continue;
    const int32_t declared = states_[static_cast<size_t>(i.state)].declared;
    // A store is checked for frozen states too, so it stands for an attend, not the other way.
    const bool stores = static_cast<Op>(i.op) == Op::store;
    const std::pair<int32_t, int32_t> use = {2 * declared + stores, value(i.ins[0]).space};
    if (std::find(seen.begin(), seen.end(), use) != seen.end()) continue;
    seen.push_back(use);
    s.state_uses.push_back(static_cast<int32_t>(n));
  }
  for (size_t slot = 0; slot < held.size(); ++slot)
    if (held[slot] >= 0) s.holds.push_back({static_cast<int32_t>(slot), held[slot]});
}

// Raises `need_` to what instruction i may ask for.
void Machine::reserve(const Section& section, const isa::Instruction& i) {
  const auto value = [&](int32_t n) -> const Value& {
    return section.values[static_cast<size_t>(n)];
  };
  const auto shared = [&](int64_t floats) { need_.shared = std::max(need_.shared, floats); };
  for (const Value& v : section.values) need_.row = std::max<int64_t>(need_.row, v.width);
  const auto record = [&](int64_t width) {
    for (Act act : {Act::none, Act::q8_32, Act::bf16})
      need_.record = std::max(need_.record, round_up(act_row_bytes(act, width), kAlign));
  };
  const int64_t rows = capacity_.rows, sequences = sequences_capacity();
  if (i.ins[0] >= 0) record(value(i.ins[0]).width);
  switch (static_cast<Op>(i.op)) {
    case Op::attend: {
      const int64_t kv_heads = i.kv_heads ? i.kv_heads : i.heads, group = i.heads / kv_heads;
      const int64_t key = value(i.ins[0]).width / i.heads, v = value(i.outs[0]).width / i.heads;
      const int64_t queries = std::max(group, kTileQueries / group * group);
      const int64_t tiles = i.act == static_cast<int32_t>(isa::Act::bf16) ? kTogether : 1;
      need_.tile = std::max(need_.tile, tiles * tile_floats(queries, key, v));
      const int64_t groups = rows / kGroup + sequences + 2;
      const int64_t plain = groups * kGroup * kv_heads * (key + round_up(v, 16));
      shared((i.state < 0 ? plain : 0) + kPartialFloats);
      break;
    }
    case Op::lstm: {
      const int64_t hidden = value(i.outs[0]).width, gates = round_up(4 * hidden, 16);
      record(hidden);
      need_.record_rows = std::max(need_.record_rows, sequences);
      shared(rows * gates + sequences * (gates + 2 * hidden));
      break;
    }
    case Op::route: shared(rows * round_up(i.experts, 16)); break;
    case Op::experts: {
      const int64_t pairs = rows * value(i.ins[1]).width;
      const int64_t hidden = weights_[static_cast<size_t>(i.weights[0])].rows / i.experts;
      const int64_t width = value(i.outs[0]).width;
      record(hidden);
      need_.record_rows = std::max(need_.record_rows, pairs);
      shared(pairs * (round_up(hidden, 16) + round_up(width, 16) + 2) + i.experts + 1);
      break;
    }
    case Op::sample: {
      const int64_t chunks = value(i.ins[0]).width / kChunk + 1;
      shared(3 * capacity_.picks * chunks + 4);
      break;
    }
    default: break;
  }
}

void Machine::load_workers() {
  shared_ = Memory();
  records_ = Memory();
  shared_ = Memory(4 * need_.shared + 64);
  records_ = Memory(need_.record * need_.record_rows + 64);
  frame_.shared = shared_.as<float>();
  frame_.shared_floats = need_.shared;
  frame_.records = records_.data();
  samplers_.clear();
  samplers_.resize(static_cast<size_t>(capacity_.picks));
  frame_.samplers = samplers_.data();
  const int64_t row = round_up(4 * need_.row + 64, 64), records = need_.record * kPrivateRows;
  for (int t = 0; t < team_.size(); ++t) {
    Private& own = workers_[static_cast<size_t>(t)];
    own.memory = Memory(row + records + 4 * need_.tile + 64);
    own.worker.thread = t;
    own.worker.row = own.memory.as<float>();
    own.worker.records = own.memory.data() + row;
    own.worker.tile = reinterpret_cast<float*>(own.memory.data() + row + records);
  }
}

}  // namespace lmclock
