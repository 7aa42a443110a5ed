// Large zeroed memory on huge pages where the kernel grants them. It is address space until it is
// touched.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

#include <sys/mman.h>

namespace lmclock {

class Memory {
 public:
  Memory() = default;
  // Throws std::bad_alloc.
  explicit Memory(int64_t bytes) {
    if (bytes <= 0) return;
    const size_t whole = (static_cast<size_t>(bytes) + kHuge - 1) / kHuge * kHuge;
    // One huge page more, so that the block can start on the boundary of one.
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* got = mmap(nullptr, whole + kHuge, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (got == MAP_FAILED) throw std::bad_alloc();
    mapped_ = static_cast<uint8_t*>(got);
    size_ = whole + kHuge;
    data_ = mapped_ + (kHuge - reinterpret_cast<uintptr_t>(mapped_) % kHuge) % kHuge;
#ifdef MADV_HUGEPAGE
    if (bytes >= static_cast<int64_t>(kHuge)) madvise(data_, whole, MADV_HUGEPAGE);
#endif
  }
  ~Memory() {
    if (mapped_) munmap(mapped_, size_);
  }
  Memory(Memory&& other) noexcept { swap(other); }
  Memory& operator=(Memory&& other) noexcept {
    swap(other);
    return *this;
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  uint8_t* data() const { return data_; }
  template <class T>
  T* as() const { return reinterpret_cast<T*>(data_); }

 private:
  static constexpr size_t kHuge = size_t{2} << 20;
  void swap(Memory& other) {
    std::swap(mapped_, other.mapped_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }
  uint8_t* mapped_ = nullptr;
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

// Whole pages of a shared, read-only file map leave this process's memory; the file's cache keeps
// them.
inline void give_back(const uint8_t* begin, const uint8_t* end) {
#ifdef MADV_DONTNEED
  constexpr uintptr_t kPage = 4096;
  const uintptr_t a = (reinterpret_cast<uintptr_t>(begin) + kPage - 1) / kPage * kPage;
  const uintptr_t b = reinterpret_cast<uintptr_t>(end) / kPage * kPage;
  if (a < b) madvise(reinterpret_cast<void*>(a), b - a, MADV_DONTNEED);
#endif
}

}  // namespace lmclock
