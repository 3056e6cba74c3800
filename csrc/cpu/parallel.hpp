// Parallel regions. A region is a number of pieces, claimed one by one; its caller works too and takes what nobody has
// claimed. On the pool, which is our own, it then waits for pieces that were begun elsewhere, never for a thread.
#pragma once

#include <cstdint>
#include <string>

namespace anabranch::cpu {

// fn(arg, thread, piece). `thread` is below the region's `threads`, and no two pieces have the same one at a time.
using Piece = void (*)(void* arg, int thread, int64_t piece);

// Runs pieces [0, count) on at most `threads` threads, this one (number 0) included, and returns when all are done. Which
// thread runs a piece is open, so a piece's result must not depend on it. What a piece throws is thrown here, the first
// of several, after pieces that were begun have ended; others may be left out. Safe from several threads at once, inside
// a piece, and after fork().
void parallel(int threads, int64_t count, Piece fn, void* arg);

// Whose threads run a region: torch's OpenMP threads while they hold cores anyway, else those of our pool (AUTO), or
// always the one or the other. In a process without OpenMP it is always the pool.
enum class Threads { AUTO, POOL, OPENMP };
Threads choose_threads(Threads wanted);  // for all regions from now on; the choice before

// "own pool, N workers started".
std::string parallel_info();

// How many regions of this process OpenMP's threads have run.
int64_t openmp_regions();

// For tests: workers wait so long before they claim a piece, and inside each piece they run. The calling thread does not.
void delay_workers(int64_t before_us, int64_t inside_us);

}  // namespace anabranch::cpu
