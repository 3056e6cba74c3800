// anabranch._cpu: raw pointers in, nothing of torch linked. Python (backends/cpu.py) checks and keeps tensors alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "cpu/attention.hpp"
#include "cpu/parallel.hpp"

namespace py = pybind11;
using namespace anabranch::cpu;

namespace {

using Address = uintptr_t;
using Strided = std::array<int64_t, 3>;  // address, row stride, head stride (elements)
using Paged = std::array<int64_t, 4>;    // address, page stride, slot stride, head stride (elements)

template <class X>
X* pointer(int64_t address) {
  return reinterpret_cast<X*>(static_cast<Address>(address));
}

Pool pool(const Paged& p) { return {pointer<void>(p[0]), p[1], p[2], p[3]}; }

int log2_or_minus_one(int n) {
  for (int s = 0; s < 31; ++s)
    if (n == 1 << s) return s;
  return -1;
}

void py_attention(int type, int head_dim, int num_q_heads, int num_kv_heads, int page_size, const Strided& q,
                  const Paged& k, const Paged& v, const std::array<int64_t, 9>& plan, int num_items, int num_merge,
                  float scale, float softcap, int64_t window, int64_t sinks, int64_t out, int64_t lse, int threads) {
  Attention a{};
  a.type = Type(type);
  a.head_dim = head_dim;
  a.num_q_heads = num_q_heads;
  a.num_kv_heads = num_kv_heads;
  a.group = num_q_heads / num_kv_heads;
  a.q = pointer<void>(q[0]);
  a.q_row = q[1];
  a.q_head = q[2];
  a.k = pool(k);
  a.v = pool(v);
  a.page_size = page_size;
  a.page_shift = log2_or_minus_one(page_size);
  const int32_t** arrays[] = {&a.items, &a.kv_slots,      &a.kv_positions, &a.rows,     &a.limits,
                              &a.dest,  &a.row_positions, &a.merge_rows,   &a.merge_ptr};
  for (size_t i = 0; i < plan.size(); ++i) *arrays[i] = pointer<int32_t>(plan[i]);
  a.num_items = num_items;
  a.num_merge = num_merge;
  a.scale = scale;
  a.softcap = softcap;
  a.windowed = window >= 0;
  a.window = int(window > INT32_MAX ? INT32_MAX : window);
  a.sinks = pointer<float>(sinks);
  a.out = pointer<void>(out);
  a.lse = pointer<float>(lse);
  py::gil_scoped_release release;
  attention(a, threads);
}

void py_write(int type, int head_dim, int num_kv_heads, int page_size, const Strided& src, const Paged& dst,
              int64_t slots, int64_t rows, int threads) {
  Write w{Type(type), head_dim, num_kv_heads, page_size, pointer<void>(src[0]), src[1], src[2], pool(dst),
          pointer<int32_t>(slots)};
  py::gil_scoped_release release;
  write(w, rows, threads);
}

void py_copy(int64_t data, int64_t planes, int64_t heads, const std::array<int64_t, 4>& byte_strides, int64_t src,
             int64_t dst, int64_t filled, int64_t count, int threads) {
  Copy c{pointer<char>(data), planes, heads, byte_strides[0], byte_strides[1], byte_strides[2], byte_strides[3],
         pointer<int32_t>(src), pointer<int32_t>(dst), pointer<int32_t>(filled)};
  py::gil_scoped_release release;
  copy_pages(c, count, threads);
}

void py_linear(int type, int64_t rows, int64_t n, int64_t k, int64_t x, int64_t x_row, int64_t w, int64_t w_row,
               int64_t bias, int64_t out, int threads) {
  Linear l{Type(type), rows, n, k, pointer<void>(x), pointer<void>(w), pointer<void>(bias), pointer<void>(out),
           x_row, w_row, n, nullptr};
  py::gil_scoped_release release;
  linear(l, threads);
}

py::dict info() {
  py::list all, here;
  for (const Kernels* k : compiled()) {
    all.append(k->isa);
    if (runnable(*k)) here.append(k->isa);
  }
  py::dict d;
  d["isa"] = active().isa;
  d["vector_bytes"] = active().vector_bytes;
  d["compiled"] = all;
  d["runnable"] = here;
  d["parallel"] = parallel_info();
  return d;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels: tree attention, KV write, page copy. Addresses and element strides; see backends/cpu.py.";
  m.def("attention", &py_attention, py::arg("type"), py::arg("head_dim"), py::arg("num_q_heads"),
        py::arg("num_kv_heads"), py::arg("page_size"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("plan"),
        py::arg("num_items"), py::arg("num_merge"), py::arg("scale"), py::arg("softcap"), py::arg("window"),
        py::arg("sinks"), py::arg("out"), py::arg("lse"), py::arg("threads"),
        "softcap 0 and window −1 mean off; sinks and lse may be 0; type 0 float32, 1 bfloat16, 2 float16.");
  m.def("write_kv", &py_write, py::arg("type"), py::arg("head_dim"), py::arg("num_kv_heads"), py::arg("page_size"),
        py::arg("src"), py::arg("dst"), py::arg("slots"), py::arg("rows"), py::arg("threads"));
  m.def("copy_pages", &py_copy, py::arg("data"), py::arg("planes"), py::arg("heads"), py::arg("byte_strides"),
        py::arg("src"), py::arg("dst"), py::arg("filled"), py::arg("count"), py::arg("threads"),
        "byte_strides: plane, page, head, token.");
  m.def("linear", &py_linear, py::arg("type"), py::arg("rows"), py::arg("n"), py::arg("k"), py::arg("x"),
        py::arg("x_row"), py::arg("w"), py::arg("w_row"), py::arg("bias"), py::arg("out"), py::arg("threads"),
        "out [rows, n] contiguous = x [rows, k] times w [n, k] transposed, plus bias [n] (0: none); type 1 or 2.");
  m.def("use", &use, py::arg("isa"), "Choose the instruction set by name; '' returns to the default.");
  m.def("info", &info, "isa, vector_bytes, compiled, runnable, parallel.");
}
