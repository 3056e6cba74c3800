// anabranch._cpu: raw pointers in, nothing of torch linked. Python (backends/cpu.py) checks and keeps tensors alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <chrono>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/attention.hpp"
#include "cpu/openmp.hpp"
#include "cpu/parallel.hpp"
#include "cpu/recording.hpp"

namespace py = pybind11;
using namespace anabranch::cpu;
using anabranch::BranchMaskView;

namespace {

using Address = uintptr_t;
using Strided3 = std::array<int64_t, 3>;  // address, row stride, head stride (elements)
using Paged = std::array<int64_t, 4>;    // address, page stride, slot stride, head stride (elements)

template <class X>
X* pointer(int64_t address) {
  return reinterpret_cast<X*>(static_cast<Address>(address));
}

// What quantised K and V have beside their pages: the type there (enum Stored), and for each the address of the factors
// and element strides of page, slot and head.
using Quantised = std::array<int64_t, 9>;
constexpr Quantised NOT_QUANTISED = {-1};

Pool pool(const Paged& p, const Quantised& q, size_t factors) {
  return {pointer<void>(p[0]), p[1], p[2], p[3], pointer<float>(q[factors]), q[factors + 1], q[factors + 2], q[factors + 3]};
}

int log2_or_minus_one(int n) {
  for (int s = 0; s < 31; ++s)
    if (n == 1 << s) return s;
  return -1;
}

// Addresses of the plan's nine arrays, tokens of a strip.
using PlanArrays = std::array<int64_t, 10>;

StepArrays step_arrays(const PlanArrays& plan, int num_items, int num_merge, int64_t slots = 0) {
  StepArrays step{{}, log2_or_minus_one(int(plan.back())), num_items, num_merge, pointer<int32_t>(slots)};
  for (size_t i = 0; i < step.plan.size(); ++i) step.plan[i] = pointer<int32_t>(plan[i]);
  return step;
}

// All but the plan.
Attention attention_of(int type, int head_dim, int num_q_heads, int num_kv_heads, int page_size, const Strided3& q,
                       const Paged& k, const Paged& v, float scale, float softcap, int64_t window, int64_t sinks,
                       int64_t out, int64_t lse, int v_dim, const Quantised& quantised) {
  Attention a{};
  a.type = Type(type);
  a.stored = Stored(quantised[0]);
  a.head_dim = head_dim;
  a.v_dim = v_dim;
  a.num_q_heads = num_q_heads;
  a.num_kv_heads = num_kv_heads;
  a.group = num_q_heads / num_kv_heads;
  a.q = pointer<void>(q[0]);
  a.q_row = q[1];
  a.q_head = q[2];
  a.k = pool(k, quantised, 1);
  a.v = pool(v, quantised, 5);
  a.page_size = page_size;
  a.page_shift = log2_or_minus_one(page_size);
  a.scale = scale;
  a.softcap = softcap;
  a.windowed = window >= 0;
  a.window = int(window > INT32_MAX ? INT32_MAX : window);
  a.sinks = pointer<float>(sinks);
  a.out = pointer<void>(out);
  a.lse = pointer<float>(lse);
  return a;
}

void py_attention(int type, int head_dim, int num_q_heads, int num_kv_heads, int page_size, const Strided3& q,
                  const Paged& k, const Paged& v, const PlanArrays& plan, int num_items, int num_merge, float scale,
                  float softcap, int64_t window, int64_t sinks, int64_t out, int64_t lse, int threads, int v_dim,
                  const Quantised& quantised) {
  Attention a = attention_of(type, head_dim, num_q_heads, num_kv_heads, page_size, q, k, v, scale, softcap, window, sinks,
                             out, lse, v_dim, quantised);
  set_plan(a, step_arrays(plan, num_items, num_merge));
  py::gil_scoped_release release;
  attention(a, threads);
}

Write write_of(int type, int head_dim, int num_kv_heads, int page_size, const Strided3& src, const Pool& dst, int64_t slots,
               const Quantised& quantised) {
  return {Type(type), Stored(quantised[0]), head_dim, num_kv_heads, page_size, pointer<void>(src[0]), src[1],
          src[2],     dst, pointer<int32_t>(slots)};
}

void py_write(int type, const std::array<int, 2>& head_dims, int num_kv_heads, int page_size, const Strided3& k, const Strided3& v,
              const Paged& k_pages, const Paged& v_pages, int64_t slots, int64_t rows, int threads,
              const Quantised& quantised) {
  const auto one = [&](const Strided3& src, int head_dim, const Pool& dst) {
    return write_of(type, head_dim, num_kv_heads, page_size, src, dst, slots, quantised);
  };
  py::gil_scoped_release release;
  write(one(k, head_dims[0], pool(k_pages, quantised, 1)), one(v, head_dims[1], pool(v_pages, quantised, 5)), rows,
        threads);
}

using Place = std::pair<int, int64_t>;  // an Argument

Argument argument(const Place& p) { return {p.first, p.second}; }

void record_kernel(Recording& r, int64_t function, const std::vector<Place>& arguments) {
  std::vector<Argument> all;
  for (const Place& p : arguments) all.push_back(argument(p));
  r.kernel(pointer<void>(function), std::move(all));
}

void record_linear(Recording& r, int type, int64_t rows, int64_t k, const Place& x, int64_t x_row,
                   const std::vector<std::tuple<int64_t, Place, int64_t, Place, Place>>& layers) {
  std::vector<Recording::Layer> all;
  for (const auto& [n, w, w_row, bias, out] : layers)
    all.push_back({n, argument(w), w_row, argument(bias), argument(out)});
  r.linear(Type(type), rows, k, argument(x), x_row, std::move(all));
}

void record_tree(Recording& r, int type, int num_q_heads, int num_kv_heads, int page_size, const std::array<int, 2>& head_dims,
                 int64_t rows, const std::array<Place, 4>& q_k_v_out, const std::array<std::array<int64_t, 2>, 3>& strides,
                 const Paged& k_pages, const Paged& v_pages, float scale, float softcap, int64_t window, int64_t sinks,
                 const Quantised& quantised) {
  const auto of = [&](int i) { return Strided3{0, strides[size_t(i)][0], strides[size_t(i)][1]}; };
  const Attention a = attention_of(type, head_dims[0], num_q_heads, num_kv_heads, page_size, of(0), k_pages, v_pages, scale,
                                   softcap, window, sinks, 0, 0, head_dims[1], quantised);
  r.tree({a, write_of(type, head_dims[0], num_kv_heads, page_size, of(1), a.k, 0, quantised),
          write_of(type, head_dims[1], num_kv_heads, page_size, of(2), a.v, 0, quantised), rows,
          argument(q_k_v_out[0]), argument(q_k_v_out[1]), argument(q_k_v_out[2]), argument(q_k_v_out[3])});
}

void run_recording(const Recording& r, const std::vector<int64_t>& bases, const PlanArrays& plan, int num_items, int num_merge,
                   int64_t slots, int threads) {
  const StepArrays step = step_arrays(plan, num_items, num_merge, slots);
  py::gil_scoped_release release;
  r.run(bases, step, threads);
}

void py_copy(int64_t data, int64_t planes, int64_t heads, const std::array<int64_t, 4>& byte_strides, int64_t src,
             int64_t dst, int64_t filled, int64_t count, int threads, const std::array<int64_t, 4>& scales) {
  Copy c{pointer<char>(data), planes, heads, byte_strides[0], byte_strides[1], byte_strides[2], byte_strides[3],
         pointer<int32_t>(src), pointer<int32_t>(dst), pointer<int32_t>(filled), pointer<float>(scales[0]), scales[1],
         scales[2], scales[3]};
  py::gil_scoped_release release;
  copy_pages(c, count, threads);
}

void py_linear(int type, int64_t rows, int64_t n, int64_t k, int64_t x, int64_t x_row, int64_t w, int64_t w_row,
               int64_t bias, int64_t out, int threads) {
  py::gil_scoped_release release;
  linear({{Type(type), rows, n, k, pointer<void>(x), pointer<void>(w), pointer<void>(bias), pointer<void>(out), x_row,
           w_row, n, nullptr, 0}}, threads);
}

void py_linear_of_one(int type, int64_t rows, int64_t k, int64_t x, int64_t x_row,
                      const std::vector<std::array<int64_t, 5>>& layers, int threads) {
  std::vector<Linear> all;
  for (const auto& [n, w, w_row, bias, out] : layers)
    all.push_back({Type(type), rows, n, k, pointer<void>(x), pointer<void>(w), pointer<void>(bias), pointer<void>(out),
                   x_row, w_row, n, nullptr, 0});
  py::gil_scoped_release release;
  linear(all, threads);
}

Scores scores(int type, const std::array<int64_t, 4>& x) {
  return {Type(type), pointer<void>(x[0]), x[1], x[2], x[3]};
}

void py_score_best(int type, const std::array<int64_t, 4>& x, int64_t best, int64_t token, int threads) {
  const Scores s = scores(type, x);
  py::gil_scoped_release release;
  score_best(s, pointer<float>(best), pointer<int64_t>(token), threads);
}

void py_score_logsumexp(int type, const std::array<int64_t, 4>& x, int64_t sum, int threads) {
  const Scores s = scores(type, x);
  py::gil_scoped_release release;
  score_logsumexp(s, pointer<float>(sum), threads);
}

void py_score_draw(int type, const std::array<int64_t, 4>& x, float temperature, int64_t top_k, double top_p,
                   int64_t uniform, int64_t best, int64_t token, int threads) {
  const Scores s = scores(type, x);
  py::gil_scoped_release release;
  score_draw(s, temperature, top_k, top_p, pointer<double>(uniform), pointer<float>(best), pointer<int64_t>(token),
             threads);
}

// For tests: which thread ran each piece of a region; every piece takes so long, and piece `fails` throws.
std::vector<int> py_pieces(int threads, int64_t count, int64_t piece_us, int64_t fails, bool nested) {
  struct Region {
    std::vector<int> by;
    int64_t piece_us, fails;
    bool nested;
  } region{std::vector<int>(static_cast<size_t>(count), -1), piece_us, fails, nested};
  py::gil_scoped_release release;
  parallel(threads, count, [](void* p, int thread, int64_t piece) {
    Region& r = *static_cast<Region*>(p);
    const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(r.piece_us);
    while (std::chrono::steady_clock::now() < end) {}
    if (piece == r.fails) throw std::runtime_error("piece " + std::to_string(piece) + " failed");
    if (r.nested) {
      int sum = 0;
      std::mutex guard;
      std::pair<int*, std::mutex*> both{&sum, &guard};
      parallel(2, 4, [](void* q, int, int64_t i) {
        auto& [total, lock] = *static_cast<std::pair<int*, std::mutex*>*>(q);
        std::lock_guard<std::mutex> held(*lock);
        *total += int(i);
      }, &both);
      if (sum != 6) throw std::runtime_error("a region inside a region lost a piece");
    }
    r.by[size_t(piece)] = thread;
  }, &region);
  return region.by;
}

std::string py_choose_threads(const std::string& whose) {
  const std::array<std::string, 3> names{"auto", "pool", "openmp"};
  const auto at = std::find(names.begin(), names.end(), whose);
  if (at == names.end()) throw std::invalid_argument("choose_threads(whose='" + whose + "'): 'auto', 'pool' or 'openmp'");
  return names[size_t(choose_threads(Threads(at - names.begin())))];
}

// (starts int64 [segments + 1], ptr int32, intervals int32, positions int64 [T]: addresses; number of segments)
using MaskArrays = std::array<int64_t, 5>;

// q, k, v: address, row stride, head stride (elements).
Branch branch(int type, const std::array<int, 4>& shape, const std::array<Strided3, 3>& qkv, const MaskArrays& mask,
              float scale, float softcap, int64_t window, int64_t sinks, int64_t out, int64_t lse) {
  Branch b{};
  b.type = Type(type);
  b.head_dim = shape[0];
  b.v_dim = shape[1];
  b.num_q_heads = shape[2];
  b.num_kv_heads = shape[3];
  b.group = shape[2] / shape[3];
  const auto strided = [](const Strided3& x) { return Strided{pointer<void>(x[0]), x[1], x[2]}; };
  b.q = strided(qkv[0]);
  b.k = strided(qkv[1]);
  b.v = strided(qkv[2]);
  b.positions = pointer<int64_t>(mask[3]);
  b.scale = scale;
  b.softcap = softcap;
  b.windowed = window >= 0;
  b.window = int(window > INT32_MAX ? INT32_MAX : window);
  b.sinks = pointer<float>(sinks);
  b.out = pointer<void>(out);
  b.lse = pointer<float>(lse);
  return b;
}

BranchMaskView view(const MaskArrays& m) {
  return {pointer<int64_t>(m[0]), pointer<int32_t>(m[1]), pointer<int32_t>(m[2]), m[4], false};
}

void py_branch_forward(int type, const std::array<int, 4>& shape, const std::array<Strided3, 3>& qkv,
                       const MaskArrays& mask, float scale, float softcap, int64_t window, int64_t sinks, int64_t out,
                       int64_t lse, int threads) {
  Branch b = branch(type, shape, qkv, mask, scale, softcap, window, sinks, out, lse);
  py::gil_scoped_release release;
  branch_forward(b, view(mask), threads);
}

void py_branch_backward(int type, const std::array<int, 4>& shape, const std::array<Strided3, 3>& qkv,
                        const MaskArrays& mask, float scale, float softcap, int64_t window, int64_t sinks, int64_t out,
                        int64_t lse, const Strided3& grad, int64_t grad_lse, int64_t delta,
                        const std::array<int64_t, 3>& grads, int threads) {
  Branch b = branch(type, shape, qkv, mask, scale, softcap, window, sinks, out, lse);
  b.grad = {pointer<void>(grad[0]), grad[1], grad[2]};
  b.grad_lse = pointer<float>(grad_lse);
  b.delta = pointer<float>(delta);
  b.dq = pointer<void>(grads[0]);
  b.dk = pointer<void>(grads[1]);
  b.dv = pointer<void>(grads[2]);
  py::gil_scoped_release release;
  branch_backward(b, view(mask), threads);
}

py::dict info() {
  py::list all, here;
  for (const Variant& each : compiled()) {
    all.append(each.isa);
    if (runnable(each.isa)) here.append(each.isa);
  }
  py::dict d;
  d["isa"] = active().isa;
  d["vector_bytes"] = active().vector_bytes;
  d["compiled"] = all;
  d["runnable"] = here;
  d["parallel"] = parallel_info();
  d["openmp"] = openmp_library();
  d["openmp_regions"] = openmp_regions();
  return d;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels: tree attention, branch attention, KV write, page copy. Addresses and element strides; see backends/cpu.py.";
  m.def("attention", &py_attention, py::arg("type"), py::arg("head_dim"), py::arg("num_q_heads"),
        py::arg("num_kv_heads"), py::arg("page_size"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("plan"),
        py::arg("num_items"), py::arg("num_merge"), py::arg("scale"), py::arg("softcap"), py::arg("window"),
        py::arg("sinks"), py::arg("out"), py::arg("lse"), py::arg("threads"), py::arg("v_dim"),
        py::arg("quantised") = NOT_QUANTISED,
        "head_dim: of Q and K; v_dim: of V and out. plan: addresses of its nine arrays, tokens of a strip. softcap 0 and "
        "window −1 mean off; sinks and lse may be 0; type 0 float32, 1 bfloat16, 2 float16. quantised: −1, or "
        "0 int8, 1 float8 e4m3; then for K and for V: address and strides (page, slot, head) of the float32 factors.");
  m.def("write_kv", &py_write, py::arg("type"), py::arg("head_dims"), py::arg("num_kv_heads"), py::arg("page_size"),
        py::arg("k"), py::arg("v"), py::arg("k_pages"), py::arg("v_pages"), py::arg("slots"), py::arg("rows"),
        py::arg("threads"), py::arg("quantised") = NOT_QUANTISED, "head_dims: of K, of V; v may be 0: K alone. quantised: as for attention.");
  py::class_<Recording>(m, "Recording",
                        "Kernel calls that are made again and again. A place is (base, offset): the address bases[base] + "
                        "offset of a run; base 0 is 0, so that offset is an address that stays, or a number.")
      .def(py::init<>())
      .def("kernel", &record_kernel, py::arg("function"), py::arg("arguments"),
           "A C function of 64-bit integers and pointers: its address, and a place for each.")
      .def("linear", &record_linear, py::arg("type"), py::arg("rows"), py::arg("k"), py::arg("x"), py::arg("x_row"),
           py::arg("layers"), "As linear_of_one, with places: (n, w, w_row, bias, out) of each layer.")
      .def("tree", &record_tree, py::arg("type"), py::arg("num_q_heads"), py::arg("num_kv_heads"), py::arg("page_size"),
           py::arg("head_dims"), py::arg("rows"), py::arg("q_k_v_out"), py::arg("strides"), py::arg("k_pages"),
           py::arg("v_pages"), py::arg("scale"), py::arg("softcap"), py::arg("window"), py::arg("sinks"),
           py::arg("quantised") = NOT_QUANTISED,
           "write_kv, then attention. head_dims: of K, of V; strides: row and head of q, k, v; the plan comes with a run.")
      .def("run", &run_recording, py::arg("bases"), py::arg("plan"), py::arg("num_items"), py::arg("num_merge"),
           py::arg("slots"), py::arg("threads"), "All calls in order; plan, num_items, num_merge as for attention.")
      .def("__len__", &Recording::size)
      .def_property_readonly_static("most_arguments", [](const py::object&) { return Recording::MOST_ARGUMENTS; });
  m.def("copy_pages", &py_copy, py::arg("data"), py::arg("planes"), py::arg("heads"), py::arg("byte_strides"),
        py::arg("src"), py::arg("dst"), py::arg("filled"), py::arg("count"), py::arg("threads"),
        py::arg("scales") = std::array<int64_t, 4>{},
        "byte_strides: plane, page, head, token. scales: address of the float32 factors (0: none), strides of plane, page, "
        "head.");
  m.def("linear", &py_linear, py::arg("type"), py::arg("rows"), py::arg("n"), py::arg("k"), py::arg("x"),
        py::arg("x_row"), py::arg("w"), py::arg("w_row"), py::arg("bias"), py::arg("out"), py::arg("threads"),
        "out [rows, n] contiguous = x [rows, k] times w [n, k] transposed, plus bias [n] (0: none).");
  m.def("linear_of_one", &py_linear_of_one, py::arg("type"), py::arg("rows"), py::arg("k"), py::arg("x"),
        py::arg("x_row"), py::arg("layers"), py::arg("threads"),
        "Several layers of one x in one parallel region; layers: (n, w, w_row, bias, out) of each, as for linear.");
  m.def("branch_forward", &py_branch_forward, py::arg("type"), py::arg("shape"), py::arg("qkv"), py::arg("mask"),
        py::arg("scale"), py::arg("softcap"), py::arg("window"), py::arg("sinks"), py::arg("out"), py::arg("lse"),
        py::arg("threads"), "shape: head_dim of K, of V, query heads, KV heads; mask: starts, row_ptr, cols, positions, segments.");
  m.def("branch_backward", &py_branch_backward, py::arg("type"), py::arg("shape"), py::arg("qkv"), py::arg("mask"),
        py::arg("scale"), py::arg("softcap"), py::arg("window"), py::arg("sinks"), py::arg("out"), py::arg("lse"),
        py::arg("grad"), py::arg("grad_lse"), py::arg("delta"), py::arg("grads"), py::arg("threads"),
        "grads: dq, dk, dv; delta [T, query heads] float32 is written too.");
  m.def("large_pages", [](int64_t data, int64_t bytes) { return large_pages(pointer<void>(data), bytes); },
        py::arg("data"), py::arg("bytes"), "Ask the system to back this memory with large pages; whether it will try.");
  m.def(
      "populate",
      [](int64_t data, int64_t bytes) {
        py::gil_scoped_release release;
        return populate(pointer<void>(data), bytes);
      },
      py::arg("data"), py::arg("bytes"), "Have the system hand out this memory now; whether it did.");
  m.def("use", &use, py::arg("isa"), "Choose the instruction set by name; '' returns to the default.");
  m.def("isa", [] { return active().isa; }, "The instruction set in use.");
  m.def("info", &info, "isa, vector_bytes, compiled, runnable, parallel, openmp (torch's library), openmp_regions (run by its threads).");
  m.def("score_best", &py_score_best, py::arg("type"), py::arg("scores"), py::arg("best"), py::arg("token"),
        py::arg("threads"), "scores: address, rows, size, row stride; best float32 [rows], token int64 [rows].");
  m.def("score_logsumexp", &py_score_logsumexp, py::arg("type"), py::arg("scores"), py::arg("sum"),
        py::arg("threads"), "sum float32 [rows].");
  m.def("score_draw", &py_score_draw, py::arg("type"), py::arg("scores"), py::arg("temperature"), py::arg("top_k"),
        py::arg("top_p"), py::arg("uniform"), py::arg("best"), py::arg("token"), py::arg("threads"),
        "uniform float64 [rows]; top_k 0 and top_p 1 are off; token −1: torch has to decide.");
  m.def("openmp_threads", &openmp_threads, py::arg("threads"),
        "Threads of torch's OpenMP regions in this thread from now on; the number before (0: torch has no OpenMP).");
  m.def("choose_threads", &py_choose_threads, py::arg("whose"),
        "Whose threads run the kernels from now on: 'auto', 'pool' or 'openmp'; the choice before.");
  m.def("pieces", &py_pieces, py::arg("threads"), py::arg("count"), py::arg("piece_us") = 0, py::arg("fails") = -1,
        py::arg("nested") = false, "For tests: which thread ran each piece of a region.");
  m.def("delay_workers", &delay_workers, py::arg("before_us") = 0, py::arg("inside_us") = 0,
        "For tests: workers wait before they claim a piece, and inside each.");
}
