// How attention states lie in memory: pages of all layers, keys transposed in groups of 16
// positions.
//
// A page holds `page_size` positions of every layer of one declared state, layer after layer, so
// that the first page of a short sequence touches little memory and copying a page is one memcpy.
// Within a layer, for each head:
//
//   keys    per group of 16 positions: dim x 16, one vector of 16 positions after the other (q8_0:
//           codes, then dim / 32 x 16 scales). A score is a sum over dims, lane by lane, in the
//           same order for one row or many.
//   values  one row per position, padded to 16 elements (q8_0: codes, then dim / 32 scales)
#pragma once

#include <cstdint>

namespace lmclock {

constexpr int kGroup = 16;       // positions side by side in one vector of keys
constexpr int kScaleBlock = 32;  // elements that share a scale in q8_0

enum class CacheFormat : uint8_t { f32, f16, q8_0 };

struct PageLayout {
  CacheFormat format = CacheFormat::f32;
  int32_t heads = 0, key = 0, value = 0, page_size = 0;
  int32_t group_bytes = 0;  // keys of 16 positions of one head
  int32_t row_bytes = 0;    // values of one position of one head
  int64_t values_at = 0;    // offset of a head's values from its keys
  int64_t head_bytes = 0;
  int64_t layer_bytes = 0;

  static PageLayout of(CacheFormat format, int heads, int key, int value, int page_size) {
    PageLayout l{format, heads, key, value, page_size};
    const int64_t groups = (page_size + kGroup - 1) / kGroup;
    const int padded = (value + kGroup - 1) / kGroup * kGroup;
    switch (format) {
      case CacheFormat::f32: l.group_bytes = key * kGroup * 4, l.row_bytes = padded * 4; break;
      case CacheFormat::f16: l.group_bytes = key * kGroup * 2, l.row_bytes = padded * 2; break;
      case CacheFormat::q8_0:
        l.group_bytes = key * kGroup + key / kScaleBlock * kGroup * 2;
        l.row_bytes = value + value / kScaleBlock * 2;
        break;
    }
    l.values_at = (groups * l.group_bytes + 63) / 64 * 64;
    l.head_bytes = (l.values_at + groups * kGroup * l.row_bytes + 63) / 64 * 64;
    l.layer_bytes = l.head_bytes * heads;
    return l;
  }
};

// One layer of a paged or frozen state, or one fixed state, as an instruction names it.
struct State {
  int32_t declared = 0;   // index of its declaration, which pages and lengths go by
  bool frozen = false;    // its length is given by the batch
  PageLayout layout;
  uint8_t* base = nullptr;      // page 0 of this layer
  int64_t page_stride = 0;      // bytes from page to page: all layers
  float* current = nullptr;     // fixed: (slots, width)
  float* next = nullptr;        // fixed: what commit makes current
  uint8_t* written = nullptr;   // fixed: (slots), set where next holds something
  int32_t width = 0;

  uint8_t* head(int32_t page, int64_t head) const {
    return base + page * page_stride + head * layout.head_bytes;
  }
};

// Pages and length of each sequence for one declared state.
struct PageTable {
  const int32_t* pages = nullptr;    // of all sequences, one after the other
  const int32_t* starts = nullptr;   // (sequences + 1)
  const int32_t* lengths = nullptr;  // (sequences), frozen states only
};

}  // namespace lmclock
