// torch's own threads: those of the OpenMP runtime that it has loaded.
#pragma once

#include <string>

namespace anabranch::cpu {

// Sets the number of threads that OpenMP regions of the calling thread take from now on (omp_set_num_threads); the
// number before. 0, and nothing is done, where torch has no OpenMP.
int openmp_threads(int threads);

// Whether that runtime can be asked for a region: not where there is none, nor in a child of fork().
bool has_openmp_regions();

// fn(arg) on each thread of the calling thread's team, itself included; returns when all have returned. fn must not
// throw. Only where has_openmp_regions().
void openmp_region(void (*fn)(void*), void* arg);

// Whether the calling thread's team has at least `threads` threads and all of them hold cores right now: they spin behind
// a region of torch's, ready for the next. Where they sleep, or have to share their cores with another program, they
// are not. Only Linux can tell; elsewhere false.
bool openmp_awake(int threads);

// Path of that runtime, "" for none.
std::string openmp_library();

}  // namespace anabranch::cpu
