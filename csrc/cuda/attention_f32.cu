#include "cuda/launch.cuh"

namespace anabranch::cuda {
template void attention_of<float>(Attention, const Device&, const Layout&, void*);
}
