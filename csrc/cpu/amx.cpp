// The kernels of processors with AMX: another instruction set's, but for bfloat16 attention of many rows and bfloat16
// linear layers. Compiled twice (see CMakeLists.txt): for AMX, and with arrays for its registers, for tests.
#include "cpu/amx_attention.hpp"
#include "cpu/amx_linear.hpp"
#include "cpu/isa.hpp"

namespace anabranch::cpu {
namespace {

const Kernels& other() { return ANABRANCH_NAMED(kernels_, ANABRANCH_BASE)(); }

size_t scratch_bytes(int packed_rows, int head_dim, int v_dim, int heads) {
  size_t bytes;
  AmxScratch(nullptr, packed_rows, head_dim, v_dim, &bytes);
  const size_t others = other().scratch_bytes(packed_rows, head_dim, v_dim, heads);
  return bytes > others ? bytes : others;
}

// Few rows stay with the other: bound by memory, they would leave most of a register idle.
void unit(const Attention& a, int item, int begin, int end, void* scratch) {
  if (a.type == Type::bf16 && a.stored == Stored::as_is && parts_of(a, item) == 0) {
    const Unit u(a, item, begin);
    if (u.packed > STREAM_ROWS) return amx_unit(a, u, scratch);
  }
  other().unit(a, item, begin, end, scratch);
}

size_t linear_wide(const Linear& l) {
  return l.type == Type::bf16 ? amx_wide(l.rows, l.k) : other().linear_wide(l);
}

void linear_pack(const Linear& l, int64_t begin, int64_t end) {
  if (l.type == Type::bf16) return amx_pack(l, begin, end);
  other().linear_pack(l, begin, end);
}

void linear(const Linear& l, int64_t begin, int64_t end, void* scratch) {
  if (l.type == Type::bf16) return amx_columns(l, begin, end);
  other().linear(l, begin, end, scratch);
}

}  // namespace

const Kernels& ANABRANCH_NAMED(kernels_, ANABRANCH_ISA)() {
  static const Kernels table = [] {
    Kernels k = other();
    k.isa = ANABRANCH_STRING(ANABRANCH_ISA);
    k.scratch_bytes = scratch_bytes;
    k.unit = unit;
    k.linear_wide = linear_wide;
    k.linear_pack = linear_pack;
    k.linear = linear;
    return k;
  }();
  return table;
}

}  // namespace anabranch::cpu
