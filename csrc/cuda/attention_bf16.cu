#include "cuda/launch.cuh"

namespace anabranch::cuda {
template void attention_of<bf16>(Attention, const Device&, const Layout&, void*);
}
