// torch's own threads.
#pragma once

#include <string>

namespace anabranch::cpu {

// Sets the number of threads that OpenMP regions of the calling thread take from now on (omp_set_num_threads of the
// runtime that torch has loaded); the number before. 0, and nothing is done, where torch has no OpenMP.
int openmp_threads(int threads);

// Path of that runtime, "" for none.
std::string openmp_library();

}  // namespace anabranch::cpu
