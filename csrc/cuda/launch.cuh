// Host side of the launches: which variant, how many tiles in the ring, how many blocks. Runs in the emulator too.
#pragma once

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda/attention.cuh"
#include "cuda/launch.hpp"
#include "cuda/merge.cuh"

namespace anabranch::cuda {

// head_dim → a variant compiled for at least that many columns.
template <class F>
void with_head_dim(int head_dim, const F& f) {
  using std::integral_constant;
#ifdef ANABRANCH_ONE_HEAD_DIM  // a single variant, for those who look at its machine code
  return f(integral_constant<int, ANABRANCH_ONE_HEAD_DIM>{});
#else
  if (head_dim <= 32) return f(integral_constant<int, 32>{});
#ifndef ANABRANCH_FEW_HEAD_DIMS
  if (head_dim <= 64) return f(integral_constant<int, 64>{});
  if (head_dim <= 80) return f(integral_constant<int, 80>{});
  if (head_dim <= 96) return f(integral_constant<int, 96>{});
  if (head_dim <= 128) return f(integral_constant<int, 128>{});
  if (head_dim <= 192) return f(integral_constant<int, 192>{});
#endif
  if (head_dim <= 256) return f(integral_constant<int, 256>{});
  throw std::invalid_argument("head_dim: at most 256, got " + std::to_string(head_dim));
#endif
}

template <class S>
int ring_for(const Device& device, int most) {
  const int ring = S::ring_for(device.shared_block, device.shared_multiprocessor, most);
  if (ring != 0) return ring;
  throw std::runtime_error("this GPU's shared memory (" + std::to_string(device.shared_block) +
                           " bytes a block) is too small for the CUDA kernels; use backend='triton'");
}

#ifdef ANABRANCH_EMULATOR
inline void check_launch() {}
inline bool may_launch_beside(const void*, const Device& device) { return device.arch >= 90; }
inline int current_device() { return 0; }
inline void allow_shared(const void* function, int bytes) { emulator::allow_shared(function, bytes); }
inline int resident_blocks(const void*, int shared, const Device& device) {
  return std::min(2, device.shared_multiprocessor / (shared + kReserved));  // as if registers allowed no more
}
#else
inline void check_cuda(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::string text = cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction)
    text = "this build has kernels for " + architectures() +
           " and none that this GPU can run; rebuild with ANABRANCH_CUDA_ARCHS naming its architecture";
  throw std::runtime_error(text);
}
inline void check_launch() { check_cuda(cudaGetLastError()); }
inline int current_device() {
  int index = 0;
  check_cuda(cudaGetDevice(&index));
  return index;
}

// Whether a kernel may be launched beside the one before it, in streams and in captured graphs: what the GPU and the driver
// can, and whether what the GPU runs was compiled with the wait (code for sm_80 that the driver translates was not).
inline bool may_launch_beside(const void* function, const Device& device) {
#if CUDART_VERSION >= 12030
  if (device.arch < 90) return false;
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, bool> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [found, fresh] = known.try_emplace({current_device(), function}, false);
  if (fresh) {
    int driver = 0;
    cudaFuncAttributes compiled{};
    check_cuda(cudaDriverGetVersion(&driver));
    check_cuda(cudaFuncGetAttributes(&compiled, function));
    found->second = driver >= 12030 && compiled.ptxVersion >= 90;
  }
  return found->second;
#else
  return false;
#endif
}
template <class P>
void launch_beside(void (*function)(P), int grid, int threads, int shared, cudaStream_t stream, const P& params) {
#if CUDART_VERSION >= 12030
  cudaLaunchAttribute beside{};
  beside.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  beside.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = stream;
  config.attrs = &beside;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, function, params));
#else
  ANABRANCH_LAUNCH(function, grid, threads, shared, stream, params);
#endif
}
inline void allow_shared(const void* function, int bytes) {
  check_cuda(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}
inline int resident_blocks(const void* function, int shared, const Device&) {
  int blocks = 0;
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function, kThreads, shared));
  return blocks;
}
#endif

// Blocks of a kernel on a multiprocessor at once, with that much shared memory, which it is allowed from now on. Asked
// once a kernel, device and size: the answers cost more than a launch. What a kernel is allowed is one number a device,
// the last one set: it is only ever raised, or a small ring between two large ones would forbid the second.
template <class T, int D>
int blocks_per_multiprocessor(int shared, const Device& device) {
  struct Known {
    int allowed = 48 * 1024;  // without asking
    std::map<int, int> blocks;
  };
  static std::mutex mutex;
  static std::map<int, Known> devices;
  const auto function = reinterpret_cast<const void*>(&attention_kernel<T, D>);
  const std::lock_guard<std::mutex> lock(mutex);
  Known& known = devices[current_device()];
  if (shared > known.allowed) {
    allow_shared(function, shared);
    known.allowed = shared;
  }
  const auto found = known.blocks.find(shared);
  if (found != known.blocks.end()) return found->second;
  return known.blocks[shared] = std::max(1, resident_blocks(function, shared, device));
}

inline int grid_for(int64_t wanted, int most) { return static_cast<int>(std::clamp<int64_t>(wanted, 1, most)); }

template <class T>
void attention_of(Attention a, const Device& device, const Layout& layout, void* stream) {
  with_head_dim(a.head_dim, [&](auto columns) {
    constexpr int D = decltype(columns)::value;
    using S = Shape<T, D>;
    a.row_bytes = a.head_dim * static_cast<int>(sizeof(T));
    if (a.num_items > 0) {
      a.ring = layout.ring != 0 ? layout.ring : ring_for<S>(device, blocks_per_multiprocessor<T, D>(0, device));
      if (a.ring < 2 || a.ring > kMaxRing)
        throw std::invalid_argument("ring: from 2 to " + std::to_string(kMaxRing) + ", got " + std::to_string(a.ring));
      const auto function = &attention_kernel<T, D>;
      const int shared = S::shared_bytes(a.ring);
      const int resident = blocks_per_multiprocessor<T, D>(shared, device) * device.multiprocessors;
      const int64_t units = static_cast<int64_t>(a.num_items) * a.num_kv_heads;
      const int grid = layout.grid != 0 ? layout.grid : grid_for(units, resident);
      ANABRANCH_LAUNCH(function, grid, kThreads, shared, stream, a);
      check_launch();
    }
  });
  if (a.num_merge > 0) {
    const int64_t units = static_cast<int64_t>(a.num_merge) * a.num_q_heads;
    const int most = 8 * device.multiprocessors;
    const bool few = units <= most;
    const int grid = layout.grid != 0 ? layout.grid : few ? static_cast<int>(units) : grid_for((units + kWarps - 1) / kWarps, most);
    const auto function = few ? &merge_kernel<T, kWarps> : &merge_kernel<T, 1>;
    // Its blocks come as those of the attention kernel end, so that nothing waits for a launch.
    if (a.num_items > 0 && may_launch_beside(reinterpret_cast<const void*>(function), device))
      ANABRANCH_LAUNCH_BESIDE(function, grid, kThreads, 0, stream, a);
    else
      ANABRANCH_LAUNCH(function, grid, kThreads, 0, stream, a);
    check_launch();
  }
}

}  // namespace anabranch::cuda
