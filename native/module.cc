// lmclock._native: the kernels as Python functions, for tests, calibration and benchmarks.
//
// Arrays are C-contiguous NumPy arrays; sizes are checked here, since kernels check nothing. Every
// call releases the GIL. `threads` splits the panels (1, 2, ... plain threads started for the
// call).

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstring>
#include <iterator>
#include <thread>
#include <utility>

#include "binding.h"

namespace lmclock {

namespace {
constexpr int64_t kHugePage = 2 << 20;
}

Buffer allocate(int64_t bytes) {
  const size_t alignment = bytes < kHugePage ? kAlign : kHugePage;
  const size_t size = (static_cast<size_t>(bytes) + alignment) / alignment * alignment;
  Buffer buffer(static_cast<uint8_t*>(std::aligned_alloc(alignment, size)));
  if (!buffer) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  if (alignment == kHugePage) madvise(buffer.get(), size, MADV_HUGEPAGE);  // advice: may fail
#endif
  return buffer;
}

void require(bool ok, const std::string& message) {
  if (!ok) throw nb::value_error(message.c_str());
}

const Kernels& find_path(const std::optional<std::string>& path) {
  const Kernels* kernels = select_kernels(path ? path->c_str() : nullptr);
  if (kernels) return *kernels;
  std::string names;
  for (const Kernels* k : available_kernels())
    names += names.empty() ? k->name : std::string(", ") + k->name;
  throw nb::value_error(
      ("SIMD path '" + *path + "' is not available here; valid: " + names).c_str());
}

Peak find_peak(const Kernels& kernels, const std::string& kind) {
  if (kind == "int8") return kernels.peak_int8;
  if (kind == "int16") return kernels.peak_int16;
  if (kind == "bf16") return kernels.peak_bf16;
  require(kind == "f32", "peak '" + kind + "'; valid: int8, int16, bf16 or f32");
  return kernels.peak_f32;
}

namespace {

using IdsIn = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using FloatsOut = nb::ndarray<nb::numpy, float, nb::ndim<2>>;
using BytesOut = nb::ndarray<nb::numpy, uint8_t, nb::ndim<2>>;

// f(begin, end) over [0, n) in `threads` equal parts.
template <class F>
void parallel(int threads, int64_t n, F f) {
  std::vector<std::thread> started;
  for (int t = 1; t < threads; ++t)
    started.emplace_back([=] { f(n * t / threads, n * (t + 1) / threads); });
  f(0, n / threads);
  for (std::thread& thread : started) thread.join();
}

template <class Array, class T>
Array array_of(std::unique_ptr<T[]> data, int64_t rows, int64_t width) {
  T* p = data.release();
  nb::capsule owner(p, [](void* q) noexcept { delete[] static_cast<T*>(q); });
  return Array(p, {static_cast<size_t>(rows), static_cast<size_t>(width)}, owner);
}

FloatsOut unpack_rows(const Packed& w, IdsIn ids) {
  for (size_t i = 0; i < ids.size(); ++i)
    require(ids.data()[i] >= 0 && ids.data()[i] < w.m.outputs,
            "row " + std::to_string(ids.data()[i]) + " is outside 0.." +
                std::to_string(w.m.outputs - 1));
  const int64_t count = static_cast<int64_t>(ids.size());
  std::unique_ptr<float[]> out(new float[static_cast<size_t>(count * w.m.width + 1)]);
  w.kernels->unpack_rows(w.m, ids.data(), count, out.get(), w.m.width);
  return array_of<FloatsOut>(std::move(out), count, w.m.width);
}

Packed pack(int format, int64_t outputs, int64_t width, Bytes data,
            const std::optional<std::string>& path, int threads) {
  static const struct {
    int code, block, bytes;
  } kSources[] = {{0, 1, 4},      {1, 1, 2},      {2, 32, 18},   {3, 32, 20},    {6, 32, 22},
                  {7, 32, 24},    {8, 32, 34},    {10, 256, 84}, {11, 256, 110}, {12, 256, 144},
                  {13, 256, 176}, {14, 256, 210}, {30, 1, 2}};
  Packed packed;
  packed.kernels = &find_path(path);
  const Layout layout = layout_of(format);
  require(layout != Layout::none, "format " + std::to_string(format) + " has no packed layout");
  for (auto source : kSources)
    if (source.code == format)
      require(outputs >= 0 && width >= 0 && width % source.block == 0 &&
                  static_cast<int64_t>(data.nbytes()) ==
                      outputs * (width / source.block) * source.bytes,
              std::to_string(data.nbytes()) + " bytes are not " + std::to_string(outputs) +
                  " rows of " + std::to_string(width));
  const int64_t stride = panel_bytes(layout, width), padded = (stride + 63) / 64 * 64;
  const int64_t panels = panels_of(outputs);
  packed.data = allocate(panels * padded);
  packed.m = {packed.data.get(), outputs, width, padded, layout};
  nb::gil_scoped_release unlocked;
  bool finite[64];
  std::vector<std::thread> started;
  const int n = threads < 1 ? 1 : threads > 64 ? 64 : threads;
  auto part = [&](int t) {
    finite[t] = packed.kernels->pack(format, data.data(), outputs, width, packed.data.get(), padded,
                                     panels * t / n, panels * (t + 1) / n);
  };
  for (int t = 1; t < n; ++t) started.emplace_back(part, t);
  part(0);
  for (std::thread& thread : started) thread.join();
  for (int t = 0; t < n; ++t) packed.finite &= finite[t];
  return packed;
}

Act act_of(const std::string& name) {
  if (name == "none") return Act::none;
  if (name == "q8_32") return Act::q8_32;
  if (name == "bf16") return Act::bf16;
  throw nb::value_error(("activation rounding '" + name + "'; valid: none, q8_32 or bf16").c_str());
}

GluKind glu_of(const std::string& name) {
  if (name == "silu") return GluKind::silu;
  if (name == "gelu_tanh") return GluKind::gelu_tanh;
  if (name == "gelu") return GluKind::gelu;
  if (name == "relu") return GluKind::relu;
  throw nb::value_error(("glu kind '" + name + "'; valid: silu, gelu_tanh, gelu or relu").c_str());
}

}  // namespace

RoundedRows round_rows(const Kernels& kernels, const std::string& act, FloatsIn x, int64_t width) {
  const Act kind = act_of(act);
  require(x.ndim() == 2 && static_cast<int64_t>(x.shape(1)) == width,
          "activations must be (rows, " + std::to_string(width) + ")");
  require(kind != Act::q8_32 || width % kRoundBlock == 0,
          "q8_32 needs a width that is a multiple of 32, not " + std::to_string(width));
  RoundedRows r;
  r.count = static_cast<int64_t>(x.shape(0));
  if (kind == Act::none) {
    r.rows = {x.data(), 4 * width, kind};
    return r;
  }
  const int64_t stride = act_row_bytes(kind, width);
  r.data = allocate(r.count * stride);
  for (int64_t i = 0; i < r.count; ++i)
    kernels.round_row(kind, x.data() + i * width, width, 0, width, r.data.get() + i * stride);
  r.rows = {r.data.get(), stride, kind};
  return r;
}

namespace {

const float* optional_row(const std::optional<FloatsIn>& a, int64_t size, const char* what) {
  if (!a) return nullptr;
  require(static_cast<int64_t>(a->size()) == size,
          std::string(what) + " must have " + std::to_string(size) + " elements");
  return a->data();
}

FloatsOut linear(const Packed& w, FloatsIn x, const std::string& act, std::optional<FloatsIn> bias,
                 std::optional<FloatsIn> add, int threads, const std::optional<std::string>& path) {
  const Kernels& kernels = path ? find_path(path) : *w.kernels;
  const RoundedRows rows = round_rows(kernels, act, x, w.m.width);
  const int64_t outputs = w.m.outputs;
  std::unique_ptr<float[]> y(new float[static_cast<size_t>(rows.count * outputs + 1)]);
  const Linear l = {w.m,
                    rows.rows,
                    y.get(),
                    outputs,
                    optional_row(bias, outputs, "bias"),
                    optional_row(add, rows.count * outputs, "add"),
                    outputs};
  {
    nb::gil_scoped_release unlocked;
    parallel(threads, panels_of(outputs),
             [&](int64_t p0, int64_t p1) { kernels.linear(l, 0, rows.count, p0, p1); });
  }
  return array_of<FloatsOut>(std::move(y), rows.count, outputs);
}

FloatsOut glu(const Packed& gate, const Packed& up, FloatsIn x, const std::string& act,
              const std::string& kind, std::optional<FloatsIn> gate_bias,
              std::optional<FloatsIn> up_bias, int threads,
              const std::optional<std::string>& path) {
  const Kernels& kernels = path ? find_path(path) : *gate.kernels;
  const int64_t outputs = gate.m.outputs;
  require(up.m.outputs == outputs && up.m.width == gate.m.width, "gate and up differ in shape");
  const RoundedRows rows = round_rows(kernels, act, x, gate.m.width);
  std::unique_ptr<float[]> y(new float[static_cast<size_t>(rows.count * outputs + 1)]);
  const Glu g = {gate.m,
                 up.m,
                 rows.rows,
                 y.get(),
                 outputs,
                 optional_row(gate_bias, outputs, "gate_bias"),
                 optional_row(up_bias, outputs, "up_bias"),
                 glu_of(kind)};
  {
    nb::gil_scoped_release unlocked;
    parallel(threads, panels_of(outputs),
             [&](int64_t p0, int64_t p1) { kernels.glu(g, 0, rows.count, p0, p1); });
  }
  return array_of<FloatsOut>(std::move(y), rows.count, outputs);
}

BytesOut round_records(FloatsIn x, const std::string& act, const std::optional<std::string>& path) {
  require(x.ndim() == 2, "activations must be (rows, width)");
  const int64_t width = static_cast<int64_t>(x.shape(1)), bytes = act_row_bytes(act_of(act), width);
  const RoundedRows rows = round_rows(find_path(path), act, x, width);
  const size_t size = static_cast<size_t>(rows.count * bytes);
  std::unique_ptr<uint8_t[]> out(new uint8_t[size + 1]);
  std::memcpy(out.get(), rows.rows.data, size);
  return array_of<BytesOut>(std::move(out), rows.count, bytes);
}

FloatsOut apply(const std::string& name, FloatsIn x, const std::optional<std::string>& path) {
  static const char* kNames[] = {"exp",  "tanh",      "sigmoid", "normal_cdf",
                                 "silu", "gelu_tanh", "gelu",    "relu"};
  for (size_t i = 0; i < std::size(kNames); ++i) {
    if (name != kNames[i]) continue;
    std::unique_ptr<float[]> y(new float[x.size() + 1]);
    find_path(path).apply(static_cast<Function>(i), x.data(), y.get(),
                          static_cast<int64_t>(x.size()));
    return array_of<FloatsOut>(std::move(y), 1, static_cast<int64_t>(x.size()));
  }
  throw nb::value_error(("function '" + name +
                         "'; valid: exp, tanh, sigmoid, normal_cdf, "
                         "silu, gelu_tanh, gelu or relu")
                            .c_str());
}

int64_t peak(const std::string& kind, int64_t rounds, const std::optional<std::string>& path) {
  const Peak run = find_peak(find_path(path), kind);
  nb::gil_scoped_release unlocked;
  return run(rounds);
}

int64_t stream(Bytes data, int passes, const std::optional<std::string>& path) {
  const Kernels& k = find_path(path);
  nb::gil_scoped_release unlocked;
  int64_t read = 0;
  for (int pass = 0; pass < passes; ++pass)
    read += k.stream(data.data(), static_cast<int64_t>(data.nbytes()));
  return read;
}

}  // namespace

void bind_kernels(nb::module_& m) {
  using namespace nb::literals;
  nb::class_<Packed>(m, "Packed", "A matrix packed for the kernels.")
      .def("unpack_rows", &unpack_rows, "ids"_a, "Rows `ids` as f32 (n, width).")
      .def_prop_ro("nbytes",
                   [](const Packed& p) { return panels_of(p.m.outputs) * p.m.panel_stride; })
      .def_prop_ro("layout", [](const Packed& p) { return layout_name(p.m.layout); })
      .def_prop_ro("shape", [](const Packed& p) { return nb::make_tuple(p.m.outputs, p.m.width); })
      .def_ro("finite", &Packed::finite,
              "Whether every scale is finite (float formats: every value).");
  const auto names = [](const std::vector<const Kernels*>& list) {
    std::vector<std::string> names;
    for (const Kernels* k : list) names.emplace_back(k->name);
    return names;
  };
  m.def("simd_paths", [names] { return names(available_kernels()); },
        "SIMD paths this build and processor offer, widest first.");
  m.def("emulated_paths", [names] { return names(emulated_kernels()); },
        "Paths whose instructions are emulated, for tests.");
  m.def("layout_name", [](int format) { return layout_name(layout_of(format)); }, "format"_a);
  m.def("pack", &pack, "format"_a, "outputs"_a, "width"_a, "data"_a, "path"_a = nb::none(),
        "threads"_a = 1, "Pack GGUF rows (outputs, width) of a format code.");
  m.def("linear", &linear, "w"_a, "x"_a, "act"_a = "none", "bias"_a = nb::none(),
        "add"_a = nb::none(), "threads"_a = 1, "path"_a = nb::none(),
        "x (rows, width) f32 -> (rows, outputs) f32.");
  m.def("glu", &glu, "gate"_a, "up"_a, "x"_a, "act"_a = "none", "kind"_a = "silu",
        "gate_bias"_a = nb::none(), "up_bias"_a = nb::none(), "threads"_a = 1,
        "path"_a = nb::none());
  m.def("round_records", &round_records, "x"_a, "act"_a = "q8_32", "path"_a = nb::none(),
        "Activation records as bytes (rows, record bytes): int8 codes, then scales and sums.");
  m.def("apply", &apply, "function"_a, "x"_a, "path"_a = nb::none(), "f(x) as (1, size) f32.");
  m.def("peak", &peak, "kind"_a, "rounds"_a, "path"_a = nb::none(),
        "Operations done by one thread; kind int8, int16, bf16 or f32; 0 where the path has none.");
  m.def("set_weigh_codes", [](bool codes) { return std::exchange(weighs_codes, codes); }, "codes"_a,
        "For tests: how attention of many rows weighs values; returns how it did.");
  m.def("set_wide_bf16", [](bool wide) { return std::exchange(wide_bf16, wide); }, "wide"_a,
        "For tests: whether rows rounded to bf16 are kept in f32; returns whether they were.");
  m.def("stream", &stream, "data"_a, "passes"_a = 1, "path"_a = nb::none(),
        "Bytes read by one thread, `passes` times over data.");
}

}  // namespace lmclock

NB_MODULE(_native, m) {
  m.doc() = "Native kernels of lmclock.";
  lmclock::bind_kernels(m);
  lmclock::bind_timing(m);
  lmclock::bind_machine(m);
}
