// Rows of a page as numbers: rounding to a cache format and back.
#pragma once

#include "attention.h"

namespace lmclock::LMCLOCK_PATH {

// Where position `position` of sequence `s` lies: its page and its place there.
struct Place {
  int32_t page;
  int32_t offset;
};
LM_INLINE Place place_of(const State& state, const PageTable& table, int64_t s, int64_t position) {
  const int32_t size = state.layout.page_size;
  return {table.pages[table.starts[s] + position / size], static_cast<int32_t>(position % size)};
}

// One head's key and value row into a page.
void write_key(const PageLayout& l, const float* x, int offset, uint8_t* head);
void write_value(const PageLayout& l, const float* x, int offset, uint8_t* head);

// Positions offset .. offset + count - 1 of a page, as keys (dim, 16) from lane `lane` on, and as
// rows of values.
void read_keys(const PageLayout& l, const uint8_t* head, int offset, int count, int lane,
               float* out);
void read_values(const PageLayout& l, const uint8_t* head, int offset, int count, float* out);

// x as a state of this format holds it.
void round_to(CacheFormat format, const float* x, int64_t count, float* out);

}  // namespace lmclock::LMCLOCK_PATH
