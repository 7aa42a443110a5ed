// What every SIMD path shares: names and sizes of the layouts, and the choice of a path at run
// time.

#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__) && defined(LMCLOCK_NEON)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lmclock {

#define LM_DECLARE(path)         \
  namespace path {               \
  extern const Kernels kKernels; \
  }
LM_DECLARE(scalar)
#if defined(LMCLOCK_X86)
LM_DECLARE(avx2)
LM_DECLARE(avx512)
namespace avx512 {
extern const Kernels kAmxKernels, kEmulatedAmxKernels;
}
#endif
#if defined(LMCLOCK_NEON)
LM_DECLARE(neon)
LM_DECLARE(neon_i8mm)
#endif

namespace {

struct LayoutRow {
  const char* name;
  int format;  // GGUF type number packed without change, -1 for the generic ones
  int block, bytes;
};

// In the order of enum Layout; bytes of 16 rows.
constexpr LayoutRow kRows[kLayouts] = {
    {"f32", 0, 1, 64},          {"f16", 1, 1, 32},          {"bf16", 30, 2, 64},
    {"q4_0", 2, 32, 288},       {"q4_1", 3, 32, 320},       {"q5_0", 6, 32, 352},
    {"q8_0", 8, 32, 544},       {"q4_k", 12, 256, 2304},    {"q6_k", 14, 256, 3360},
    {"generic16", -1, 16, 384}, {"generic32", -1, 32, 640},
};

const LayoutRow& row(Layout layout) { return kRows[static_cast<int>(layout)]; }

#if defined(LMCLOCK_X86)
struct Registers {
  unsigned a, b, c, d;
};

Registers cpuid(unsigned leaf, unsigned sub = 0) {
  Registers r = {};
  __get_cpuid_count(leaf, sub, &r.a, &r.b, &r.c, &r.d);
  return r;
}

bool bit(unsigned value, int n) { return value >> n & 1; }

// The registers the operating system saves: bits of XCR0.
uint64_t saved_state() {
  if (!bit(cpuid(1).c, 27)) return 0;
  unsigned low, high;
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

bool is_intel() {
  const Registers r = cpuid(0);
  return r.b == 0x756e6547 && r.d == 0x49656e69 && r.c == 0x6c65746e;  // "GenuineIntel"
}

bool has_avx2() {
  const Registers one = cpuid(1);
  return (saved_state() & 6) == 6 && bit(one.c, 12) && bit(one.c, 29) && bit(cpuid(7).b, 5);
}

bool has_avx512() {
  const Registers seven = cpuid(7);
  const unsigned wanted[] = {16, 17, 30, 31};  // F, DQ, BW, VL
  for (unsigned n : wanted)
    if (!bit(seven.b, static_cast<int>(n))) return false;
  return (saved_state() & 0xe6) == 0xe6 && has_avx2() && bit(seven.c, 11) && bit(cpuid(7, 1).a, 5);
}

// Tiles: int8 and bf16, saved by the system, and allowed to this process, which has to ask.
bool has_amx() {
  const Registers seven = cpuid(7);
  constexpr uint64_t kTiles = 3 << 17;
  if (!has_avx512() || !bit(seven.d, 22) || !bit(seven.d, 24) || !bit(seven.d, 25)) return false;
  if ((saved_state() & kTiles) != kTiles) return false;
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#else
bool is_intel() { return false; }
#endif

bool has_bf16_pairs() {
#if defined(LMCLOCK_X86)
  return has_amx() || (has_avx512() && !is_intel());
#else
  return true;
#endif
}

#if defined(LMCLOCK_NEON)
#if defined(__linux__)
bool has_dotprod() { return getauxval(AT_HWCAP) & HWCAP_ASIMDDP; }
bool has_i8mm() {
  constexpr unsigned long kWanted = HWCAP2_I8MM | HWCAP2_BF16;
  return has_dotprod() && (getauxval(AT_HWCAP2) & kWanted) == kWanted;
}
#else  // every Apple processor that runs 64-bit macOS has dot products, not every one the rest
bool has_dotprod() { return true; }
bool has_i8mm() { return false; }
#endif
#endif

std::vector<const Kernels*> find_kernels() {
  std::vector<const Kernels*> found;
#if defined(LMCLOCK_X86)
  if (has_amx()) found.push_back(&avx512::kAmxKernels);
  if (has_avx512()) found.push_back(&avx512::kKernels);
  if (has_avx2()) found.push_back(&avx2::kKernels);
#endif
#if defined(LMCLOCK_NEON)
  if (has_i8mm()) found.push_back(&neon_i8mm::kKernels);
  if (has_dotprod()) found.push_back(&neon::kKernels);
#endif
  found.push_back(&scalar::kKernels);
  return found;
}

}  // namespace

const int64_t stream_ahead = is_intel() ? kStreamAhead : 0;
const int64_t rows_ahead = is_intel() ? 0 : kStreamAhead;
bool weighs_codes = is_intel();
bool wide_bf16 = !has_bf16_pairs();
const bool whole_chains = is_intel();

Layout layout_of(int format) {
  for (int i = 0; i < kLayouts; ++i)
    if (kRows[i].format == format) return static_cast<Layout>(i);
  if (format == 7 || format == 13) return Layout::generic32;   // q5_1, q5_k
  if (format == 10 || format == 11) return Layout::generic16;  // q2_k, q3_k
  return Layout::none;
}

const char* layout_name(Layout layout) { return row(layout).name; }
int64_t layout_block(Layout layout) { return row(layout).block; }
int64_t layout_bytes(Layout layout) { return row(layout).bytes; }

int64_t panel_bytes(Layout layout, int64_t width) {
  return (width + row(layout).block - 1) / row(layout).block * row(layout).bytes;
}

int64_t act_row_bytes(Act act, int64_t width) {
  if (act == Act::none) return 4 * width;
  // q8_32: one line per block, see record.h
  const int64_t bytes = act == Act::q8_32 ? width / kRoundBlock * kAlign
                        : wide_bf16       ? 4 * width
                                          : 2 * width + 2;
  // An odd number of lines: rows a power of two apart would share a set of the first-level cache.
  return ((bytes + kAlign - 1) / kAlign | 1) * kAlign;
}

const std::vector<const Kernels*>& available_kernels() {
  static const std::vector<const Kernels*> found = find_kernels();
  return found;
}

const std::vector<const Kernels*>& emulated_kernels() {
  static const std::vector<const Kernels*> found = [] {
    std::vector<const Kernels*> kernels;
#if defined(LMCLOCK_EMULATED_TILES)
    if (has_avx512()) kernels.push_back(&avx512::kEmulatedAmxKernels);
#endif
    return kernels;
  }();
  return found;
}

const Kernels* select_kernels(const char* forced) {
  for (const auto* list : {&available_kernels(), &emulated_kernels()})
    for (const Kernels* kernels : *list)
      if (!forced || std::strcmp(kernels->name, forced) == 0) return kernels;
  return nullptr;
}

}  // namespace lmclock
