// Sizes of one variant of the attention kernel, and arithmetic that several of its parts need.
#pragma once

#include <cmath>

#include "cuda/ahead.cuh"

namespace anabranch::cuda {

constexpr int kWarps = kThreads / 32;
constexpr int kReserved = 1024;  // bytes of shared memory that the system takes of every block
// Blocks whose addresses are kept, from when they are published to when their copies begin: half a ring, as it is filled.
// Positions are kept until their block has been computed: those of the block at hand besides.
constexpr int kAhead = kMaxRing / 2, kAheadPositions = 2 * kAhead;
static_assert(kMaxRing <= 8, "copy_wait knows no more groups");
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

ANABRANCH_DEVICE float minus_infinity() { return -INFINITY; }
ANABRANCH_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
ANABRANCH_DEVICE int larger(int a, int b) { return a > b ? a : b; }
ANABRANCH_DEVICE float larger(float a, float b) { return ::fmaxf(a, b); }

// D is head_dim rounded up to one that is compiled: columns past head_dim are zeros.
template <class T, int D>
struct Shape {
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr int kBlock = kHalf ? 64 : 32;  // tokens a tile
  static constexpr int kKeys = kHalf ? 16 : 8;    // tokens a warp multiplies at once: a step
  static constexpr int kRows = kHalf ? (D <= 128 ? 64 : 32) : (D <= 128 ? 32 : 16);  // packed rows a pass
  static constexpr int kMostSteps = kRows / 16;                                      // a warp and tile
  static constexpr int kGranule = 16 / static_cast<int>(sizeof(T));                  // elements a copy
  static constexpr int kGranules = D / kGranule;
  static constexpr int kPitch = (kGranules | 1) * 16;  // bytes a row; odd in units of 16: no bank conflicts
  static constexpr int kTile = kBlock * kPitch;
  static constexpr bool kKeepQ = kHalf && D <= 128;  // queries in registers, their bytes in the ring's last tile
  static constexpr int kQueries = kKeepQ ? 0 : kRows * kPitch;
  static constexpr int kAccPitch = D + 8;  // floats
  static constexpr int kResults = kWarps * 16 * kAccPitch * 4;
  // A multiprocessor's: what the compiler may take registers for.
  static constexpr int kBlocks = kHalf ? (D <= 64 ? 3 : 2) : (D <= 80 ? 4 : D <= 96 ? 3 : 2);
  static_assert(D % 16 == 0 && kRows <= kBlock * 2 && kBlock == kWarps * kKeys, "a shape the kernel cannot lay out");

  // How a tile is copied: kLanes neighbouring threads take a token, so that they read whole lines; each the same kColumns
  // granules of kTokens tokens.
  static constexpr int kLanes = kGranules % 8 == 0 ? 8 : kGranules % 4 == 0 ? 4 : 2;
  static constexpr int kColumns = kGranules / kLanes;
  static constexpr int kTokens = kBlock * kLanes / kThreads;
  static_assert(kGranules % kLanes == 0 && kTokens >= 1 && kTokens * kThreads == kBlock * kLanes, "an uneven share");

  // The first of the `rows` rows of a thread. Eight neighbouring threads write to shared memory at once: with kLanes rows
  // between theirs they meet all banks.
  static ANABRANCH_BOTH constexpr int first_row(int thread, int rows) {
    const int group = thread / kLanes, within = group % (8 / rows);
    return group / (8 / rows) * 8 + within % (8 / kLanes) * kLanes + within / (8 / kLanes) * rows;
  }

  // Shared memory begins with this, at addresses that the compiler knows; then come [ring | queries], over them the
  // results of the warps.
  struct Front {
    Int2 places[kAhead][2][kBlock];           // of K and of V: a token's address; see Stream
    i32 positions[kAheadPositions][kBlock];   // with a window
    Float2 stats[kWarps * 16];                // m and l of the results
    Int4 kept[3];                             // the pass, while its tiles are computed
    Int2 ends[kWarps];                        // of each warp's visible tokens
    Ahead<kRows> ahead;
  };
  static constexpr int kRing = (static_cast<int>(sizeof(Front)) + 127) / 128 * 128;
  static ANABRANCH_BOTH constexpr int shared_bytes(int ring) {
    const int streamed = ring * kTile + kQueries;
    return kRing + (streamed > kResults ? streamed : kResults);
  }

  // Tiles in the ring. Streaming wants some 40 KB on its way to every multiprocessor all the time, and two or more blocks
  // there, so that one computes while another waits; a block has ring − 1 tiles on their way. `most`: the blocks that a
  // multiprocessor has registers for; to leave room for more would leave it unused. 0: not even one block fits.
  static ANABRANCH_BOTH constexpr int ring_for(int shared_block, int shared_multiprocessor, int most) {
    for (int blocks = most < 1 ? 1 : most > 4 ? 4 : most; blocks >= 1; --blocks)
      for (int ring = kMaxRing; ring >= (blocks == 1 ? 2 : 3); --ring)
        if (shared_bytes(ring) <= shared_block && blocks * (shared_bytes(ring) + kReserved) <= shared_multiprocessor &&
            (blocks == 1 || blocks * (ring - 1) * kTile >= 40 * 1024))
          return ring;
    return 0;
  }
  // On sm_90 and sm_100; a wait for tiles looks for it first.
  static ANABRANCH_BOTH constexpr int usual_ring() { return ring_for(227 * 1024, 228 * 1024, kBlocks); }

  static ANABRANCH_DEVICE Front& front() { return *reinterpret_cast<Front*>(ptx::shared_memory()); }
};

// tanh to about 1e-7 of its value.
ANABRANCH_DEVICE float tanh_of(float x) {
  const float x2 = x * x;
  // Near zero 1 − 2/(e^2x + 1) loses all its digits, and softcap leaves most scores exactly there.
  if (x2 < 0.0625f)
    return x * (1.0f + x2 * (-1.0f / 3 + x2 * (2.0f / 15 + x2 * (-17.0f / 315 + x2 * (62.0f / 2835)))));
  const float e = ptx::exp2(-2.0f * kLog2e * (x < 0 ? -x : x));
  const float y = (1.0f - e) / (1.0f + e);
  return x < 0 ? -y : y;
}

}  // namespace anabranch::cuda
