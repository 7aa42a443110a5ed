// The kernels of every SIMD path of this build and processor against those of path scalar: packing,
// unpacking, rounding, products of every format with every kind of activations, glu, functions.
//
//   cmake -S . -B build/drivers -DLMCLOCK_DRIVERS=ON && cmake --build build/drivers
//   build/drivers/kernels            # prints what it compared; exits with 1 at the first difference
//
// For processors on which Python cannot run the tests (`make neon`), and for valgrind. Bits must be
// equal, but for dot products of bf16 pairs, whose instructions round in ways of their own.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "../../native/kernels.h"

namespace {

using namespace lmclock;

struct Source {
  const char* name;
  int code, block, bytes;
  int scales[2];  // f16 words of a block, -1 for none
};
constexpr Source kSources[] = {
    {"f32", 0, 1, 4, {-1, -1}},       {"f16", 1, 1, 2, {-1, -1}},
    {"bf16", 30, 1, 2, {-1, -1}},     {"q4_0", 2, 32, 18, {0, -1}},
    {"q4_1", 3, 32, 20, {0, 1}},      {"q5_0", 6, 32, 22, {0, -1}},
    {"q5_1", 7, 32, 24, {0, 1}},      {"q8_0", 8, 32, 34, {0, -1}},
    {"q2_k", 10, 256, 84, {40, 41}},  {"q3_k", 11, 256, 110, {54, -1}},
    {"q4_k", 12, 256, 144, {0, 1}},   {"q5_k", 13, 256, 176, {0, 1}},
    {"q6_k", 14, 256, 210, {104, -1}},
};
constexpr Act kActs[] = {Act::none, Act::q8_32, Act::bf16};
constexpr const char* kActNames[] = {"none", "q8_32", "bf16"};
// Few, since an emulator takes a second for 10^7 products: every tile of a path and its remainders.
constexpr int64_t kOutputs[] = {5, 32};
constexpr int64_t kRowCounts[] = {0, 1, 2, 7, 17};

// splitmix64
struct Random {
  uint64_t state;
  uint64_t next() {
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  // About normal: the sum of four uniform numbers.
  float normal() {
    double sum = -2;
    for (int i = 0; i < 4; ++i) sum += static_cast<double>(next() >> 11) * 0x1p-53;
    return static_cast<float>(1.7 * sum);
  }
  // An f16 of either sign with an exponent from 2^low on, `span` of them.
  uint16_t half(int low, int span) {
    const uint64_t r = next();
    const unsigned exponent = static_cast<unsigned>(15 + low) + static_cast<unsigned>(r % span);
    return static_cast<uint16_t>((r >> 20 & 0x83ff) | exponent << 10);
  }
};

struct Free {
  void operator()(uint8_t* p) const { std::free(p); }
};
using Bytes = std::unique_ptr<uint8_t, Free>;

// On a cache line, and of the very size, so that a sanitizer sees reads past the end.
Bytes bytes(int64_t size) {
  void* p = nullptr;
  if (posix_memalign(&p, kAlign, static_cast<size_t>(size > 0 ? size : 1))) std::abort();
  std::memset(p, 0, static_cast<size_t>(size));
  return Bytes(static_cast<uint8_t*>(p));
}

std::vector<uint8_t> weights(const Source& s, int64_t outputs, int64_t width, Random& random) {
  std::vector<uint8_t> raw(static_cast<size_t>(outputs * (width / s.block) * s.bytes));
  for (uint8_t& b : raw) b = static_cast<uint8_t>(random.next() >> 32);
  const size_t blocks = raw.size() / static_cast<size_t>(s.bytes);
  for (size_t n = 0; n < blocks; ++n) {
    uint8_t* at = raw.data() + n * static_cast<size_t>(s.bytes);
    const float x = random.normal();
    const uint16_t h = random.half(-6, 8);
    if (s.code == 0) std::memcpy(at, &x, 4);
    if (s.code == 30) std::memcpy(at, reinterpret_cast<const char*>(&x) + 2, 2);
    if (s.code == 1) std::memcpy(at, &h, 2);
    for (int word : s.scales) {
      const uint16_t scale = random.half(-9, 4);
      if (word >= 0) std::memcpy(at + 2 * word, &scale, 2);
    }
  }
  return raw;
}

struct Packed {
  Bytes data;
  Matrix m;
};

Packed pack(const Kernels& k, const Source& s, const std::vector<uint8_t>& raw, int64_t outputs,
            int64_t width) {
  const Layout layout = layout_of(s.code);
  const int64_t stride = (panel_bytes(layout, width) + 63) / 64 * 64, panels = panels_of(outputs);
  Packed p = {bytes(panels * stride), {}};
  p.m = {p.data.get(), outputs, width, stride, layout};
  if (!k.pack(s.code, raw.data(), outputs, width, p.data.get(), stride, 0, panels)) {
    std::printf("%s: pack %s finds finite scales infinite\n", k.name, s.name);
    std::exit(1);
  }
  return p;
}

struct Rounded {
  Bytes data;
  Rows rows;
};

Rounded round(const Kernels& k, Act act, const std::vector<float>& x, int64_t rows, int64_t width) {
  const int64_t stride = act_row_bytes(act, width);
  Rounded r = {bytes(rows * stride), {}};
  for (int64_t n = 0; n < rows; ++n)
    k.round_row(act, x.data() + n * width, width, 0, width, r.data.get() + n * stride);
  r.rows = {r.data.get(), stride, act};
  return r;
}

std::vector<float> linear(const Kernels& k, const Matrix& w, const Rows& x, int64_t rows,
                          const float* bias) {
  std::vector<float> y(static_cast<size_t>(rows * w.outputs));
  Linear l = {w, x, y.data(), w.outputs, bias, nullptr, 0};
  const int64_t panels = panels_of(w.outputs);
  k.linear(l, 0, rows, 0, panels / 2);  // in two parts, as two threads would
  k.linear(l, 0, rows, panels / 2, panels);
  return y;
}

int64_t compared = 0;

// Exits unless both are the same, bit by bit or with a normalised mean square error of 1e-11.
void same(const std::string& what, const std::vector<float>& got, const std::vector<float>& want,
          bool bits) {
  ++compared;
  if (!std::memcmp(got.data(), want.data(), 4 * got.size())) return;
  double error = 0, power = 0;
  for (size_t n = 0; n < got.size(); ++n) {
    error += (double{got[n]} - want[n]) * (double{got[n]} - want[n]);
    power += double{want[n]} * want[n];
  }
  if (!bits && error <= 1e-11 * power) return;
  std::printf("%s differs from scalar: error %.3g\n", what.c_str(), error / power);
  std::exit(1);
}

void compare_format(const Kernels& k, const Kernels& scalar, const Source& s, int64_t width) {
  Random random{static_cast<uint64_t>(1000 * s.code + width)};
  const int64_t most = kRowCounts[std::size(kRowCounts) - 1];
  std::vector<float> x(static_cast<size_t>(most * width)), bias(64);
  for (float& v : x) v = random.normal();
  for (float& v : bias) v = random.normal();
  for (int64_t outputs : kOutputs) {
    const std::vector<uint8_t> raw = weights(s, outputs, width, random);
    const Packed a = pack(k, s, raw, outputs, width), b = pack(scalar, s, raw, outputs, width);
    const std::string what = std::string(k.name) + ": " + s.name + " " + std::to_string(outputs) +
                             "x" + std::to_string(width);
    const size_t size = static_cast<size_t>(panels_of(outputs) * a.m.panel_stride);
    if (std::memcmp(a.data.get(), b.data.get(), size)) {
      std::printf("%s is packed in other bytes than by scalar\n", what.c_str());
      std::exit(1);
    }
    std::vector<int32_t> ids = {static_cast<int32_t>(outputs) - 1, 0};
    std::vector<float> got(static_cast<size_t>(2 * width)), want(got.size());
    k.unpack_rows(a.m, ids.data(), 2, got.data(), width);
    scalar.unpack_rows(b.m, ids.data(), 2, want.data(), width);
    same(what + " unpacked", got, want, true);
    for (size_t n = 0; n < std::size(kActs); ++n) {
      if (kActs[n] == Act::q8_32 && width % kRoundBlock) continue;
      const bool bits = s.code != 30 || kActs[n] != Act::bf16;
      for (int64_t rows : kRowCounts) {
        const Rounded p = round(k, kActs[n], x, rows, width);
        const Rounded q = round(scalar, kActs[n], x, rows, width);
        const std::string name =
            what + " x " + kActNames[n] + ", " + std::to_string(rows) + " rows";
        same(name, linear(k, a.m, p.rows, rows, nullptr),
             linear(scalar, b.m, q.rows, rows, nullptr), bits);
        if (rows != 17) continue;
        same(name + ", bias", linear(k, a.m, p.rows, rows, bias.data()),
             linear(scalar, b.m, q.rows, rows, bias.data()), bits);
        std::vector<float> u(static_cast<size_t>(rows * outputs)), v(u.size());
        const Glu g = {a.m, a.m, p.rows, u.data(), outputs, nullptr, nullptr, GluKind::silu};
        const Glu h = {b.m, b.m, q.rows, v.data(), outputs, nullptr, nullptr, GluKind::silu};
        k.glu(g, 0, rows, 0, panels_of(outputs));
        scalar.glu(h, 0, rows, 0, panels_of(outputs));
        same(name + ", glu", u, v, bits);
      }
    }
  }
}

void compare_functions(const Kernels& k, const Kernels& scalar) {
  std::vector<float> x;
  for (int n = -4000; n <= 4000; ++n) x.push_back(static_cast<float>(n) * 0.01f);
  for (float v : {INFINITY, -INFINITY, 3e38f, -3e38f, 1e-40f, 0.0f, -0.0f}) x.push_back(v);
  const char* names[] = {"exp",  "tanh",      "sigmoid", "normal_cdf",
                         "silu", "gelu_tanh", "gelu",    "relu"};
  for (size_t f = 0; f < std::size(names); ++f) {
    std::vector<float> got(x.size()), want(x.size());
    k.apply(static_cast<Function>(f), x.data(), got.data(), static_cast<int64_t>(x.size()));
    scalar.apply(static_cast<Function>(f), x.data(), want.data(), static_cast<int64_t>(x.size()));
    // scalar rounds the sum of a multiply-add twice: about one result in 2^29 is another
    same(std::string(k.name) + ": " + names[f], got, want, true);
  }
  if (k.peak_int8(1) <= 0 || k.peak_f32(1) <= 0 || k.peak_bf16(1) <= 0) {
    std::printf("%s has no peak\n", k.name);
    std::exit(1);
  }
  const Bytes data = bytes(4096);
  if (k.stream(data.get(), 4096) != 4096) {
    std::printf("%s does not stream all\n", k.name);
    std::exit(1);
  }
}

void compare_rounding(const Kernels& k, const Kernels& scalar, Random random) {
  constexpr int64_t kWidth = 480;
  for (Act act : {Act::q8_32, Act::bf16}) {
    std::vector<float> x(static_cast<size_t>(kWidth));
    for (int scale = -140; scale < 126; scale += 7) {
      for (float& v : x) v = std::ldexp(random.normal(), scale);
      const Rounded a = round(k, act, x, 1, kWidth), b = round(scalar, act, x, 1, kWidth);
      ++compared;
      if (!std::memcmp(a.rows.data, b.rows.data, static_cast<size_t>(a.rows.stride))) continue;
      std::printf("%s rounds numbers near 2^%d otherwise than scalar\n", k.name, scale);
      std::exit(1);
    }
  }
}

}  // namespace

int main() {
  const Kernels& scalar = *select_kernels("scalar");
  std::vector<const Kernels*> all = available_kernels();
  all.insert(all.end(), emulated_kernels().begin(), emulated_kernels().end());
  for (const Kernels* k : all) {
    if (k == &scalar) continue;
    compared = 0;
    compare_functions(*k, scalar);
    compare_rounding(*k, scalar, {1});
    for (const Source& s : kSources) {
      const bool odd = s.block == 1;
      for (int64_t width : {s.block, odd ? 33 : s.block == 32 ? 352 : 512})
        compare_format(*k, scalar, s, width);
      if (odd) compare_format(*k, scalar, s, 320);
    }
    std::printf("%s: %lld results as of scalar\n", k->name, static_cast<long long>(compared));
  }
}
