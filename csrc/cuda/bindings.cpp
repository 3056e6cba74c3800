// anabranch._cuda: raw pointers and the current stream in, nothing of torch linked. Python (backends/cuda.py) checks and
// keeps tensors alive. tests/emulator compiles this file too, over its host-side device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <climits>

#include "cuda/launch.hpp"

#ifndef ANABRANCH_CUDA_MODULE
#define ANABRANCH_CUDA_MODULE _cuda
#endif

namespace py = pybind11;
using namespace anabranch::cuda;

namespace {

using Strided = std::array<int64_t, 3>;  // address, row stride, head stride (elements)
using Paged = std::array<int64_t, 4>;    // address, page stride, slot stride, head stride (elements)

template <class X>
X* pointer(int64_t address) {
  return reinterpret_cast<X*>(static_cast<uintptr_t>(address));
}
Pages pages(const Paged& p) { return {pointer<void>(p[0]), p[1], p[2], p[3]}; }
int element_bytes(int type) { return type == 0 ? 4 : 2; }

int log2_or_minus_one(int n) {
  for (int s = 0; s < 31; ++s)
    if (n == 1 << s) return s;
  return -1;
}

// Asked once a device: the answers do not change.
const Device& device_at(int index) {
  static std::array<Device, 64> known{};
  if (index < 0 || index >= int(known.size())) throw std::invalid_argument("device: index out of range");
  if (known[index].multiprocessors == 0) known[index] = device_of(index);
  return known[index];
}

void py_attention(int type, int head_dim, int num_q_heads, int num_kv_heads, int page_size, const Strided& q,
                  const Paged& k, const Paged& v, const std::array<int64_t, 11>& plan, int num_items, int num_merge,
                  float scale, float softcap, int64_t window, int64_t sinks, int64_t out, int64_t lse,
                  const std::array<int64_t, 2>& partials, int device, int64_t stream, int ring, int grid) {
  Attention a{};
  a.q = pointer<void>(q[0]);
  a.q_row = q[1];
  a.q_head = q[2];
  a.k = pages(k);
  a.v = pages(v);
  a.out = pointer<void>(out);
  a.lse = pointer<float>(lse);
  a.part_acc = pointer<float>(partials[0]);
  a.part_ml = pointer<float>(partials[1]);
  const int32_t** arrays[] = {&a.items, &a.kv_strips,     &a.kv_spelled, &a.rows,     &a.limits,
                              &a.dest,  &a.row_positions, &a.merge_rows, &a.merge_ptr};
  for (size_t i = 0; i < std::size(arrays); ++i) *arrays[i] = pointer<int32_t>(plan[i]);
  a.strip_shift = log2_or_minus_one(int(plan[9]));
  a.strip_mask = uint32_t(plan[9] - 1);
  a.counts = pointer<int32_t>(plan[10]);
  a.num_items = num_items;
  a.num_merge = num_merge;
  a.num_q_heads = num_q_heads;
  a.num_kv_heads = num_kv_heads;
  a.group = num_q_heads / num_kv_heads;
  a.head_dim = head_dim;
  a.page_size = page_size;
  a.page_shift = log2_or_minus_one(page_size);
  a.scale = scale;
  a.softcap = softcap;
  a.windowed = window >= 0;
  a.window = int(window > INT_MAX ? INT_MAX : window);
  a.sinks = pointer<float>(sinks);
  attention(Type(type), a, device_at(device), {ring, grid}, pointer<void>(stream));
}

void py_write(int type, int head_dim, int num_kv_heads, int page_size, const Strided& k, const Strided& v,
              const Paged& k_pages, const Paged& v_pages, int64_t slots, int rows, int device, int64_t stream) {
  const WriteKv w{pointer<void>(k[0]), pointer<void>(v[0]), k[1],           k[2],           v[1],
                  v[2],                pages(k_pages),      pages(v_pages), pointer<int32_t>(slots),
                  rows,                num_kv_heads,        page_size,      0};
  write_kv(w, head_dim, element_bytes(type), device_at(device), pointer<void>(stream));
}

void py_copy(int type, int head_dim, int64_t pool, const std::array<int64_t, 4>& strides, int planes, int heads,
             int64_t copies, int count, int device, int64_t stream) {
  const CopyPages c{pointer<char>(pool), strides[0], strides[1], strides[2], strides[3], pointer<int32_t>(copies),
                    count,               planes,     heads,      0};
  copy_pages(c, head_dim, element_bytes(type), device_at(device), pointer<void>(stream));
}

void py_advance(const std::array<int64_t, 5>& arrays, int strip, int64_t tails, int64_t slots, int64_t positions, int branches,
                int device, int64_t stream) {
  const auto array = [&](int i) { return pointer<int32_t>(arrays[i]); };
  const Advance a{array(0),  array(1), array(2), array(3), array(4), pointer<int64_t>(tails), pointer<int32_t>(slots),
                  pointer<int64_t>(positions), branches, log2_or_minus_one(strip)};
  advance(a, device_at(device), pointer<void>(stream));
}

py::dict py_device(int index) {
  const Device& d = device_at(index);
  py::dict out;
  out["arch"] = d.arch;
  out["multiprocessors"] = d.multiprocessors;
  out["shared_block"] = d.shared_block;
  out["shared_multiprocessor"] = d.shared_multiprocessor;
  return out;
}

}  // namespace

#ifdef ANABRANCH_EMULATOR
void bind_emulator(py::module_& m);
#endif

PYBIND11_MODULE(ANABRANCH_CUDA_MODULE, m) {
  m.doc() = "CUDA kernels: tree attention, KV write, page copy. Addresses and element strides; see backends/cuda.py.";
  m.def("attention", &py_attention, py::arg("type"), py::arg("head_dim"), py::arg("num_q_heads"),
        py::arg("num_kv_heads"), py::arg("page_size"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("plan"),
        py::arg("num_items"), py::arg("num_merge"), py::arg("scale"), py::arg("softcap"), py::arg("window"),
        py::arg("sinks"), py::arg("out"), py::arg("lse"), py::arg("partials"), py::arg("device"), py::arg("stream"),
        py::arg("ring") = 0, py::arg("grid") = 0,
        "plan: addresses of its nine arrays, tokens of a strip, address of counts. softcap 0 and window −1 mean off; sinks, "
        "lse and counts may be 0; type 0 float32, "
        "1 bfloat16, 2 float16.");
  m.def("write_kv", &py_write, py::arg("type"), py::arg("head_dim"), py::arg("num_kv_heads"), py::arg("page_size"),
        py::arg("k"), py::arg("v"), py::arg("k_pages"), py::arg("v_pages"), py::arg("slots"), py::arg("rows"),
        py::arg("device"), py::arg("stream"));
  m.def("copy_pages", &py_copy, py::arg("type"), py::arg("head_dim"), py::arg("pool"), py::arg("strides"),
        py::arg("planes"), py::arg("heads"), py::arg("copies"), py::arg("count"), py::arg("device"), py::arg("stream"),
        "strides: plane, page, head, token, in elements; copies: int32 [3, count] on the device.");
  m.def("advance", &py_advance, py::arg("arrays"), py::arg("strip"), py::arg("tails"), py::arg("slots"), py::arg("positions"),
        py::arg("branches"), py::arg("device"), py::arg("stream"),
        "arrays: items, kv_strips, kv_spelled, limits, row_positions of a plan; strip: tokens of a strip. One token more for "
        "every tail.");
  m.def("packed_rows", [](int type, int head_dim) { return packed_rows(Type(type), head_dim); }, py::arg("type"),
        py::arg("head_dim"), "Packed query rows a pass: a plan's tile.");
  m.def(
      "layout",
      [](int type, int head_dim, int shared_block, int shared_multiprocessor, int blocks) {
        const Chosen c = layout_of(Type(type), head_dim, {0, 1, shared_block, shared_multiprocessor}, blocks);
        return py::make_tuple(c.ring, c.shared);
      },
      py::arg("type"), py::arg("head_dim"), py::arg("shared_block"), py::arg("shared_multiprocessor"),
      py::arg("blocks"),
      "(tiles in the ring, bytes of shared memory) that a launch would choose on such a GPU, whose multiprocessors have "
      "registers for so many blocks.");
  m.def("device", &py_device, py::arg("index"));
  m.def("device_count", &device_count, "−1: no driver that this build can use.");
  m.def("architectures", &architectures);
#ifdef ANABRANCH_EMULATOR
  bind_emulator(m);
#endif
}
