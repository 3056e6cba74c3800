// What a call over whole tensors needs: memory that is kept from call to call, and loops over threads.
#pragma once

#ifndef _WIN32
#include <pthread.h>
#endif

#include <algorithm>
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
#ifndef _WIN32
    // A child of fork() must not find the list locked by a thread that it does not have.
    static const int guarded = pthread_atfork([] { spare_mutex.lock(); }, [] { spare_mutex.unlock(); },
                                              [] { spare_mutex.unlock(); });
    (void)guarded;
#endif
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

// Indices [0, count) in blocks, each by whichever thread is free: body(thread, begin, end). A block does not depend on the
// number of threads.
template <class Body>
void for_each(int threads, int64_t count, int64_t block, Body body) {
  struct Region {
    int64_t count, block;
    Body* body;
  } region{count, block, &body};
  const int64_t pieces = (count + block - 1) / block;
  parallel(int(std::min<int64_t>(threads, pieces)), pieces, [](void* p, int thread, int64_t piece) {
    const Region& r = *static_cast<Region*>(p);
    (*r.body)(thread, piece * r.block, std::min((piece + 1) * r.block, r.count));
  }, &region);
}

}  // namespace anabranch::cpu
