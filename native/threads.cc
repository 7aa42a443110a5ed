// The team of threads and the clock; see threads.h.

#include "threads.h"

#include <pthread.h>
#include <time.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lmclock {

bool ticks_are_wall = false;

int64_t wall_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t{t.tv_sec} * 1000000000 + t.tv_nsec;
}

namespace {

bool counter_is_constant() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  return __get_cpuid(0x80000007, &a, &b, &c, &d) && (d & (1u << 8));
#elif defined(__aarch64__)
  return true;
#else
  return false;
#endif
}

// Reading the clock costs some 30 ns, so 1 ms bounds the error of the rate by 60 parts in a
// million.
constexpr int64_t kCalibrationNs = 1000000;

TickSource measure() {
  ticks_are_wall = !counter_is_constant();
  if (ticks_are_wall) return {"wall", 1e9};
#if defined(__aarch64__)
  int64_t hertz;
  asm volatile("mrs %0, cntfrq_el0" : "=r"(hertz));
  return {"tsc", static_cast<double>(hertz)};
#else
  const int64_t wall = wall_ns(), begin = ticks();
  while (wall_ns() - wall < kCalibrationNs) {}
  const int64_t elapsed = wall_ns() - wall, end = ticks();
  return {"tsc", static_cast<double>(end - begin) * 1e9 / static_cast<double>(elapsed)};
#endif
}

std::atomic<int> forks{0};  // counted in the child

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void park(const std::atomic<uint32_t>& word, uint32_t old) {
#if defined(__linux__)
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
#else
  word.wait(old);
#endif
}

void unpark(std::atomic<uint32_t>& word) {
#if defined(__linux__)
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr, 0);
#else
  word.notify_all();
#endif
}

// How long a thread spins before it parks. At a barrier: threads that have a processor each meet
// within microseconds; later the one awaited may be waiting for the very processor that spins.
// (Yielding instead of parking goes to the end of the queue, which on a busy machine took 30 times
// as long.) Between runs: longer than fetch and write back in Python take.
constexpr int64_t kBarrierNs = 50000, kIdleNs = 300000;

}  // namespace

const TickSource& tick_source() {
  static const TickSource source = measure();
  return source;
}

void Team::await(const std::atomic<uint32_t>& word, uint32_t old, int64_t spin_ns) {
  const double rate = 1e-9 * tick_source().rate;
  const int64_t limit = static_cast<int64_t>(static_cast<double>(spin_ns) * rate), begin = ticks();
  do {
    for (int i = 0; i < 16; ++i) {
      if (word.load(std::memory_order_acquire) != old) return;
      relax();
    }
  } while (ticks() - begin < limit);
  // Either the waker sees the sleeper, or the sleeper sees the new word: both sides are
  // sequentially consistent.
  sleepers_.fetch_add(1);
  while (word.load() == old) park(word, old);
  sleepers_.fetch_sub(1);
}

void Team::wake(std::atomic<uint32_t>& word, uint32_t next) {
  word.store(next);
  if (sleepers_.load() != 0) unpark(word);
}

void Team::await_phase(uint32_t phase) { await(phase_, phase, kBarrierNs); }

bool Team::start(Body body, void* context) {
  if (generation_ != forks.load(std::memory_order_relaxed)) return false;
  body_ = body;
  context_ = context;
  if (size_ > 1) wake(job_, job_.load(std::memory_order_relaxed) + 1);
  body(context, 0);
  barrier();
  return true;
}

void Team::work(int thread) {
  for (uint32_t job = 0;; ++job) {
    await(job_, job, kIdleNs);
    if (stop_) return;
    body_(context_, thread);
    barrier();
  }
}

Team::Team(int threads) : size_(threads), generation_(forks.load()) {
  static const int once = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1); });
  static_cast<void>(once);
  tick_source();
  for (int thread = 1; thread < size_; ++thread)
    workers_.emplace_back([this, thread] { work(thread); });
}

Team::~Team() {
  if (generation_ != forks.load()) {
    for (std::thread& worker : workers_) worker.detach();
    return;
  }
  stop_ = true;
  if (size_ > 1) wake(job_, job_.load(std::memory_order_relaxed) + 1);
  for (std::thread& worker : workers_) worker.join();
}

}  // namespace lmclock
