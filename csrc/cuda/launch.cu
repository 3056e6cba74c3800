// What does not depend on the element type: dispatch, the small kernels, and what is known of the device.
#include "cuda/launch.cuh"

#include "cuda/pages.cuh"

namespace anabranch::cuda {

extern template void attention_of<bf16>(Attention, const Device&, const Layout&, void*);
extern template void attention_of<f16>(Attention, const Device&, const Layout&, void*);
extern template void attention_of<float>(Attention, const Device&, const Layout&, void*);

namespace {

struct alignas(16) Vector16 {
  u32 words[4];
};

// The widest vector that every address, stride and length is a multiple of.
int vector_bytes(std::initializer_list<int64_t> multiples) {
  int64_t all = 16;
  for (int64_t m : multiples) all |= m;
  const int64_t lowest = all & -all;
  return lowest >= 16 ? 16 : lowest >= 4 ? 4 : 2;
}
int64_t address(const void* p) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(p)); }

}  // namespace

void attention(Type type, Attention a, const Device& device, const Layout& layout, void* stream) {
  for (Pages* pages : {&a.k, &a.v})
    for (int64_t* stride : {&pages->page, &pages->slot, &pages->head}) *stride *= type == Type::f32 ? 4 : 2;
  const int64_t most = std::max(static_cast<int64_t>(a.num_items) * a.num_kv_heads,
                                static_cast<int64_t>(a.num_merge) * a.num_q_heads);
  if (most > INT32_MAX)
    throw std::invalid_argument("num_items and num_merge: at most 2^31 - 1 times the heads, got " +
                                std::to_string(most));
  switch (type) {
    case Type::f32: return attention_of<float>(a, device, layout, stream);
    case Type::bf16: return attention_of<bf16>(a, device, layout, stream);
    case Type::f16: return attention_of<f16>(a, device, layout, stream);
  }
  throw std::invalid_argument("type: 0 float32, 1 bfloat16, 2 float16");
}

int packed_rows(Type type, int head_dim) {
  int rows = 0;
  with_head_dim(head_dim, [&](auto columns) {
    constexpr int D = decltype(columns)::value;
    rows = type == Type::f32 ? Shape<float, D>::kRows : Shape<bf16, D>::kRows;
  });
  return rows;
}

Chosen layout_of(Type type, int head_dim, const Device& device, int most) {
  Chosen c{};
  with_head_dim(head_dim, [&](auto columns) {
    constexpr int D = decltype(columns)::value;
    const auto of = [&](auto shape) {
      using S = decltype(shape);
      c.ring = ring_for<S>(device, most);
      c.shared = S::shared_bytes(c.ring);
    };
    if (type == Type::f32)
      of(Shape<float, D>{});
    else
      of(Shape<bf16, D>{});
  });
  return c;
}

void write_kv(WriteKv w, int head_dim, int element, const Device& device, void* stream) {
  if (w.rows == 0) return;
  for (int64_t* stride : {&w.k_row, &w.k_head, &w.v_row, &w.v_head, &w.k_pages.page, &w.k_pages.slot, &w.k_pages.head,
                          &w.v_pages.page, &w.v_pages.slot, &w.v_pages.head})
    *stride *= element;
  const int bytes = head_dim * element;
  const int vector = vector_bytes({bytes, address(w.k), address(w.v), address(w.k_pages.data), address(w.v_pages.data),
                                   w.k_row, w.k_head, w.v_row, w.v_head, w.k_pages.page, w.k_pages.slot, w.k_pages.head,
                                   w.v_pages.page, w.v_pages.slot, w.v_pages.head});
  w.vectors = bytes / vector;
  const int64_t total = static_cast<int64_t>(w.rows) * w.num_kv_heads * w.vectors;
  const int grid = grid_for((total + kThreads - 1) / kThreads, 8 * device.multiprocessors);
  const auto function = vector == 16 ? &write_kv_kernel<Vector16> : vector == 4 ? &write_kv_kernel<u32>
                                                                               : &write_kv_kernel<uint16_t>;
  ANABRANCH_LAUNCH(function, grid, kThreads, 0, stream, w);
  check_launch();
}

void copy_pages(CopyPages c, int head_dim, int element, const Device& device, void* stream) {
  if (c.count == 0) return;
  for (int64_t* stride : {&c.plane, &c.page, &c.head, &c.slot}) *stride *= element;
  const int bytes = head_dim * element;
  const int vector = vector_bytes({bytes, address(c.pool), c.plane, c.page, c.head, c.slot});
  c.vectors = bytes / vector;
  const int grid = grid_for(static_cast<int64_t>(c.count) * c.planes * c.heads, 16 * device.multiprocessors);
  const auto function = vector == 16 ? &copy_pages_kernel<Vector16> : vector == 4 ? &copy_pages_kernel<u32>
                                                                                 : &copy_pages_kernel<uint16_t>;
  ANABRANCH_LAUNCH(function, grid, kThreads, 0, stream, c);
  check_launch();
}

void advance(const Advance& a, const Device& device, void* stream) {
  if (a.branches == 0) return;
  const int grid = grid_for((a.branches + kThreads - 1) / kThreads, 8 * device.multiprocessors);
  ANABRANCH_LAUNCH(&advance_kernel, grid, kThreads, 0, stream, a);
  check_launch();
}

#ifndef ANABRANCH_EMULATOR

std::string architectures() {
#ifdef ANABRANCH_CUDA_BUILT_FOR
  return ANABRANCH_CUDA_BUILT_FOR;
#else
  return "the architectures given to nvcc";
#endif
}

int device_count() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorNoDevice) return 0;
  if (error != cudaSuccess) {
    cudaGetLastError();  // it would be reported again by the next call
    return -1;
  }
  return count;
}

Device device_of(int index) {
  const auto attribute = [index](cudaDeviceAttr name) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, name, index));
    return value;
  };
  Device d{};
  d.arch = 10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
  d.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  d.shared_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  d.shared_multiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  return d;
}

#endif

}  // namespace anabranch::cuda
