// Entry points over whole tensors. Addresses are of the device's memory, `stream` is a cudaStream_t; nothing waits.
#pragma once

#include <string>

#include "cuda/params.hpp"

namespace anabranch::cuda {

// How a launch is laid out; zeros leave the choice to the device's table.
struct Layout {
  int ring = 0, grid = 0;
};

void attention(Type type, Attention a, const Device& device, const Layout& layout, void* stream);
// Strides in elements of `element` bytes.
void write_kv(WriteKv w, int head_dim, int element, const Device& device, void* stream);
void copy_pages(CopyPages c, int head_dim, int element, const Device& device, void* stream);
void advance(const Advance& a, const Device& device, void* stream);

// Packed query rows a pass: what a plan's tile should be.
int packed_rows(Type type, int head_dim);

// What a launch would choose where a multiprocessor has registers for `most` blocks: tiles in the ring and bytes of shared
// memory.
struct Chosen {
  int ring, shared;
};
Chosen layout_of(Type type, int head_dim, const Device& device, int most);

// The device of this index; throws std::runtime_error when there is none or its driver cannot run this build.
Device device_of(int index);
int device_count();  // −1: no driver that this build can use
std::string architectures();  // what the kernels were compiled for

template <class T>
void attention_of(Attention a, const Device& device, const Layout& layout, void* stream);

}  // namespace anabranch::cuda
