// What a call over whole tensors needs: memory that is kept from call to call, and loops over threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "cpu/parallel.hpp"

namespace anabranch::cpu {

// Memory for one call, kept from call to call: partial results, and every thread's scratch.
struct Workspace {
  char* data = nullptr;
  size_t size = 0;
  ~Workspace() { std::free(data); }
  void reserve(size_t bytes) {
    if (bytes <= size) return;
    std::free(data);
    size = 0;
    data = static_cast<char*>(std::aligned_alloc(64, (bytes + 4095) / 4096 * 4096));
    if (!data) throw std::bad_alloc();
    size = (bytes + 4095) / 4096 * 4096;
  }
};

inline std::mutex spare_mutex;
inline std::vector<std::unique_ptr<Workspace>>& spare() {
  static auto* list = new std::vector<std::unique_ptr<Workspace>>;
  return *list;
}

// One for each call in flight; concurrent calls get one each.
class Lease {
 public:
  Lease() {
    std::lock_guard<std::mutex> guard(spare_mutex);
    if (spare().empty()) {
      held_ = std::make_unique<Workspace>();
    } else {
      held_ = std::move(spare().back());
      spare().pop_back();
    }
  }
  ~Lease() {
    std::lock_guard<std::mutex> guard(spare_mutex);
    spare().push_back(std::move(held_));
  }
  Workspace* operator->() { return held_.get(); }

 private:
  std::unique_ptr<Workspace> held_;
};

// Indices [0, count) in blocks, taken by whichever thread is free.
template <class Body>
void for_each(int threads, int64_t count, int64_t block, Body body) {
  struct Region {
    std::atomic<int64_t> next{0};
    std::atomic<int> thread{0};
    int64_t count, block;
    Body* body;
  } region;
  region.count = count;
  region.block = block;
  region.body = &body;
  threads = int(std::min<int64_t>(threads, (count + block - 1) / block));
  parallel(threads, [](void* p) {
    Region& r = *static_cast<Region*>(p);
    int thread = r.thread.fetch_add(1, std::memory_order_relaxed);
    for (;;) {
      int64_t begin = r.next.fetch_add(r.block, std::memory_order_relaxed);
      if (begin >= r.count) return;
      (*r.body)(thread, begin, std::min(begin + r.block, r.count));
    }
  }, &region);
}

}  // namespace anabranch::cpu
