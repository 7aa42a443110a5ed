// The matmul kernels' C++ interface: packed weights, rounded activations, linear and glu.
//
// Every kernel source is compiled once per SIMD path; a path exports one table of function
// pointers, `Kernels`, chosen at run time by `select_kernels`. Nothing here allocates, throws or
// takes a lock (select_kernels apart), so persistent threads call the functions directly, each on
// its own range.
//
// Weights are packed in panels of 16 output rows, interleaved so that one 64-byte vector holds 4
// bytes of each of the 16 rows. A matrix whose outputs are not a multiple of 16 ends in a
// zero-padded panel. The layout is the same on every path.
//
// Bits: element y[r, o] depends on row r of x and row o of w only. It is the same for any number of
// rows in a call and any split of rows and panels over calls or threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace lmclock {

constexpr int64_t kPanel = 16;  // output rows of one panel
constexpr int64_t kAlign = 64;  // alignment of packed weights and of activation records, bytes
// How far ahead of its use streamed memory is asked for, bytes. On Sapphire and Granite Rapids a
// dot product that waits for its load occupies the scheduler, so that few loads get under way, and
// the processor's own prefetching stops at every 4 KB. One row against weights in memory, of a
// plain read: q4_1 60-80 %, q4_k and q6_k 63-70 %; so asked for, 88-92 % and 85-95 %. From 3 to 10
// KB the difference is in the noise of a shared machine; the shorter ones lose when memory is at
// its fastest.
constexpr int64_t kStreamAhead = 6144;
extern const int64_t stream_ahead;   // kStreamAhead, or 0 on AMD: 4-10 % slower with it on Zen 4
// The same, asked for into the second-level cache; 0 where stream_ahead serves. A tile's own work
// fills the processor's window, so that loads do not run ahead by themselves: Zen 4, decoding 4 and
// 8 sequences 1.4 and 1.6 times as fast; into the first level, whose misses are few at a time, 1.1
// and 1.3; 3 KB ahead 1.2 and 1.3. One row is the same either way on Zen 4; on Zen 5 q4_k goes from
// 68 to 88 % of a plain read, q6_k from 87 to 96, f16 and bf16 from 90 to 97, and q4_1 stays.
extern const int64_t rows_ahead;
// Whether attention of many rows weighs values by integer codes and not by bf16: where vdpbf16ps is
// slow. GOPS of two cores: 469 and 235 of f32 on Zen 4; 185 on Golden Cove, where f32 gives 330 and
// integer pairs 760. Tests set it.
extern bool weighs_codes;
// Whether rows rounded to bf16 are kept in f32, for the f32 kernels: where no product of bf16 pairs
// is faster. Many rows of bf16 on Golden Cove without tiles: 187 -> 320 GOPS.
// Tests set it.
extern bool wide_bf16;
// Whether adding two integer vectors takes a port that multiplies, so that tiles run kChainRows rows
// through whole chains of dot products (simd_avx512.h has the figures).
extern const bool whole_chains;
constexpr int64_t kRoundBlock = 32;  // elements that share one activation scale

// How a matrix lies in memory once packed. GGUF formats without a layout of their own become
// generic16 / generic32: int8 codes with an f32 scale and an f32 minimum per 16 / 32 elements.
enum class Layout : uint8_t {
  f32,
  f16,
  bf16,
  q4_0,
  q4_1,
  q5_0,
  q8_0,
  q4_k,
  q6_k,
  generic16,
  generic32,
  none,
};
constexpr int kLayouts = static_cast<int>(Layout::none);

Layout layout_of(int format);  // GGUF type number -> layout; Layout::none when unsupported
const char* layout_name(Layout layout);  // "q4_1", "generic32", ...
int64_t layout_block(Layout layout);     // k elements of one panel block
int64_t layout_bytes(Layout layout);  // bytes of one panel block (16 rows x layout_block elements)

// Bytes of one packed panel, of all panels, and the number of panels. bf16 pairs two k: an odd
// width is padded.
int64_t panel_bytes(Layout layout, int64_t width);
inline int64_t panels_of(int64_t outputs) { return (outputs + kPanel - 1) / kPanel; }

// A packed matrix (outputs, width); memory belongs to the caller, 64-byte aligned. Panel p starts
// at data + p * panel_stride: gate and up may alternate in one allocation (stride = 2 panels).
struct Matrix {
  const uint8_t* data = nullptr;
  int64_t outputs = 0;
  int64_t width = 0;
  int64_t panel_stride = 0;  // bytes, multiple of 64
  Layout layout = Layout::none;
};

// Kind of the activations a linear reads.
//   none   plain f32 rows; weights are dequantised (any layout)
//   q8_32  records: int8 per 32 elements with one f32 scale
//   bf16   records: bf16, round to nearest even; in f32 where wide_bf16
// All combinations with all layouts work; the fast ones are q8_32 with quantised layouts, bf16 with
// bf16, none with f32, f16 and bf16.
enum class Act : uint8_t { none, q8_32, bf16 };

// Bytes of one activation record (none: 4 * width). Rounded up to an odd number of cache lines, so
// that records a power of two apart do not share their cache sets. q8_32 needs width % 32 == 0.
int64_t act_row_bytes(Act act, int64_t width);

// Rows of activations: f32 rows (Act::none) or records made by `round_row`; row r starts at data +
// r * stride.
struct Rows {
  const void* data = nullptr;  // records: 64-byte aligned; f32: 4
  int64_t stride = 0;          // bytes
  Act act = Act::none;
};

// y[r, o] = sum_k w[o, k] x[r, k]  (+ bias[o])  (+ add[r, o]);  strides in elements; add may be y
// itself.
struct Linear {
  Matrix w;
  Rows x;
  float* y = nullptr;
  int64_t y_stride = 0;
  const float* bias = nullptr;
  const float* add = nullptr;
  int64_t add_stride = 0;
};

enum class GluKind : uint8_t { silu, gelu_tanh, gelu, relu };

// y[r, o] = act(gate[o] . x[r] (+ gate_bias[o])) * (up[o] . x[r] (+ up_bias[o]))
struct Glu {
  Matrix gate, up;  // same outputs and width; layouts may differ
  Rows x;
  float* y = nullptr;
  int64_t y_stride = 0;
  const float* gate_bias = nullptr;
  const float* up_bias = nullptr;
  GluKind kind = GluKind::silu;
};

// Elementwise functions (mathfun.h), for tests and whoever needs them from Python.
enum class Function : uint8_t { exp, tanh, sigmoid, normal_cdf, silu, gelu_tanh, gelu, relu };

struct Kernels {
  // "scalar", "avx2", "avx512", "amx" (avx512 with AMX tiles for many rows), "neon" (with dot
  // products), "neon_i8mm" (with those of mixed signs and of bf16)
  const char* name;

  // Packs panels [p0, p1) of GGUF rows (outputs, width) of `format` to dst + p * panel_stride.
  // Returns true when every scale (float formats: every value) is finite. width must be a multiple
  // of the format's block.
  bool (*pack)(int format, const uint8_t* rows, int64_t outputs, int64_t width, uint8_t* dst,
               int64_t panel_stride, int64_t p0, int64_t p1);

  // out[i, :] = row ids[i] of w as f32, bit-equal to the format's definition. ids are not checked.
  void (*unpack_rows)(const Matrix& w, const int32_t* ids, int64_t count, float* out,
                      int64_t out_stride);

  // Rounds elements [k0, k1) of one f32 row of `width` into its record; k0 a multiple of 32, k1 too
  // unless it is the width. Threads may round separate ranges of a row (glu: the 32 outputs of two
  // panels). Same bits on every path.
  void (*round_row)(Act act, const float* x, int64_t width, int64_t k0, int64_t k1, void* record);

  // Rows [r0, r1) x panels [p0, p1).
  void (*linear)(const Linear& l, int64_t r0, int64_t r1, int64_t p0, int64_t p1);
  void (*glu)(const Glu& g, int64_t r0, int64_t r1, int64_t p0, int64_t p1);

  // y[i] = f(x[i]), i < count; y may be x.
  void (*apply)(Function f, const float* x, float* y, int64_t count);

  // Calibration: one thread's share; the caller times it. Peaks run on registers and return
  // operations done (multiply and add counted apart) for about `rounds` x 4096 dot-product
  // instructions; 0 when the path has none. stream reads [data, data + bytes) once through int8 dot
  // products and returns bytes read.
  int64_t (*peak_int8)(int64_t rounds);
  int64_t (*peak_int16)(int64_t rounds);
  int64_t (*peak_bf16)(int64_t rounds);
  int64_t (*peak_f32)(int64_t rounds);
  int64_t (*stream)(const uint8_t* data, int64_t bytes);
};

// The tables this processor can run, widest first (found once through cpuid, xgetbv and, for AMX,
// the kernel's permission).
const std::vector<const Kernels*>& available_kernels();

// Tables whose instructions are emulated, for tests that the processor could not run otherwise:
// "amx_emulated", where the build was asked for it. Never chosen unless forced.
const std::vector<const Kernels*>& emulated_kernels();

// The widest table, or the one called `forced`; nullptr when this build or processor lacks it.
const Kernels* select_kernels(const char* forced);

}  // namespace lmclock
