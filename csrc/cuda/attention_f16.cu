#include "cuda/launch.cuh"

namespace anabranch::cuda {
template void attention_of<f16>(Attention, const Device&, const Layout&, void*);
}
