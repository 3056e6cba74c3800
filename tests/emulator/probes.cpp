// Small kernels that do one thing right or wrong, to test the host-side device itself.
#include "probes.hpp"

#include <map>

#include "cuda/ptx.cuh"

namespace ptx = anabranch::cuda::ptx;
using anabranch::cuda::Float4;
using anabranch::cuda::Site;
using anabranch::cuda::u32;

namespace {

struct Probe {
  float* data;
  int n;
};
float* shared() { return reinterpret_cast<float*>(ptx::shared_memory()); }
bool first() { return ptx::thread() == 0; }

void store_at(Probe p) {
  if (ptx::thread() == 5) ptx::store(p.data + p.n, 1.0f);
}
void load_at(Probe p) {
  if (ptx::thread() == 5) ptx::store(p.data, ptx::load(p.data + p.n));
}
void shared_at(Probe p) {
  if (ptx::thread() == 5) ptx::store(shared() + p.n, 1.0f);
}
void misaligned(Probe p) {
  if (ptx::thread() == 5) ptx::load(reinterpret_cast<const Float4*>(p.data + 1));
}
void unwritten(Probe p) {
  if (first()) ptx::store(p.data, ptx::load(shared()));
}
void order(Probe p) {  // who comes last decides: data[0] depends on the seed
  ptx::store(p.data, static_cast<float>(ptx::thread()));
}
void handed_over(Probe p, bool barrier) {  // warp 0 writes, the others read
  if (ptx::thread() < 32) ptx::store(shared() + ptx::thread(), static_cast<float>(ptx::thread()));
  if (barrier) ptx::sync_block(Site::tile_visible);
  ptx::store(p.data + ptx::thread(), ptx::load(shared() + ptx::thread() % 32));
}
void copied(Probe p, bool wait) {  // data[0 : 4] through shared memory to data[4 : 8]
  if (!first()) return;
  ptx::copy_async(shared(), p.data, 16);
  ptx::copy_commit();
  if (wait) ptx::copy_wait<0>(0, Site::tile_landed);
  ptx::store(reinterpret_cast<Float4*>(p.data + 4), ptx::load(reinterpret_cast<const Float4*>(shared())));
  ptx::copy_wait<0>(0, Site::none);
}
void never_waits(Probe p) {
  ptx::copy_async(shared() + 4 * ptx::thread(), p.data, 16);
  ptx::copy_commit();
}
void groups(Probe p) {  // two groups: the wait leaves the later one on its way
  if (!first()) return;
  for (int i = 0; i < 2; ++i) {
    ptx::copy_async(shared() + 4 * i, p.data + 4 * i, i == 0 ? 16 : 0);
    ptx::copy_commit();
  }
  ptx::copy_wait<1>(1, Site::tile_landed);
  ptx::store(p.data + 8, ptx::load(shared()));
  ptx::store(p.data + 9, ptx::load(shared() + 4));
  ptx::copy_wait<0>(0, Site::none);
  ptx::store(p.data + 10, ptx::load(shared() + 4));
}
void lost_thread(Probe) {
  if (ptx::thread() == 3) return;
  ptx::sync_block(Site::tile_visible);
}
void two_barriers(Probe) { ptx::sync_block(ptx::thread() < 64 ? Site::tile_visible : Site::ring_done); }
void split_warp(Probe) {
  if (ptx::thread() % 32 < 7)
    ptx::any(true);
  else
    ptx::shuffle_xor(1.0f, 1);
}
void collectives(Probe p) {  // data[t] = the sum over the warp; data[128 + t] = whether anybody is thread n
  float v = static_cast<float>(ptx::thread());
  for (int d = 16; d > 0; d >>= 1) v += ptx::shuffle_xor(v, d);
  ptx::store(p.data + ptx::thread(), v);
  ptx::store(p.data + 128 + ptx::thread(), ptx::any(ptx::thread() == p.n) ? 1.0f : 0.0f);
  ptx::store(p.data + 256 + ptx::thread(), ptx::shuffle(static_cast<float>(ptx::thread()), ptx::thread() + 1));
}

// data: a [16, 16], b transposed [8, 16] (rows of K) or b [16, 8] in rows of 16 bytes (V), c [16, 8]. One warp, through
// shared memory, ldmatrix and mma.
template <class T>
void multiply(Probe p, bool transposed) {
  if (ptx::thread() >= 32) return;
  const int lane = ptx::thread();
  u32* const memory = reinterpret_cast<u32*>(ptx::shared_memory());  // rows of 32 bytes: a, then b
  for (int i = lane; i < 128; i += 32) ptx::store(memory + i, ptx::pack(T{}, ptx::load(p.data + 2 * i), ptx::load(p.data + 2 * i + 1)));
  for (int i = lane; i < 64; i += 32)
    ptx::store(memory + 128 + i, ptx::pack(T{}, ptx::load(p.data + 256 + 2 * i), ptx::load(p.data + 256 + 2 * i + 1)));
  for (int i = lane; i < 64; i += 32) ptx::store(memory + 192 + i, 0u);
  ptx::any(true);  // everybody has written
  u32 a[4], b[4];
  const char* const bytes = ptx::shared_memory();
  ptx::ldmatrix_x4(a, bytes + ((lane & 7) + (lane & 8)) * 32 + (lane & 16 ? 16 : 0));
  if (transposed)  // b [16 rows, 16 bytes each]; matrices 2 and 3 repeat 0 and 1
    ptx::ldmatrix_x4_trans(b, bytes + 512 + (lane & 15) * 16);
  else  // rows of K: 16 elements
    ptx::ldmatrix_x4(b, bytes + 512 + ((lane & 7) + (lane & 16 ? 8 : 0)) * 32 + (lane & 8 ? 16 : 0));
  float c[4] = {1, 1, 1, 1};
  ptx::mma(T{}, c, a, b[0], b[1]);
  for (int i = 0; i < 4; ++i) ptx::store(p.data + 384 + (lane / 4 + (i & 2 ? 8 : 0)) * 8 + 2 * (lane & 3) + (i & 1), c[i]);
}

// Two launches: the first allows the second to begin beside it.
void before(Probe p) {
  ptx::allow_next_launch();
  ptx::store(p.data + ptx::thread(), 1.0f);
}
void beside_waits(Probe p) {
  ptx::wait_for_launch_before(Site::launch_before);
  ptx::store(p.data + 128 + ptx::thread(), ptx::load(p.data + ptx::thread()) + 1);
}
void beside_reads(Probe p) {
  ptx::load(p.data + ptx::thread());
  ptx::wait_for_launch_before(Site::launch_before);
}
void beside_writes(Probe p) {
  ptx::store(p.data + 128 + ptx::thread(), 2.0f);
  ptx::wait_for_launch_before(Site::launch_before);
}
void beside_ends(Probe) {}

const std::map<std::string, void (*)(Probe)> kProbes = {
    {"store_at", store_at},
    {"load_at", load_at},
    {"shared_at", shared_at},
    {"misaligned", misaligned},
    {"unwritten", unwritten},
    {"order", order},
    {"handed_over", [](Probe p) { handed_over(p, true); }},
    {"handed_over_without_barrier", [](Probe p) { handed_over(p, false); }},
    {"copied", [](Probe p) { copied(p, true); }},
    {"copied_without_wait", [](Probe p) { copied(p, false); }},
    {"never_waits", never_waits},
    {"groups", groups},
    {"lost_thread", lost_thread},
    {"two_barriers", two_barriers},
    {"split_warp", split_warp},
    {"collectives", collectives},
    {"beside_waits", beside_waits},
    {"beside_reads", beside_reads},
    {"beside_writes", beside_writes},
    {"beside_ends", beside_ends},
    {"multiply_bf16", [](Probe p) { multiply<anabranch::cuda::bf16>(p, false); }},
    {"multiply_f16", [](Probe p) { multiply<anabranch::cuda::f16>(p, false); }},
    {"multiply_trans_bf16", [](Probe p) { multiply<anabranch::cuda::bf16>(p, true); }},
};

}  // namespace

void run_probe(const std::string& name, uintptr_t data, int n, int grid) {
  const Probe p{reinterpret_cast<float*>(data), n};
  const auto function = kProbes.at(name);
  const bool beside = name.rfind("beside_", 0) == 0;
  if (beside) emulator::launch(reinterpret_cast<const void*>(&before), grid, 128, 2048, [&] { before(p); });
  emulator::launch(reinterpret_cast<const void*>(function), grid, 128, 2048, [&] { function(p); }, beside);
}
