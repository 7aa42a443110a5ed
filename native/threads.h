// Persistent threads that run one function together, their barrier, and the clock they stamp with.
//
//   Team team(2);
//   team.run([&](int thread) { ...; team.barrier(); ... });   // on all threads; the caller is 0
//
// Waiting spins for a bounded time and then parks in the kernel, so an oversubscribed processor
// still makes progress.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <x86intrin.h>
#else
#include <time.h>
#endif

namespace lmclock {

// One counter of a run that all threads share, alone on its cache line.
struct alignas(64) Counter {
  std::atomic<int64_t> value{0};
};

// Where time stamps come from: "tsc" when the processor's counter runs at a constant rate, else
// "wall".
struct TickSource {
  const char* name;
  double rate;  // ticks per second
};
const TickSource& tick_source();  // measured once, takes about a millisecond
int64_t wall_ns();
extern bool ticks_are_wall;

static inline int64_t ticks() {
#if defined(__x86_64__)
  if (!ticks_are_wall) return static_cast<int64_t>(__rdtsc());
#elif defined(__aarch64__)
  int64_t count;
  asm volatile("mrs %0, cntvct_el0" : "=r"(count));
  return count;
#endif
  return wall_ns();
}

class Team {
 public:
  explicit Team(int threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }

  // body(thread) on every thread; returns when all are done. False in a process forked from the
  // team's own, where the other threads do not exist.
  template <class F>
  bool run(F&& body) {
    return start([](void* context, int thread) { (*static_cast<F*>(context))(thread); }, &body);
  }

  // Returns once every thread of the team has called it.
  void barrier() {
    barrier([] { return 0; }, [](auto&&) {});
  }

  // The same; the last thread to come calls `alone` before any of them goes on, the others call
  // `meanwhile(waiting)` before they wait: it may go on for as long as waiting() says so. On all
  // threads what `alone` returned.
  template <class F, class G>
  int64_t barrier(F&& alone, G&& meanwhile) {
    if (size_ == 1) return alone();
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 != static_cast<uint32_t>(size_)) {
      meanwhile([&] { return phase_.load(std::memory_order_acquire) == phase; });
      await_phase(phase);
      return result_;
    }
    result_ = alone();
    arrived_.store(0, std::memory_order_relaxed);
    wake(phase_, phase + 1);
    return result_;
  }

 private:
  using Body = void (*)(void*, int);
  bool start(Body body, void* context);
  void work(int thread);
  void await(const std::atomic<uint32_t>& word, uint32_t old, int64_t spin_ns);
  void await_phase(uint32_t phase);
  void wake(std::atomic<uint32_t>& word, uint32_t next);

  const int size_;
  const int generation_;
  alignas(64) std::atomic<uint32_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};    // barriers passed
  int64_t result_ = 0;  // of the last one's `alone`, on the line that the others look at
  alignas(64) std::atomic<uint32_t> job_{0};      // jobs started
  alignas(64) std::atomic<uint32_t> sleepers_{0};
  Body body_ = nullptr;
  void* context_ = nullptr;
  bool stop_ = false;
  std::vector<std::thread> workers_;
};

}  // namespace lmclock
