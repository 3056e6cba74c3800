// A forward's kernel calls, noted once and made again: what a CUDA graph is on a GPU. Between two runs only addresses of
// inputs and output change, and the step's plan; nothing of Python is in between.
#pragma once

#include <array>
#include <cstdint>
#include <utility>
#include <variant>
#include <vector>

#include "cpu/attention.hpp"

namespace anabranch::cpu {

// A number of a call: bases[base] + offset. Base 0 is 0: an address that stays, or a size.
struct Argument {
  int base;
  int64_t offset;
};

// What a step brings besides its inputs: arrays of the plan as in Attention, slots of the new rows.
struct StepArrays {
  std::array<const int32_t*, 9> plan;
  int strip_shift, num_items, num_merge;
  const int32_t* slots;
};

void set_plan(Attention& a, const StepArrays& step);

class Recording {
 public:
  static constexpr size_t MOST_ARGUMENTS = 64;

  // A function without result of so many 64-bit integers and pointers; throws std::invalid_argument past MOST_ARGUMENTS.
  void kernel(void* function, std::vector<Argument> arguments);
  // Layers of one x; x, weights, bias and out in place of the layers' own pointers.
  struct Layer {
    int64_t n;
    Argument w;
    int64_t w_row;
    Argument bias, out;
  };
  void linear(Type type, int64_t rows, int64_t k, Argument x, int64_t x_row, std::vector<Layer> layers);
  // K and V into their slots, then attention; q, k, v and out in place of the structs' own pointers.
  struct Tree {
    Attention attention;
    Write k, v;
    int64_t rows;
    Argument q, from_k, from_v, out;
  };
  void tree(Tree call);

  // Makes all calls in order. bases[0] must be 0.
  void run(const std::vector<int64_t>& bases, const StepArrays& step, int threads) const;
  size_t size() const { return calls_.size(); }

 private:
  struct Kernel {
    void* function;
    std::vector<Argument> arguments;
  };
  struct Linears {
    std::vector<Linear> layers;
    Argument x;
    std::vector<Layer> places;
  };
  std::vector<std::variant<Kernel, Linears, Tree>> calls_;
};

}  // namespace anabranch::cpu
