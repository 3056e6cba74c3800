// The system's clocks, as numbers.
#pragma once

#ifdef __linux__
#include <time.h>

#include <cstdint>

namespace anabranch::cpu {

// Nanoseconds; −1 for a clock that is not there, as that of a thread that has ended.
inline int64_t nanoseconds(clockid_t clock) {
  timespec t;
  return clock_gettime(clock, &t) == 0 ? int64_t(t.tv_sec) * 1'000'000'000 + t.tv_nsec : -1;
}

}  // namespace anabranch::cpu
#endif
