// A GPU on the host, for tests: one block at a time, every thread a fiber, scheduled in an order drawn from a seed.
//
// - Barriers and the warp's instructions (shuffles, votes, ldmatrix, mma) are rendezvous; threads that never meet, or
//   meet at different places, are reported.
// - Shared memory starts as NaN. Reads and writes outside shared memory and the registered allocations trap.
// - Asynchronous copies land at once, as late as a wait allows, or at any moment between; until then their destination
//   holds NaN, as nothing may read it.
// - Any barrier or wait can be taken away (`Config::planted`), to see that the tests notice.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulator {

struct Trap : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Landing : int { at_once, late, random };
enum class Schedule : int {
  uniform,  // any thread may go on
  sticky,   // a warp runs ahead for a while, then another one does
};

struct Config {
  uint64_t seed = 0;
  Landing landing = Landing::random;
  Schedule schedule = Schedule::uniform;
  int planted = 0;  // a site whose barrier or wait is left out
};

struct Statistics {
  int64_t launches = 0, blocks = 0, switches = 0, mma = 0, copies = 0;
  std::vector<int64_t> sites;  // how many threads passed each
  // Asynchronous copies by warps: the nth one of each lane is taken for one instruction. Wavefronts: passes over the 32
  // banks that its writes to shared memory take (4 at least); sectors: of 32 bytes of global memory that it touches.
  int64_t copy_instructions = 0, copy_wavefronts = 0, copy_sectors = 0;
  int64_t cached = 0;  // bytes that were brought to the second-level cache ahead of time
  int64_t beside = 0;  // launches that could begin before the one before had ended
  int64_t ldmatrix = 0, ldmatrix_wavefronts = 0;
  std::vector<int64_t> loads;  // of global memory, that a thread made between passing a site and passing the next: at most
  int64_t most_in_flight = 0;  // bytes of copies of one block that had not landed; what it allows where they land late
};

void configure(const Config& config);
const Statistics& statistics();
void reset_statistics();

// Allocations that kernels may touch. With none registered nothing outside shared memory is checked.
void register_memory(const void* begin, size_t bytes, bool writable, const std::string& name);
void forget_memory();

// cudaFuncSetAttribute: how much shared memory the launches of `function` may ask for from now on; 48 KB before. CUDA
// would let it be lowered; here that is a Trap.
void allow_shared(const void* function, int bytes);

// Runs `body`, which is a call of `function`, once for each thread. Throws Trap, after which the device is ready for the
// next launch.
// beside: it may begin before the launch before it has ended (programmatic dependent launch), if that allowed it. Then a
// thread that has not waited for it may not read what it wrote, nor write, nor end.
void launch(const void* function, int grid, int threads, size_t shared_bytes, const std::function<void()>& body,
            bool beside = false);

// What a kernel calls through csrc/cuda/ptx.cuh.
int thread();
int block();
int blocks();
char* shared_memory();
void check(const void* p, size_t bytes, size_t alignment, bool write);
void count_load(const void* p);
void sync_block(int site);
float shuffle(float value, int lane);
int shuffle(int value, int lane);
bool any(bool value);
void ldmatrix_x4(uint32_t (&d)[4], const void* row, bool transposed);
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool bfloat);
void copy_async(void* shared, const void* global, int bytes, int width = 16);  // zeros from `bytes` on; width: 4, 8, 16
void copy_commit();
void fetch_to_cache(const void* global, int bytes);
void copy_wait(int pending, int site);
void allow_next_launch();
void wait_for_launch_before(int site);
uint32_t pack_bf16(float low, float high);
uint32_t pack_f16(float low, float high);
float widen(uint16_t bits, bool bfloat);
uint32_t plus_zero_times(uint32_t sum, uint32_t x, uint32_t exponent);  // of two elements; exponent: its bits of one
float exp2(float x);
float log2(float x);

}  // namespace emulator
