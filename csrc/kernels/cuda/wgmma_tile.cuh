// SPDX-License-Identifier: BSD-3-Clause
// What the warps of a block of the Hopper convolution share: arguments, the list of tiles, the
// places in shared memory, the barriers.
#pragma once

#include "ptx_hopper.cuh"
#include "wgmma_plan.h"

namespace resnet_fused {

// One source as the copy unit takes it.
struct WgmmaSource {
  int steps;        // of the sum
  int blocks;       // steps of one tap
  int across;       // taps of a row of the window
  int dilation[2];  // down, right
  int stride[2], padding[2];
  bool plain;  // images are a matrix: no columns of pixels to walk
};

struct alignas(64) WgmmaConvArgs {
  TensorMap image[2], weight[2], residual, out;
  WgmmaSource source[2];
  MmaConvParams conv;
  int items;   // tiles, times splits
  int across;  // tiles beside each other
  bool dependent;
};

// An item of the work. Tiles of one group of rows follow each other, so that blocks read the same
// pixels at about the same time; the filters, a few MB at most, stay in the L2 cache as well.
template <int kTile>
struct Work {
  int m0, k0, split;
  StepRange range;  // of one source; with two sources in the tile, all steps of the first

  __device__ __forceinline__ Work(const WgmmaConvArgs& a, int item) {
    constexpr WgmmaTile kShape = kWgmmaTiles[kTile];
    const auto splits = static_cast<uint32_t>(a.conv.plan.splits);
    const auto across = static_cast<uint32_t>(a.across);
    const uint32_t tile = static_cast<uint32_t>(item) / splits, down = tile / across;
    split = static_cast<int>(static_cast<uint32_t>(item) - tile * splits);
    m0 = static_cast<int>(down) * kShape.rows;
    k0 = static_cast<int>(tile - down * across) * kShape.columns;
    range = {0, 0, a.source[0].steps};
    if (kShape.sources == 1 && splits > 1) {
      range = split_range(a.source[0].steps, a.conv.sources == 2 ? a.source[1].steps : 0,
                          a.conv.plan.splits, split);
    }
  }
  __device__ __forceinline__ int first_steps() const { return range.end - range.begin; }
  __device__ __forceinline__ int steps(const WgmmaConvArgs& a) const {
    return first_steps() + (kWgmmaTiles[kTile].sources == 2 ? a.source[1].steps : 0);
  }
};

// A place in the ring, and the parity of the phase that its barriers are in.
template <int kStages>
struct RingPlace {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void next() { skip(1); }
  __device__ __forceinline__ void skip(int steps) {
    const auto at = static_cast<uint32_t>(stage + steps), rounds = at / kStages;
    stage = static_cast<int>(at - rounds * kStages);
    parity ^= rounds & 1;
  }
};

// Shared memory from a multiple of kSwizzleBytes on.
struct AlignedShared {
  unsigned char* begin;
  uint32_t address;  // of `begin`

  __device__ __forceinline__ explicit AlignedShared(unsigned char* shared) {
    const uint32_t at = ptx::shared_address(shared);
    const uint32_t past = at % kSwizzleBytes;
    begin = shared + (past == 0 ? 0 : kSwizzleBytes - past);
    address = ptx::shared_address(begin);
  }
};

// The barriers of a block. Where consumers arrive, one lane of each of their warps does: so no warp
// can be a phase behind, in which a parity would mean another phase.
template <int kStages, int kPlaces, int kArrivals>
struct BlockBarriers {
  uint32_t first_barrier;  // its shared address, on 8 bytes

  // A stage is filled; it is free again.
  __device__ __forceinline__ uint32_t full(int stage) const { return bar(stage); }
  __device__ __forceinline__ uint32_t empty(int stage) const { return bar(kMostStages + stage); }
  // The place may be written, with the residual in it if there is one; the outputs are in it.
  __device__ __forceinline__ uint32_t open(int place) const { return bar(2 * kMostStages + place); }
  __device__ __forceinline__ uint32_t done(int place) const {
    return bar(2 * kMostStages + kPlaces + place);
  }
  // It is this consumer's turn.
  __device__ __forceinline__ uint32_t turn(int consumer) const {
    return bar(2 * kMostStages + 2 * kPlaces + consumer);
  }

  // For one thread.
  __device__ __forceinline__ void make_barriers() const {
    for (int i = 0; i < kStages; ++i) {
      ptx::barrier_init(full(i), 1);
      ptx::barrier_init(empty(i), kArrivals);
    }
    for (int i = 0; i < kPlaces; ++i) {
      ptx::barrier_init(open(i), 1);
      ptx::barrier_init(done(i), kArrivals);
    }
    for (int i = 0; i < kConsumers; ++i) ptx::barrier_init(turn(i), kWarpgroup / 32);
    ptx::barrier_init_fence();
  }

 private:
  __device__ __forceinline__ uint32_t bar(int index) const { return first_barrier + index * 8; }
};

// Of one convolution. Consumers that make a tile together both arrive.
template <typename T, int kTile>
using WgmmaBarriers =
    BlockBarriers<kWgmmaTiles[kTile].stages(sizeof(T)), kWgmmaTiles[kTile].places(),
                  (kWgmmaTiles[kTile].together ? kConsumers : 1) * kWarpgroup / 32>;

// The ring of stages (rows of pixels, rows of filters), outputs, scales and shifts, barriers.
template <typename T, int kTile>
struct WgmmaShared : AlignedShared, WgmmaBarriers<T, kTile> {
  static constexpr WgmmaTile kShape = kWgmmaTiles[kTile];
  static constexpr int kSize = sizeof(T);
  static constexpr int kStages = kShape.stages(kSize);
  static constexpr int kPlaces = kShape.places();
  static constexpr int kPlaceBytes = kShape.place_bytes(kSize);
  static constexpr int kOutputs = kShape.ring_bytes(kSize);
  static constexpr int kAffine = kOutputs + kPlaces * kPlaceBytes;
  static constexpr int kBarriers = kAffine + kShape.affine_bytes();
  static constexpr int kPanel = kShape.panel_bytes(kSize);
  static constexpr int kPanels = kShape.columns * kSize / kPanel;
  static constexpr int kPanelColumns = kPanel / kSize;
  static_assert(kBarriers + 8 * kShape.barriers() + kSwizzleBytes <= kShape.shared_bytes(kSize));
  static_assert(kShape.stage_bytes() % kSwizzleBytes == 0 && kBarriers % 8 == 0);
  static_assert(kShape.rows * kStepBytes % kSwizzleBytes == 0);
  static_assert(kShape.rows * kPanel % kSwizzleBytes == 0, "panels begin a pattern");

  __device__ __forceinline__ explicit WgmmaShared(unsigned char* shared)
      : AlignedShared(shared), WgmmaBarriers<T, kTile>{address + kBarriers} {}

  __device__ __forceinline__ uint32_t pixels(int stage) const {
    return address + stage * kShape.stage_bytes();
  }
  __device__ __forceinline__ uint32_t filters(int stage) const {
    return pixels(stage) + kShape.rows * kStepBytes;
  }
  __device__ __forceinline__ uint32_t panel(int place, int panel) const {
    return address + kOutputs + place * kPlaceBytes + panel * kShape.rows * kPanel;
  }
  __device__ __forceinline__ unsigned char* outputs(int place) const {
    return begin + kOutputs + place * kPlaceBytes;
  }
  __device__ __forceinline__ float* affine(int consumer) const {
    return reinterpret_cast<float*>(begin + kAffine) +
           consumer * kShape.sources * kShape.columns * 2;
  }
};

}  // namespace resnet_fused
