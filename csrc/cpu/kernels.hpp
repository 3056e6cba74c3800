// What the kernels are given and what each instruction set offers. docs/kernel_contract.md defines the plan's arrays.
#pragma once

#include <cstddef>
#include <cstdint>

#include "plan/branch_plan.hpp"

namespace anabranch::cpu {

enum class Type : int { f32 = 0, bf16 = 1, f16 = 2 };
enum class Stored : int { as_is = -1, i8 = 0, e4m3 = 1 };  // K and V in a page: of the rows' type, or of one byte

constexpr int MAX_HEAD_DIM = 1024;  // of K and of V
constexpr int STREAM_ROWS = 8;  // an item of at most so many packed rows reads K and V straight from memory

inline size_t size_of(Type type) { return type == Type::f32 ? 4 : 2; }

// One of K or V: element strides of [page, slot in page, head, D]; the last dimension is contiguous. Elements of one byte
// have a factor for each token and head in `scales`: element strides of [page, slot in page, head], any of them may be 0.
struct Pool {
  const void* data;
  int64_t page, slot, head;
  const float* scales;
  int64_t scale_page, scale_slot, scale_head;
};

struct Attention {
  Type type;      // of q and out
  Stored stored;  // K and V
  int head_dim, v_dim;  // of Q and K; of V and out, called D and E here
  int num_q_heads, num_kv_heads, group;
  const void* q;  // [rows, num_q_heads, D], element strides below
  int64_t q_row, q_head;
  Pool k, v;
  int page_size, page_shift;  // page_shift = log2(page_size), or −1 when it is no power of two
  // The plan, int32 as in docs/kernel_contract.md.
  const int32_t *items, *kv_strips, *kv_spelled, *rows, *limits, *dest, *row_positions, *merge_rows, *merge_ptr;
  int strip_shift;  // log2 of the tokens of a strip
  int num_items, num_merge;
  float scale;         // natural units
  float softcap;       // 0: off
  bool windowed;
  int window;
  const float* sinks;  // [num_q_heads] or null
  void* out;           // [rows, num_q_heads, E] contiguous, of `type`
  float* lse;          // [rows, num_q_heads] or null
  float *part_m, *part_l, *part_acc;  // [partials, num_q_heads], the same, [partials, num_q_heads, E]
};

// How many of the items behind this one are parts of it; -1: it is one.
static inline int parts_of(const Attention& a, int item) { return a.items[8 * int64_t(item) + 7]; }

struct Write {  // new rows of K or V into their slots
  Type type;      // of src
  Stored stored;  // in dst
  int head_dim, num_kv_heads, page_size;
  const void* src;  // [rows, num_kv_heads, D]
  int64_t src_row, src_head;
  Pool dst;
  const int32_t* slots;
};

constexpr int64_t PACK_ROWS = 16;  // of x: a tile register's, where there are any

// out[rows, n] = x · wᵀ (+ bias), accumulated in float32. Element strides between rows; rows themselves contiguous.
struct Linear {
  Type type;  // of x, w, bias and out
  int64_t rows, n, k;
  const void *x, *w, *bias;  // bias [n] or null
  void* out;
  int64_t x_row, w_row, out_row;
  float* wide;  // x in the kernel's own form, linear_wide() floats; null: x is read as it lies
  int64_t hop;  // from the end of a call's columns to where the same thread is likely to go on
};

struct Strided {  // [tokens, heads, D], element strides; the last dimension is contiguous
  const void* data;
  int64_t row, head;
};

struct Scores {  // [rows, size], an element stride between rows
  Type type;
  const void* data;
  int64_t rows, size, row;
};

constexpr int64_t SCORE_BLOCK = 64;  // scores of which a pass notes one number

constexpr int BRANCH_BLOCK = 64;  // tokens of an entry of Branch::latest

struct BranchPart {  // a range of row tiles, and the sums of dK and dV over it
  int tile_begin, tile_end;
  int column_begin, column_end;  // what its rows see
  float* sums;                   // [num_kv_heads, columns, dK and dV, each padded to vectors]
};

// Attention under a branch mask. out [T, num_q_heads, E], dq [T, num_q_heads, D], dk [T, num_kv_heads, D], dv [T,
// num_kv_heads, E]: contiguous, of `type`; D = head_dim, E = v_dim.
struct Branch {
  Type type;
  int head_dim, v_dim, num_q_heads, num_kv_heads, group;
  int chunks;  // parts that the query heads of a KV head are cut into, so that one token's fit a tile
  int lanes;   // of a tile at most
  Strided q, k, v;
  const BranchTile* tiles;
  const BranchPiece* pieces;
  float scale, softcap;  // softcap 0: off
  bool windowed;
  int window;
  const int64_t* positions;  // [T], read with a window only
  const int64_t* latest;     // the largest position of each BRANCH_BLOCK tokens
  const float* sinks;        // [num_q_heads] or null
  void* out;
  float* lse;  // [T, num_q_heads]
  // backward
  Strided grad;
  const float* grad_lse;  // [T, num_q_heads] or null
  float* delta;           // [T, num_q_heads]
  void *dq, *dk, *dv;
  const BranchPart* parts;
  int num_parts;
};

// The functions of one instruction set. `unit` is an item for KV heads [begin, end), one unless its rows are few or it
// has parts; `merge` takes merge entries [begin, end).
struct Kernels {
  const char* isa;
  int vector_bytes;
  int (*stream_heads)(int head_dim, int v_dim);  // of an item of few rows: so many at a time at most
  size_t (*scratch_bytes)(int packed_rows, int head_dim, int v_dim, int heads);
  int (*subtree_heads)(int packed_rows, int head_dim, int v_dim);  // of an item with parts: so many at a time at most
  size_t (*subtree_scratch)(int packed_rows, int head_dim, int v_dim, int heads);
  void (*unit)(const Attention&, int item, int begin, int end, void* scratch);
  void (*merge)(const Attention&, int64_t begin, int64_t end);
  void (*quantise)(const Write&, int64_t row, int head);  // one vector into its slot, its factor into the scales
  // Linear layers: `linear_wide`, how many floats the kernel's own form of x takes, 0 where it reads x as it lies;
  // `linear_pack` brings rows [begin, end) of x into that form, begin a multiple of PACK_ROWS, end too or the last;
  // `linear` computes output columns [begin, end) of all rows.
  size_t (*linear_wide)(const Linear&);
  size_t (*linear_scratch)(int64_t rows);
  void (*linear_pack)(const Linear&, int64_t begin, int64_t end);
  void (*linear)(const Linear&, int64_t begin, int64_t end, void* scratch);
  // Branch attention: a unit of the forward is a tile × KV head × chunk of its query heads, one of the backward a part
  // × KV head; `reduce` turns the parts' sums into dK and dV of tokens [begin, end).
  int (*branch_lanes)(int widest);  // wanted in a tile; the larger of head_dim and v_dim
  int branch_pad;                     // lanes come in multiples of this
  size_t (*branch_scratch)(int lanes, int head_dim, int v_dim, bool backward);
  int (*branch_row_bytes)(int head_dim, int v_dim);  // of BranchPart::sums, for a column
  void (*branch_forward)(const Branch&, int tile, int kv_head, int chunk, void* scratch);
  void (*branch_backward)(const Branch&, const BranchPart& part, int kv_head, float* sums, void* scratch);
  void (*branch_reduce)(const Branch&, int64_t begin, int64_t end);
  // Scores of a row: the largest of each block (returned: of all, NaN where one is); the sums of e^(score / temperature −
  // best) of each block; some scores as float32; such exponentials of `count` scores.
  float (*score_peaks)(const Scores&, int64_t row, float* peaks);
  void (*score_masses)(const Scores&, int64_t row, float temperature, float best, float* masses);
  void (*score_read)(const Scores&, int64_t row, int64_t begin, int64_t end, float* to);
  void (*exponentials)(const float* scores, int64_t count, float temperature, float best, float* to);
};

// Those that were compiled, each code of its instruction set: see compiled() in attention.cpp.
const Kernels& kernels_plain();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_avx512bf16();
const Kernels& kernels_amx();
const Kernels& kernels_wide();
const Kernels& kernels_wide_amx();

}  // namespace anabranch::cpu
