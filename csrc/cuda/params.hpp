// What the kernels are given. docs/kernel_contract.md defines the plan's arrays; addresses and element strides only.
#pragma once

#include <cstddef>
#include <cstdint>

namespace anabranch::cuda {

enum class Type : int { f32 = 0, bf16 = 1, f16 = 2 };  // as in anabranch._cpu

constexpr int kThreads = 128;
constexpr int kMaxRing = 8;

// One of K or V of a layer: strides of [page, slot in page, head, D], in elements for callers, in bytes for kernels; the
// last dimension is contiguous, every token of a head begins at a multiple of 16 bytes.
struct Pages {
  void* data;
  int64_t page, slot, head;
};

struct Attention {
  const void* q;  // [rows, num_q_heads, D], element strides below
  int64_t q_row, q_head;
  Pages k, v;
  void* out;        // [rows, num_q_heads, D] contiguous
  float* lse;       // [rows, num_q_heads] or null
  float* part_acc;  // [partials, num_q_heads, D]
  float* part_ml;   // [partials, num_q_heads, 2]: m (in units of log 2) and l
  const int32_t *items, *kv_strips, *kv_spelled, *rows, *limits, *dest, *row_positions, *merge_rows, *merge_ptr;
  const int32_t* counts;  // [num_items, num_partials, num_merge] on the device, or null: then the two below are true
  int num_items, num_merge;  // with `counts`: capacities
  int strip_shift;           // log2 of the tokens of a strip
  uint32_t strip_mask;       // those tokens − 1
  int num_q_heads, num_kv_heads, group, head_dim;
  int row_bytes;  // of a token of a head; set by the launch
  int page_size, page_shift;  // page_shift = log2(page_size), or −1 when it is no power of two
  float scale, softcap;       // softcap 0: off
  int windowed, window;
  const float* sinks;  // [num_q_heads] or null
  int ring;            // tiles of K or V in shared memory, 2 … kMaxRing
};

struct WriteKv {  // new rows of K and V into their slots; a negative slot writes nothing
  const void *k, *v;
  int64_t k_row, k_head, v_row, v_head;
  Pages k_pages, v_pages;
  const int32_t* slots;  // [rows]
  int rows, num_kv_heads, page_size;
  int vectors;  // of the size the kernel moves at once, in a token of a head
};

struct CopyPages {  // pool [planes, pages, heads, page_size, D], byte strides
  char* pool;
  int64_t plane, page, head, slot;
  const int32_t* copies;  // [3, count]: source page, destination page, filled slots; on the device
  int count, planes, heads;
  int vectors;
};

// One decode step of a plan whose topology stays: every branch's next token goes behind the last one of its tail.
struct Advance {
  int32_t *items, *kv_strips, *kv_spelled, *limits, *row_positions;
  const int64_t* tails;      // [branches]: the item that each one's context ends with
  const int32_t* slots;      // [branches]
  const int64_t* positions;  // [branches]
  int branches, strip_shift;
};

// The machine, as far as a launch depends on it.
struct Device {
  int arch;                 // 90 = sm_90
  int multiprocessors;
  int shared_block;         // bytes of shared memory a block may ask for
  int shared_multiprocessor;
};

}  // namespace anabranch::cuda
