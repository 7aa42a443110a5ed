// Memory that a thread touches beforehand. The system clears a page when it is first touched, which
// for weights takes as long as to read and pack them; meanwhile Python reads what the file says.
#pragma once

#include <atomic>
#include <system_error>
#include <thread>

#include "memory.h"

namespace lmclock {

class Prepared {
 public:
  Prepared() = default;
  ~Prepared() { stop(); }
  Prepared(const Prepared&) = delete;
  Prepared& operator=(const Prepared&) = delete;

  // Begins to touch so many bytes; never fails, for whoever takes them gets them anyhow.
  void start(int64_t bytes) {
    drop();
    try {
      memory_ = Memory(bytes);
      bytes_ = bytes;
      stop_.store(false, std::memory_order_relaxed);
      thread_ = std::thread([this] { touch(); });
    } catch (const std::bad_alloc&) {
      bytes_ = 0;
    } catch (const std::system_error&) {  // no more threads: nothing is touched
    }
  }

  // At least `bytes` of zeros, those prepared if they are enough. Throws std::bad_alloc.
  Memory take(int64_t bytes) {
    stop();
    if (bytes_ < bytes) drop();
    if (bytes_ == 0) return Memory(bytes);
    give_back(memory_.data() + bytes, memory_.data() + bytes_);
    bytes_ = 0;
    return std::move(memory_);
  }

  void drop() {
    stop();
    memory_ = Memory();
    bytes_ = 0;
  }

 private:
  // A page at a time; which of them are huge is the system's choice.
  void touch() {
    volatile uint8_t* data = memory_.data();
    for (int64_t at = 0; at < bytes_ && !stop_.load(std::memory_order_relaxed); at += 4096)
      data[at] = 0;
  }
  void stop() {
    stop_.store(true, std::memory_order_relaxed);
    if (thread_.joinable()) thread_.join();
  }

  Memory memory_;
  int64_t bytes_ = 0;
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

}  // namespace lmclock
