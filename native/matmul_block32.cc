// int8 tiles for layouts of 32-element blocks: q4_0, q4_1, q5_0, q8_0, generic32.

#include "tables.h"
#include "tile.h"

namespace lmclock::LMCLOCK_PATH {

namespace {

template <class L, int R>
struct Block32 {
  template <int T>
  static void tile(const TileArgs& args) {
    f32x16 acc[T];
    clear(acc);
    auto rows = RowSet<T>::of(args);
    const uint8_t* end = args.panel + args.width / 32 * L::kBytes;
    for (const uint8_t* w = args.panel; w < end; w += L::kBytes) {
      RowSet<T>::pin(rows);
      prefetch<L::kBytes>(w, args);
      BlockCodes b;
      L::load_block(w, b);
      step32<R, L::kBits, L::kOffset, L::kMin>(acc, b.d, b.m, b.g, rows);
      RowSet<T>::next(rows);
    }
    store_all(args.out, acc);
  }
};

template <class L>
const Tiles& tiles_of() {
  static constexpr Tiles kChains = make_tiles<Block32<L, kChainRows>>();
  static constexpr Tiles kOther = make_tiles<Block32<L, kDotRows>>();
  return whole_chains ? kChains : kOther;
}

}  // namespace

const Tiles& block32_tiles(Layout layout) {
  switch (layout) {
    case Layout::q4_0: return tiles_of<Q4_0>();
    case Layout::q4_1: return tiles_of<Q4_1>();
    case Layout::q5_0: return tiles_of<Q5_0>();
    case Layout::q8_0: return tiles_of<Q8_0>();
    default: return tiles_of<Generic32>();
  }
}

}  // namespace lmclock::LMCLOCK_PATH
