// Parallel regions on torch's own OpenMP threads, or on a small pool where torch has none.
#pragma once

#include <string>

namespace anabranch::cpu {

// Runs fn(arg) on at most `threads` threads, this one included, and returns when all are done. fn takes its work from
// a shared counter, so that it is right for any number of threads. Safe from several threads at once and after fork().
void parallel(int threads, void (*fn)(void*), void* arg);

// "torch's OpenMP (path)" or "own pool (why)".
std::string parallel_info();

}  // namespace anabranch::cpu
