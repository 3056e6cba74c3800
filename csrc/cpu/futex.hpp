// Sleeping until a 32-bit word changes: a futex where there is one, else one mutex and condition variable for all words.
#pragma once

#include <atomic>
#include <cstdint>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#else
#include <condition_variable>
#include <mutex>
#endif

namespace anabranch::cpu {

// Sleepers have a mask; who wakes them names those meant. Waking takes no lock, so it never waits for a thread that was
// descheduled while it held one.
#ifdef __linux__

inline void sleep_while(std::atomic<uint32_t>& word, uint32_t value, uint32_t mask) {
  static_assert(sizeof(word) == sizeof(uint32_t), "a futex is a plain word");
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_BITSET_PRIVATE, value, nullptr, nullptr, mask);
}

inline void wake(std::atomic<uint32_t>& word, uint32_t mask) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_BITSET_PRIVATE, INT_MAX, nullptr, nullptr, mask);
}

#else

struct Bed {
  std::mutex mutex;
  std::condition_variable changed;
};

inline Bed& bed() {
  static Bed* one = new Bed;
  return *one;
}

inline void sleep_while(std::atomic<uint32_t>& word, uint32_t value, uint32_t) {
  std::unique_lock<std::mutex> lock(bed().mutex);
  if (word.load() == value) bed().changed.wait(lock);
}

inline void wake(std::atomic<uint32_t>&, uint32_t) {
  { std::lock_guard<std::mutex> guard(bed().mutex); }  // whoever has looked at the word sleeps by now
  bed().changed.notify_all();
}

#endif

}  // namespace anabranch::cpu
