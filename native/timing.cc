// Timed kernels for calibration and benchmarks: threads that live through all repeats, started
// together by a spin barrier, so that nothing of Python and no thread start is in a figure.

#include <atomic>
#include <chrono>
#include <thread>

#include "binding.h"
#include "threads.h"

namespace lmclock {
namespace {

using Seconds = std::vector<double>;

class SpinBarrier {
 public:
  explicit SpinBarrier(int threads) : threads_(threads) {}

  void wait() {
    const int turn = turn_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return;
    }
    while (turn_.load(std::memory_order_acquire) == turn) {
    }
  }

 private:
  const int threads_;
  std::atomic<int> arrived_{0}, turn_{0};
};

// Wall time of work(thread) on all threads, per repeat; the first, untimed repeat warms up.
template <class Work>
Seconds time_all(int threads, int repeat, Work work) {
  require(threads >= 1 && threads <= 1024,
          "threads must be 1 to 1024, not " + std::to_string(threads));
  require(repeat >= 1, "repeat must be at least 1, not " + std::to_string(repeat));
  nb::gil_scoped_release unlocked;
  Seconds seconds(static_cast<size_t>(repeat));
  SpinBarrier barrier(threads);
  auto run = [&](int thread) {
    work(thread);
    for (double& s : seconds) {
      barrier.wait();
      const auto start = std::chrono::steady_clock::now();
      work(thread);
      barrier.wait();
      if (thread == 0)
        s = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    }
  };
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(run, t);
  run(0);
  for (std::thread& thread : others) thread.join();
  return seconds;
}

// Rows are cut as a machine would: one row by panels, many rows by panels too, so that each thread
// keeps its weights.
Seconds time_linear(const Packed& w, FloatsIn x, const std::string& act, int threads, int repeat,
                    const std::optional<std::string>& path) {
  const Kernels& kernels = path ? find_path(path) : *w.kernels;
  const RoundedRows rows = round_rows(kernels, act, x, w.m.width);
  const Buffer y = allocate(rows.count * w.m.outputs * 4);
  Linear l;
  l.w = w.m;
  l.x = rows.rows;
  l.y = reinterpret_cast<float*>(y.get());
  l.y_stride = w.m.outputs;
  const int64_t panels = panels_of(w.m.outputs);
  return time_all(threads, repeat, [&](int t) {
    kernels.linear(l, 0, rows.count, panels * t / threads, panels * (t + 1) / threads);
  });
}

Seconds time_pack(int format, int64_t outputs, int64_t width, Bytes data, int threads, int repeat,
                  const std::optional<std::string>& path) {
  const Kernels& kernels = find_path(path);
  const int64_t stride = (panel_bytes(layout_of(format), width) + 63) / 64 * 64;
  const int64_t panels = panels_of(outputs);
  const Buffer out = allocate(panels * stride);
  return time_all(threads, repeat, [&](int t) {
    kernels.pack(format, data.data(), outputs, width, out.get(), stride, panels * t / threads,
                 panels * (t + 1) / threads);
  });
}

Seconds time_stream(Bytes data, int threads, int repeat, const std::optional<std::string>& path) {
  const Kernels& kernels = find_path(path);
  const int64_t lines = static_cast<int64_t>(data.nbytes()) / 512;
  return time_all(threads, repeat, [&](int t) {
    const int64_t begin = lines * t / threads * 512, end = lines * (t + 1) / threads * 512;
    kernels.stream(data.data() + begin, end - begin);
  });
}

// Operations per second of all threads together, per repeat.
Seconds time_peak(const std::string& kind, int64_t rounds, int threads, int repeat,
                  const std::optional<std::string>& path) {
  const Peak run = find_peak(find_path(path), kind);
  const double operations = static_cast<double>(run(1)) * static_cast<double>(rounds) * threads;
  Seconds rates = time_all(threads, repeat, [&](int) { run(rounds); });
  for (double& rate : rates) rate = operations / rate;
  return rates;
}

// Seconds of a time stamp, taken and stored, of many in a row.
double time_tick(int64_t count) {
  require(count >= 1, "count must be at least 1, not " + std::to_string(count));
  std::vector<int64_t> stamps(1024);
  const int64_t begin = wall_ns();
  for (int64_t n = 0; n < count; ++n) stamps[static_cast<size_t>(n) % stamps.size()] = ticks();
  const int64_t end = wall_ns();
  return 1e-9 * static_cast<double>(end - begin) / static_cast<double>(count);
}

}  // namespace

void bind_timing(nb::module_& m) {
  using namespace nb::literals;
  m.def("time_linear", &time_linear, "w"_a, "x"_a, "act"_a = "none", "threads"_a = 1,
        "repeat"_a = 10, "path"_a = nb::none(),
        "Seconds of each repeat; rounding x is not in them.");
  m.def("time_pack", &time_pack, "format"_a, "outputs"_a, "width"_a, "data"_a, "threads"_a = 1,
        "repeat"_a = 5, "path"_a = nb::none(), "Seconds of each repeat.");
  m.def("time_stream", &time_stream, "data"_a, "threads"_a = 1, "repeat"_a = 10,
        "path"_a = nb::none(), "Seconds of each repeat of reading data once through dot products.");
  m.def("time_peak", &time_peak, "kind"_a, "rounds"_a = 256, "threads"_a = 1, "repeat"_a = 10,
        "path"_a = nb::none(),
        "Operations per second of all threads, per repeat; kind int8, int16, bf16 or f32.");
  m.def("time_tick", &time_tick, "count"_a = 100'000, "Seconds of one time stamp.");
}

}  // namespace lmclock
