// Entry points over whole tensors: threads, scratch and the choice of the instruction set.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.hpp"

namespace anabranch::cpu {

// The kernels of an instruction set. `kernels` is itself code of that set: called where it does not run, it ends the
// process by an illegal instruction.
struct Variant {
  const char* isa;
  const Kernels& (*kernels)();
};

std::vector<Variant> compiled();            // in order of preference, best last
bool runnable(const std::string& isa);
const Kernels& active();                    // ANABRANCH_CPU_ISA, or the best that runs here
void use(const std::string& isa);           // "" = the default again; both throw std::invalid_argument

// Needs part_m, part_l, part_acc unset: they live in scratch here. `partials` = merge_ptr[num_merge].
void attention(Attention& a, int threads);

void write(const Write& k, const Write& v, int64_t rows, int threads);  // of one type; v.src null: K alone

// pool [planes, pages, heads, page_size, D] with byte strides for the first three and tokens of `row` bytes in a run.
struct Copy {
  char* data;
  int64_t planes, heads, plane, page, head, row;
  const int32_t *src, *dst, *filled;
  float* scales;  // [planes, pages, heads, page_size] with element strides for the first three, or null
  int64_t scale_plane, scale_page, scale_head;
};
void copy_pages(const Copy& c, int64_t count, int threads);

// Asks the system to back memory with large pages, where it can; false where it cannot. Its contents stay.
bool large_pages(void* data, int64_t bytes);

// Has the system hand out the memory of a range now, whatever is or gets written to it; whether it did.
bool populate(void* data, int64_t bytes);

// tokens [T], the mask in row form; what the plan, threads and scratch decide of `b` is set here.
void branch_forward(Branch& b, const BranchMaskView& mask, int threads);
void branch_backward(Branch& b, const BranchMaskView& mask, int threads);

// Of one x: type, rows, k, x and x_row are the same for all layers; wide is set here.
void linear(const std::vector<Linear>& layers, int threads);

// Of each row of scores: the best one (NaN where a score is NaN) and the first token that has it.
void score_best(const Scores& s, float* best, int64_t* token, int threads);
// log Σ e^score of each row.
void score_logsumexp(const Scores& s, float* sum, int threads);
// The best one, and the token that uniform[row] draws from softmax(scores / temperature), cut to the top_k highest (0: all;
// all that equal the last stay) and then to the likeliest that hold top_p (1: all). −1 where rounding or the order of
// equal scores would decide, and where the best is not finite.
void score_draw(const Scores& s, float temperature, int64_t top_k, double top_p, const double* uniform, float* best,
                int64_t* token, int threads);

}  // namespace anabranch::cpu
