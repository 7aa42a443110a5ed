// Machine::bind: checks a batch and copies it to where opcodes find it. Nothing of it is trusted: a
// wrong number is a Failure here, never a wild read later.

#include <cmath>
#include <cstring>

#include "machine.h"

namespace lmclock {

namespace {

using isa::Space;

std::string text(int64_t n) { return std::to_string(n); }

[[noreturn]] void refuse(const std::string& message) { throw Failure{"ProgramError", message}; }

void check_capacity(const char* what, int64_t count, int64_t most) {
  if (count > most)
    throw Failure{"ContextError", "a batch of " + text(count) + " " + what +
                                      " exceeds the capacity, " + text(most)};
}

// Every number in 0 .. limit - 1.
void check_range(const std::string& what, const int32_t* numbers, int64_t count, int64_t limit) {
  for (int64_t n = 0; n < count; ++n)
    if (numbers[n] < 0 || numbers[n] >= limit)
      refuse(what + " " + text(numbers[n]) + " does not exist; valid: 0 to " + text(limit - 1));
}

template <class T>
void assign(std::vector<T>& to, const Span<T>& from) {
  to.assign(from.data, from.data + from.size);
}

}  // namespace

void Machine::bind(const BatchSource& batch) {
  if (!loaded_) refuse("no program is loaded");
  bound_ = false;
  std::fill(holder_.begin(), holder_.end(), -1);
  for (StateGroup& group : groups_) std::fill(group.written.begin(), group.written.end(), 0);
  frame_.sequences = static_cast<int32_t>(batch.slots.size);
  check_capacity("sequences", batch.slots.size, sequences_capacity());
  check_range("slot", batch.slots.data, batch.slots.size, capacity_.slots);
  assign(slots_, batch.slots);
  frame_.slots = slots_.data();
  bind_space(Space::tok, batch.tok, "tok rows");
  bind_space(Space::src, batch.src, "src rows");
  bind_derived(batch);
  bind_inputs(batch);
  bind_pages(batch);
  bind_sampling(batch);
  extend_ropes();
  bound_ = true;
}

void Machine::bind_space(Space space, const BatchSource::Rows& from, const char* what) {
  SpaceMemory& m = spaces_[static_cast<int>(space)];
  const int64_t count = from.positions.size, sequences = frame_.sequences;
  check_capacity(what, count, capacity_.rows);
  if (from.starts.data) {
    assign(m.starts, from.starts);
    assign(m.positions, from.positions);
    assign(m.valid, from.valid);
  } else {
    m.starts.assign(static_cast<size_t>(sequences) + 1, 0);
    m.positions.clear();
    m.valid.clear();
  }
  const bool fits = static_cast<int64_t>(m.starts.size()) == sequences + 1 && m.starts[0] == 0 &&
                    m.starts.back() == count && static_cast<int64_t>(m.valid.size()) == count &&
                    std::is_sorted(m.starts.begin(), m.starts.end());
  if (!fits)
    refuse("starts of the " + std::string(what) + " do not bound " + text(count) + " rows of " +
           text(sequences) + " sequences");
  m.owners.resize(static_cast<size_t>(count));
  m.live.clear();
  m.live_positions.clear();
  m.live_starts.assign(1, 0);
  for (int64_t s = 0; s < sequences; ++s) {
    const size_t first_row = static_cast<size_t>(m.starts[static_cast<size_t>(s)]);
    const size_t end_row = static_cast<size_t>(m.starts[static_cast<size_t>(s) + 1]);
    for (size_t at = first_row; at < end_row; ++at) {
      m.owners[at] = static_cast<int32_t>(s);
      if (!m.valid[at]) continue;
      const bool first = static_cast<int64_t>(m.live.size()) == m.live_starts.back();
      if (m.positions[at] < 0 || (!first && m.positions[at] < m.live_positions.back()))
        refuse("positions of the " + std::string(what) + " of sequence " + text(s) +
               " must ascend from 0; found " + text(m.positions[at]));
      m.live.push_back(static_cast<int32_t>(at));
      m.live_positions.push_back(m.positions[at]);
    }
    m.live_starts.push_back(static_cast<int32_t>(m.live.size()));
  }
  frame_.rows[static_cast<int>(space)] = {count, m.starts.data(), m.positions.data(),
                                          m.owners.data(), m.valid.data(), m.live.data(),
                                          m.live_positions.data(), m.live_starts.data()};
}

// The spaces that follow from others: pick rows, and one row per sequence.
void Machine::bind_derived(const BatchSource& batch) {
  const SpaceMemory& tok = spaces_[static_cast<int>(Space::tok)];
  const int64_t rows = static_cast<int64_t>(tok.positions.size()), picks = batch.pick.size;
  check_capacity("picked rows", picks, capacity_.picks);
  check_range("picked row", batch.pick.data, picks, rows);
  assign(pick_, batch.pick);
  frame_.pick = pick_.data();
  SpaceMemory& pick = spaces_[static_cast<int>(Space::pick)];
  pick.positions.clear();
  pick.owners.clear();
  pick.valid.clear();
  for (int32_t r : pick_) {
    pick.positions.push_back(tok.positions[static_cast<size_t>(r)]);
    pick.owners.push_back(tok.owners[static_cast<size_t>(r)]);
    pick.valid.push_back(tok.valid[static_cast<size_t>(r)]);
  }
  frame_.rows[static_cast<int>(Space::pick)] = {picks, nullptr, pick.positions.data(),
                                                pick.owners.data(), pick.valid.data(),
                                                nullptr, nullptr, nullptr};
  SpaceMemory& seq = spaces_[static_cast<int>(Space::seq)];
  const size_t sequences = slots_.size();
  seq.positions.assign(sequences, 0);
  seq.valid.assign(sequences, 1);
  seq.owners.resize(sequences);
  seq.starts.resize(sequences + 1);
  for (size_t s = 0; s <= sequences; ++s) seq.starts[s] = static_cast<int32_t>(s);
  for (size_t s = 0; s < sequences; ++s) seq.owners[s] = static_cast<int32_t>(s);
  frame_.rows[static_cast<int>(Space::seq)] = {static_cast<int64_t>(sequences), seq.starts.data(),
                                               seq.positions.data(), seq.owners.data(),
                                               seq.valid.data(), seq.owners.data(),
                                               seq.positions.data(), seq.starts.data()};
}

void Machine::bind_inputs(const BatchSource& batch) {
  if (sections_.empty()) return;
  for (size_t n = 0; n < batch.inputs.size(); ++n) {
    if (!batch.inputs[n].data) continue;
    const Value& v = sections_.front().values[n];
    const int64_t rows = frame_.rows[v.space].count, bytes = 4 * v.width;
    if (batch.inputs[n].size != rows * bytes)
      refuse("input " + text(static_cast<int64_t>(n)) + " must have " + text(rows) + " rows of " +
             text(v.width));
    for (int64_t r = 0; r < rows; ++r)
      std::memcpy(v.row(r), batch.inputs[n].data + r * bytes, static_cast<size_t>(bytes));
    holder_[static_cast<size_t>(v.slot)] = static_cast<int64_t>(n);
  }
}

void Machine::bind_pages(const BatchSource& batch) {
  page_numbers_.clear();
  page_starts_.clear();
  lengths_.clear();
  tables_.assign(groups_.size(), {});
  std::vector<size_t>& first = table_firsts_;
  first.clear();
  for (size_t g = 0; g < groups_.size(); ++g) {
    const StateSource& state = groups_[g].source;
    first.push_back(page_starts_.size());
    if (state.kind == kFixed) continue;
    for (size_t s = 0; s < slots_.size(); ++s) {
      page_starts_.push_back(static_cast<int32_t>(page_numbers_.size()));
      const bool given = g < batch.pages.size() && s < batch.pages[g].size();
      const Span<int32_t> pages = given ? batch.pages[g][s] : Span<int32_t>{};
      check_range("page", pages.data, pages.size, state.pages);
      page_numbers_.insert(page_numbers_.end(), pages.data, pages.data + pages.size);
      int64_t length = 0;
      if (state.kind == kFrozen && g < batch.lengths.size() &&
          static_cast<int64_t>(s) < batch.lengths[g].size)
        length = batch.lengths[g].data[s];
      if (length < 0 || length > pages.size * capacity_.page_size)
        refuse("length " + text(length) + " of sequence " + text(static_cast<int64_t>(s)) +
               " exceeds its " + text(pages.size) + " pages");
      lengths_.push_back(static_cast<int32_t>(length));
    }
    page_starts_.push_back(static_cast<int32_t>(page_numbers_.size()));
    lengths_.push_back(0);
  }
  for (size_t g = 0; g < groups_.size(); ++g)
    if (groups_[g].source.kind != kFixed)
      tables_[g] = {page_numbers_.data(), page_starts_.data() + first[g],
                    lengths_.data() + first[g]};
  frame_.tables = tables_.data();
}

void Machine::bind_sampling(const BatchSource& batch) {
  const int64_t picks = batch.pick.size;
  sampling_.assign(static_cast<size_t>(picks), {});
  const int64_t wanted = picks * static_cast<int64_t>(sizeof(isa::Sampling));
  if (batch.sampling.size != 0 && batch.sampling.size != wanted)
    refuse(text(batch.sampling.size) + " bytes of sampling settings for " + text(picks) + " picks");
  if (batch.sampling.size)
    std::memcpy(sampling_.data(), batch.sampling.data, static_cast<size_t>(wanted));
  samples_given_ = picks == 0 || batch.sampling.size != 0;
  const int64_t records = batch.adjust.size / static_cast<int64_t>(sizeof(isa::Adjust));
  adjust_.resize(static_cast<size_t>(records));
  if (records)
    std::memcpy(adjust_.data(), batch.adjust.data, sizeof(isa::Adjust) * adjust_.size());
  adjust_starts_.assign(static_cast<size_t>(picks) + 1, 0);
  int32_t before = 0;
  for (const isa::Adjust& a : adjust_) {
    if (a.row < before || a.row >= picks)
      refuse("adjust records must be sorted by row, 0 to " + text(picks - 1) + "; found " +
             text(a.row));
    before = a.row;
    ++adjust_starts_[static_cast<size_t>(a.row) + 1];
  }
  for (size_t n = 1; n < adjust_starts_.size(); ++n) adjust_starts_[n] += adjust_starts_[n - 1];
  frame_.sampling = sampling_.data();
  frame_.adjust = adjust_.data();
  frame_.adjust_starts = adjust_starts_.data();
}

// Cosines and sines up to the last position of the batch, a few positions ahead, so that decoding
// computes none most of the time.
void Machine::extend_ropes() {
  constexpr int64_t kAhead = 32;
  if (ropes_.empty()) return;
  int64_t needed = 1;  // rows of space seq stand at position 0
  for (const SpaceMemory& space : spaces_)
    for (int32_t position : space.live_positions) needed = std::max<int64_t>(needed, position + 1);
  bool moved = false;
  for (Rope& rope : ropes_) {
    int64_t known = static_cast<int64_t>(rope.table.size()) / (2 * rope.half);
    if (known >= needed) continue;
    moved = true;
    const int64_t until = (needed + kAhead - 1) / kAhead * kAhead;
    rope.table.resize(static_cast<size_t>(2 * rope.half * until));
    for (; known < until; ++known)
      for (int64_t j = 0; j < rope.half; ++j) {
        const double part = static_cast<double>(j) / static_cast<double>(rope.half);
        const double speed =
            rope.speeds ? static_cast<double>(rope.speeds[j]) : std::pow(rope.base, -part);
        const double angle = static_cast<double>(known) * speed;
        float* at = rope.table.data() + 2 * rope.half * known + j;
        at[0] = static_cast<float>(std::cos(angle) * rope.scale);
        at[rope.half] = static_cast<float>(std::sin(angle) * rope.scale);
      }
  }
  if (!moved) return;
  for (Section& section : sections_)
    for (size_t n = 0; n < section.rope_of.size(); ++n)
      if (section.rope_of[n] >= 0) {
        const Rope& rope = ropes_[static_cast<size_t>(section.rope_of[n])];
        section.ropes[n] = {rope.table.data(), rope.half};
      }
}

}  // namespace lmclock
