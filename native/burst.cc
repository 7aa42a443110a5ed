// Machine::run_many: several cycles in one call, for sequences that only decode. Between two of
// them nothing is asked of Python, which would find the processor's caches full of weights.

#include <algorithm>

#include "machine.h"

namespace lmclock {

namespace {

bool ends(const Feed& feed, int64_t row, int32_t token) {
  const int32_t *first = feed.stops.data + feed.stop_starts.data[row],
                *last = feed.stops.data + feed.stop_starts.data[row + 1];
  return std::find(first, last, token) != last;
}

[[noreturn]] void refuse(const char* what) { throw Failure{"ProgramError", what}; }

}  // namespace

void Machine::check_feed(int section, const Feed& feed) const {
  const SpaceMemory& tok = spaces_[static_cast<int>(isa::Space::tok)];
  const int64_t rows = static_cast<int64_t>(tok.positions.size());
  const auto one_each = [&](const std::vector<int32_t>& numbers) {
    bool same = static_cast<int64_t>(numbers.size()) == rows;
    for (int64_t r = 0; same && r < rows; ++r) same = numbers[static_cast<size_t>(r)] == r;
    return same;
  };
  if (!bound_ || !one_each(tok.live) || !one_each(tok.owners) || !one_each(pick_))
    refuse("cycles in one call take a bound batch of one picked row for each sequence");
  const Section& s = sections_[static_cast<size_t>(section)];
  const int32_t values = static_cast<int32_t>(s.values.size());
  const auto input = [&](int32_t n) { return n >= -1 && n < inputs_; };
  if (!input(feed.ids) || !input(feed.positions) || feed.next < inputs_ || feed.next >= values ||
      !s.values[static_cast<size_t>(feed.next)].ids)
    refuse("a value to be fed from cycle to cycle does not exist");
  bool bounds = feed.stop_starts.size == rows + 1 && feed.stop_starts.data[0] == 0 &&
                feed.stop_starts.data[rows] == feed.stops.size;
  for (int64_t r = 0; bounds && r < rows; ++r)
    bounds = feed.stop_starts.data[r] <= feed.stop_starts.data[r + 1];
  if (!bounds) refuse("the bounds of the ids that end a sequence do not fit the batch");
}

// The bound batch becomes that of the next cycle: every row one position further.
void Machine::advance(const Feed& feed, const int32_t* tokens) {
  SpaceMemory& tok = spaces_[static_cast<int>(isa::Space::tok)];
  SpaceMemory& pick = spaces_[static_cast<int>(isa::Space::pick)];
  for (std::vector<int32_t>* positions : {&tok.positions, &tok.live_positions, &pick.positions})
    for (int32_t& position : *positions) ++position;
  for (isa::Sampling& s : sampling_) ++s.draw;
  std::fill(holder_.begin(), holder_.end(), -1);
  const auto put = [&](int32_t input, const int32_t* from) {
    if (input < 0) return;
    const Value& v = sections_.front().values[static_cast<size_t>(input)];
    for (size_t r = 0; r < tok.positions.size(); ++r)
      v.ids_row(static_cast<int64_t>(r))[0] = from[r];
    holder_[static_cast<size_t>(v.slot)] = input;
  };
  put(feed.ids, tokens);
  put(feed.positions, tok.positions.data());
  extend_ropes();
}

int64_t Machine::run_many(int section, int64_t most, const Feed& feed, int64_t* stamps,
                          int64_t* bounds, int32_t* tokens, RunFault* fault) {
  check_feed(section, feed);
  const Section& s = sections_[static_cast<size_t>(section)];
  const Value& next = s.values[static_cast<size_t>(feed.next)];
  const int64_t size = static_cast<int64_t>(s.code.size()), rows = feed.stop_starts.size - 1;
  for (int64_t n = 0; n < most; ++n, tokens += rows) {
    if (n) advance(feed, tokens - rows);
    bounds[2 * n] = ticks();
    const RunFault found = run(section, 0, size, stamps + 2 * n * size * team_.size());
    bounds[2 * n + 1] = ticks();
    if (found.fault != Fault::none) {
      // Of a later cycle: it is run again, alone.
      if (n == 0) *fault = found;
      return n;
    }
    commit();
    bool over = false;
    for (int64_t r = 0; r < rows; ++r) {
      tokens[r] = next.ids_row(r)[0];
      over |= ends(feed, r, tokens[r]);
    }
    if (over) return n + 1;
  }
  return most;
}

}  // namespace lmclock
