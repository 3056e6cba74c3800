#include "cpu/recording.hpp"

#include <stdexcept>
#include <string>
#include <utility>

namespace anabranch::cpu {
namespace {

template <size_t>
using Word = int64_t;

template <size_t... I>
void call(void* function, const int64_t* x, std::index_sequence<I...>) {
  reinterpret_cast<void (*)(Word<I>...)>(function)(x[I]...);
}

using Caller = void (*)(void*, const int64_t*);

template <size_t... N>
constexpr std::array<Caller, sizeof...(N)> callers(std::index_sequence<N...>) {
  return {[](void* function, const int64_t* x) { call(function, x, std::make_index_sequence<N>()); }...};
}

// By the number of arguments. Pointers and int64_t are passed alike on every machine that this package builds for.
constexpr auto CALLERS = callers(std::make_index_sequence<Recording::MOST_ARGUMENTS + 1>());

struct Bases {
  const std::vector<int64_t>& bases;
  int64_t operator()(Argument a) const { return bases[size_t(a.base)] + a.offset; }
  void* pointer(Argument a) const { return reinterpret_cast<void*>((*this)(a)); }
};

}  // namespace

void set_plan(Attention& a, const StepArrays& step) {
  const int32_t** arrays[] = {&a.items, &a.kv_strips,     &a.kv_spelled, &a.rows,     &a.limits,
                              &a.dest,  &a.row_positions, &a.merge_rows, &a.merge_ptr};
  static_assert(std::size(arrays) == std::tuple_size_v<decltype(step.plan)>, "an array a pointer");
  for (size_t i = 0; i < std::size(arrays); ++i) *arrays[i] = step.plan[i];
  a.strip_shift = step.strip_shift;
  a.num_items = step.num_items;
  a.num_merge = step.num_merge;
}

void Recording::kernel(void* function, std::vector<Argument> arguments) {
  if (arguments.size() > MOST_ARGUMENTS)
    throw std::invalid_argument("a kernel of " + std::to_string(arguments.size()) + " arguments; " +
                                std::to_string(MOST_ARGUMENTS) + " at most can be recorded");
  calls_.emplace_back(Kernel{function, std::move(arguments)});
}

void Recording::linear(Type type, int64_t rows, int64_t k, Argument x, int64_t x_row, std::vector<Layer> layers) {
  Linears call{{}, x, std::move(layers)};
  for (const Layer& l : call.places)
    call.layers.push_back({type, rows, l.n, k, nullptr, nullptr, nullptr, nullptr, x_row, l.w_row, l.n, nullptr, 0});
  calls_.emplace_back(std::move(call));
}

void Recording::tree(Tree call) { calls_.emplace_back(std::move(call)); }

void Recording::run(const std::vector<int64_t>& bases, const StepArrays& step, int threads) const {
  const Bases at{bases};
  std::array<int64_t, MOST_ARGUMENTS> words;
  std::vector<Linear> layers;
  for (const auto& any : calls_) {
    if (const auto* kernel = std::get_if<Kernel>(&any)) {
      for (size_t i = 0; i < kernel->arguments.size(); ++i) words[i] = at(kernel->arguments[i]);
      CALLERS[kernel->arguments.size()](kernel->function, words.data());
    } else if (const auto* some = std::get_if<Linears>(&any)) {
      layers = some->layers;
      for (size_t i = 0; i < layers.size(); ++i) {
        layers[i].x = at.pointer(some->x);
        layers[i].w = at.pointer(some->places[i].w);
        layers[i].bias = at.pointer(some->places[i].bias);
        layers[i].out = at.pointer(some->places[i].out);
      }
      anabranch::cpu::linear(layers, threads);
    } else {
      const auto& tree = std::get<Tree>(any);
      Write k = tree.k, v = tree.v;
      k.src = at.pointer(tree.from_k);
      v.src = at.pointer(tree.from_v);
      k.slots = v.slots = step.slots;
      write(k, v, tree.rows, threads);
      Attention a = tree.attention;
      a.q = at.pointer(tree.q);
      a.out = at.pointer(tree.out);
      set_plan(a, step);
      attention(a, threads);
    }
  }
}

}  // namespace anabranch::cpu
