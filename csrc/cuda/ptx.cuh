// Every instruction that plain C++ does not have, each with two bodies: PTX for the GPU, and a call into the host-side
// device of tests/emulator, so that the kernels run from the same sources under g++, with no CUDA header in sight.
//
// Conventions. Kernels are one-dimensional. Memory is read and written through `load` and `store` (the emulator checks
// each access). Every barrier and wait carries a site: the tests take one away at a time and must see something break.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef ANABRANCH_EMULATOR
#include "emulator.hpp"
#define ANABRANCH_DEVICE inline
#define ANABRANCH_BOTH
#define ANABRANCH_KERNEL(threads, blocks)
#define ANABRANCH_UNROLL
#define ANABRANCH_NO_UNROLL
#define ANABRANCH_UNROLL_BY_4
#else
#include <cuda_runtime.h>
#define ANABRANCH_DEVICE __device__ __forceinline__
#define ANABRANCH_BOTH __host__ __device__
#define ANABRANCH_KERNEL(threads, blocks) __global__ __launch_bounds__(threads, blocks)
#define ANABRANCH_UNROLL _Pragma("unroll")
#define ANABRANCH_NO_UNROLL _Pragma("unroll 1")
#define ANABRANCH_UNROLL_BY_4 _Pragma("unroll 4")
#endif

namespace anabranch::cuda {

using i32 = int32_t;
using i64 = int64_t;
using u32 = uint32_t;

// 16-bit elements are bits here: they are moved, multiplied by mma, and made from pairs of floats.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

struct alignas(8) Int2 {
  i32 x, y;
};
struct alignas(16) Int4 {
  i32 x, y, z, w;
};
struct alignas(8) Float2 {
  float x, y;
};
struct alignas(16) Float4 {
  float x, y, z, w;
};

// Where a kernel waits. `none` stands for no fault in the tests.
enum class Site : int {
  none,
  window_reduced,     // barrier: each warp's first and last visible token
  places_visible,    // barrier: the first blocks' addresses; the ring and its neighbours are free again
  queries_landed,     // wait
  queries_visible,    // barrier
  tile_landed,        // wait
  tile_visible,       // barrier: the tile of this round; everybody is done with the one before
  ring_done,          // barrier: the last tile is used, accumulators may overwrite the ring
  results_visible,    // barrier: all warps' accumulators
  ahead_landed,       // wait: what was looked up for the first unit, or beside one without tokens
  ahead_visible,      // barrier: the same
  launch_before,      // wait: all that the launch before has written
  count
};

namespace ptx {

#ifdef ANABRANCH_EMULATOR

ANABRANCH_DEVICE int thread() { return emulator::thread(); }
ANABRANCH_DEVICE int thread_anew() { return emulator::thread(); }
ANABRANCH_DEVICE int in_register(int x) { return x; }
ANABRANCH_DEVICE int block() { return emulator::block(); }
ANABRANCH_DEVICE int blocks() { return emulator::blocks(); }
ANABRANCH_DEVICE char* shared_memory() { return emulator::shared_memory(); }

template <class V>
ANABRANCH_DEVICE V load(const V* p) {
  emulator::check(p, sizeof(V), alignof(V), false);
  emulator::count_load(p);
  return *p;
}
template <class V>
ANABRANCH_DEVICE void store(V* p, const V& value) {
  emulator::check(p, sizeof(V), alignof(V), true);
  *p = value;
}

ANABRANCH_DEVICE void sync_block(Site site) { emulator::sync_block(int(site)); }
ANABRANCH_DEVICE float shuffle_xor(float v, int mask) {
  return emulator::shuffle(v, (emulator::thread() ^ mask) & 31);
}
ANABRANCH_DEVICE int shuffle_xor(int v, int mask) { return emulator::shuffle(v, (emulator::thread() ^ mask) & 31); }
ANABRANCH_DEVICE float shuffle(float v, int lane) { return emulator::shuffle(v, lane & 31); }
ANABRANCH_DEVICE u32 shuffle(u32 v, int lane) { return static_cast<u32>(emulator::shuffle(static_cast<int>(v), lane & 31)); }
ANABRANCH_DEVICE bool any(bool v) { return emulator::any(v); }

ANABRANCH_DEVICE void ldmatrix_x4(u32 (&d)[4], const void* row) { emulator::ldmatrix_x4(d, row, false); }
ANABRANCH_DEVICE void ldmatrix_x4_trans(u32 (&d)[4], const void* row) { emulator::ldmatrix_x4(d, row, true); }
ANABRANCH_DEVICE void mma(bf16, float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  emulator::mma_m16n8k16(c, a, b0, b1, true);
}
ANABRANCH_DEVICE void mma(f16, float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  emulator::mma_m16n8k16(c, a, b0, b1, false);
}
ANABRANCH_DEVICE u32 pack(bf16, float low, float high) { return emulator::pack_bf16(low, high); }
ANABRANCH_DEVICE u32 pack(f16, float low, float high) { return emulator::pack_f16(low, high); }
ANABRANCH_DEVICE float widen(bf16, u32 x) { return emulator::widen(static_cast<uint16_t>(x), true); }
ANABRANCH_DEVICE float widen(f16, u32 x) { return emulator::widen(static_cast<uint16_t>(x), false); }
ANABRANCH_DEVICE u32 plus_zero_times(bf16, u32 sum, u32 x) { return emulator::plus_zero_times(sum, x, 0x7f80); }
ANABRANCH_DEVICE u32 plus_zero_times(f16, u32 sum, u32 x) { return emulator::plus_zero_times(sum, x, 0x7c00); }

ANABRANCH_DEVICE void copy_async(void* shared, const void* global, int bytes) {
  emulator::copy_async(shared, global, bytes);
}
ANABRANCH_DEVICE void copy_async_8(Int2* shared, const Int2* global) { emulator::copy_async(shared, global, 8, 8); }
ANABRANCH_DEVICE void copy_async_4(i32* shared, const i32* global) { emulator::copy_async(shared, global, 4, 4); }
ANABRANCH_DEVICE void copy_commit() { emulator::copy_commit(); }
ANABRANCH_DEVICE void fetch_to_cache(const char* global, int bytes) { emulator::fetch_to_cache(global, bytes); }
template <int USUAL>
ANABRANCH_DEVICE void copy_wait(int pending, Site site) { emulator::copy_wait(pending, int(site)); }

ANABRANCH_DEVICE void allow_next_launch() { emulator::allow_next_launch(); }
ANABRANCH_DEVICE void wait_for_launch_before(Site site) { emulator::wait_for_launch_before(int(site)); }

ANABRANCH_DEVICE u32 bits(float x) {
  u32 d;
  __builtin_memcpy(&d, &x, 4);
  return d;
}
ANABRANCH_DEVICE float number(u32 x) {
  float d;
  __builtin_memcpy(&d, &x, 4);
  return d;
}

ANABRANCH_DEVICE float exp2(float x) { return emulator::exp2(x); }
ANABRANCH_DEVICE float log2(float x) { return emulator::log2(x); }

#else

ANABRANCH_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
// A number that the compiler keeps in a register, where it would make it again from a parameter each time.
ANABRANCH_DEVICE int in_register(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
// thread(), for what happens once a unit: what follows from it is worked out there, not once a kernel and kept in registers
// and predicates that the inner loops want.
ANABRANCH_DEVICE int thread_anew() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}
ANABRANCH_DEVICE int block() { return static_cast<int>(blockIdx.x); }
ANABRANCH_DEVICE int blocks() { return static_cast<int>(gridDim.x); }
ANABRANCH_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char anabranch_shared[];
  return anabranch_shared;
}

template <class V>
ANABRANCH_DEVICE V load(const V* p) {
  return *p;
}
template <class V>
ANABRANCH_DEVICE void store(V* p, const V& value) {
  *p = value;
}

ANABRANCH_DEVICE void sync_block(Site) { __syncthreads(); }
ANABRANCH_DEVICE float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
ANABRANCH_DEVICE int shuffle_xor(int v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
ANABRANCH_DEVICE float shuffle(float v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
ANABRANCH_DEVICE u32 shuffle(u32 v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
ANABRANCH_DEVICE bool any(bool v) { return __any_sync(0xffffffffu, v) != 0; }

ANABRANCH_DEVICE u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// Four 8×8 matrices of 16-bit elements; lane 8i + r gives the address of row r of matrix i (16 bytes, aligned).
ANABRANCH_DEVICE void ldmatrix_x4(u32 (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(row))
               : "memory");
}
ANABRANCH_DEVICE void ldmatrix_x4_trans(u32 (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(row))
               : "memory");
}

// c [16, 8] += a [16, 16] · b [16, 8], float32 sums.
ANABRANCH_DEVICE void mma(bf16, float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
ANABRANCH_DEVICE void mma(f16, float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two floats, rounded to nearest even, as one register: `low` in the lower half.
ANABRANCH_DEVICE u32 pack(bf16, float low, float high) {
  u32 d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
ANABRANCH_DEVICE u32 pack(f16, float low, float high) {
  u32 d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

// The element in the lower half.
ANABRANCH_DEVICE float widen(bf16, u32 x) { return __uint_as_float(x << 16); }
ANABRANCH_DEVICE float widen(f16, u32 x) {
  float d;
  asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"(static_cast<uint16_t>(x)));
  return d;
}
// sum + 0 · x of two elements each: NaN where x is one or infinite.
ANABRANCH_DEVICE u32 plus_zero_times(bf16, u32 sum, u32 x) {
  u32 d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(x), "r"(0), "r"(sum));
  return d;
}
ANABRANCH_DEVICE u32 plus_zero_times(f16, u32 sum, u32 x) {
  u32 d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(x), "r"(0), "r"(sum));
  return d;
}

// 16 bytes from global to shared memory, past the first-level cache: the first `bytes` (16 or 0) are read, the rest of
// the destination becomes zero.
ANABRANCH_DEVICE void copy_async(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(bytes)
               : "memory");
}
// Some bytes (a multiple of 16) to the second-level cache; nothing waits for it.
ANABRANCH_DEVICE void fetch_to_cache(const char* global, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
#else
  for (int at = 0; at < bytes; at += 128) asm volatile("prefetch.global.L2 [%0];" ::"l"(global + at) : "memory");
#endif
}
// Small ones, of numbers.
ANABRANCH_DEVICE void copy_async_8(Int2* shared, const Int2* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
ANABRANCH_DEVICE void copy_async_4(i32* shared, const i32* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
ANABRANCH_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
ANABRANCH_DEVICE void copy_wait_for() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
// Until at most `pending` (0 … kMaxRing − 1) groups of this thread's copies are still on their way. The instruction wants a
// constant; a few branches cost less than a jump through a table, and the usual number (no other where it is 0) takes one.
template <int USUAL>
ANABRANCH_DEVICE void copy_wait(int pending, Site) {
  if (USUAL == 0 || pending == USUAL) return copy_wait_for<USUAL>();
  if (pending >= 4) {
    if (pending == 4) return copy_wait_for<4>();
    if (pending == 5) return copy_wait_for<5>();
    if (pending == 6) return copy_wait_for<6>();
    return copy_wait_for<7>();
  }
  if (pending == 1) return copy_wait_for<1>();
  if (pending == 2) return copy_wait_for<2>();
  if (pending == 3) return copy_wait_for<3>();
  copy_wait_for<0>();
}

// The stream's next launch may begin, if it was started for that (launch_beside): its blocks come to where this one's are
// done. It reads nothing that this one writes, and writes nothing, before it has waited; each of its threads waits, or
// what comes after it might run beside this one.
ANABRANCH_DEVICE void allow_next_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
ANABRANCH_DEVICE void wait_for_launch_before(Site) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

ANABRANCH_DEVICE u32 bits(float x) { return __float_as_uint(x); }
ANABRANCH_DEVICE float number(u32 x) { return __uint_as_float(x); }

ANABRANCH_DEVICE float exp2(float x) {  // 2 ulp
  float d;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
  return d;
}
ANABRANCH_DEVICE float log2(float x) { return ::log2f(x); }

#endif

ANABRANCH_DEVICE const char* pointer(i64 address) { return reinterpret_cast<const char*>(static_cast<uintptr_t>(address)); }
// Of an address in two halves, the low one first.
ANABRANCH_DEVICE const char* pointer(const Int2& halves) {
  return reinterpret_cast<const char*>(static_cast<uintptr_t>(static_cast<uint64_t>(static_cast<u32>(halves.y)) << 32 |
                                                              static_cast<u32>(halves.x)));
}

}  // namespace ptx
}  // namespace anabranch::cuda

// The only ways a kernel is started. `function` is a pointer to it, `params` its one argument. BESIDE: it waits by itself
// for the launch before it (wait_for_launch_before), and may begin earlier; see launch_beside.
#ifdef ANABRANCH_EMULATOR
#define ANABRANCH_LAUNCH(function, grid, threads, shared, stream, params) \
  (static_cast<void>(stream), emulator::launch(reinterpret_cast<const void*>(function), grid, threads, shared, \
                                               [&] { (function)(params); }))
#define ANABRANCH_LAUNCH_BESIDE(function, grid, threads, shared, stream, params) \
  (static_cast<void>(stream), emulator::launch(reinterpret_cast<const void*>(function), grid, threads, shared, \
                                               [&] { (function)(params); }, true))
#else
#define ANABRANCH_LAUNCH(function, grid, threads, shared, stream, params) \
  (function)<<<grid, threads, shared, static_cast<cudaStream_t>(stream)>>>(params)
#define ANABRANCH_LAUNCH_BESIDE(function, grid, threads, shared, stream, params) \
  anabranch::cuda::launch_beside(function, grid, threads, shared, static_cast<cudaStream_t>(stream), params)
#endif
