// SPDX-License-Identifier: BSD-3-Clause
// What the warps of a block share that runs two convolutions as one: arguments, the order of the
// work, places in shared memory.
#pragma once

#include "wgmma_pair_plan.h"
#include "wgmma_tile.cuh"

namespace resnet_fused {

struct alignas(64) WgmmaPairArgs {
  TensorMap image, weight;                  // of the first convolution
  TensorMap filters;                        // of the second one
  TensorMap project_image, project_weight;  // of its second source
  TensorMap residual, out;
  WgmmaSource source, project;
  WgmmaPairParams pair;
  int tiles;  // of rows
  int parts;  // of the second convolution's columns, and turns of the first one
  bool dependent;
};

// A block's tiles in rounds: in round i the first convolution of its tile i and the second one of
// tile i - 1 are made, by consumers i % 2 and (i - 1) % 2. A round has a turn for each part of the
// columns, in which consumer 0 comes first.
struct PairWork {
  int tiles;  // of this block
  int parts, steps, project_steps;

  __device__ __forceinline__ explicit PairWork(const WgmmaPairArgs& a)
      : parts(a.parts), steps(a.source.steps), project_steps(a.project.steps) {
    const int first = static_cast<int>(blockIdx.x), stride = static_cast<int>(gridDim.x);
    tiles = (a.tiles - first + stride - 1) / stride;
  }
  __device__ __forceinline__ int tile(int i) const {
    return static_cast<int>(blockIdx.x) + i * static_cast<int>(gridDim.x);
  }
  // The first convolution's steps before a turn.
  __device__ __forceinline__ int before(int turn) const { return turn * steps / parts; }
  // Stages of the ring that a turn takes in each convolution of tile i.
  __device__ __forceinline__ int first_stages(int i, int turn) const {
    return i < tiles ? before(turn + 1) - before(turn) : 0;
  }
  __device__ __forceinline__ int last_stages(int i) const { return i < 0 ? 0 : 1 + project_steps; }
};

template <int kTile>
using PairBarriers =
    BlockBarriers<kWgmmaPairTiles[kTile].stages(), kWgmmaPairTiles[kTile].places, kWarpgroup / 32>;

// The ring of stages, the tiles between the convolutions, parts of outputs, scales and shifts (of
// the first convolution, then of each source of the second), barriers. Places are used one after
// the other, whichever consumer's turn it is.
template <int kTile>
struct PairShared : AlignedShared, PairBarriers<kTile> {
  static constexpr WgmmaPairTile kShape = kWgmmaPairTiles[kTile];
  static constexpr int kStages = kShape.stages();
  static constexpr int kPlaces = kShape.places;
  static constexpr int kPlaceBytes = kShape.place_bytes();
  static constexpr int kMiddle = kStages * kShape.stage_bytes();
  static constexpr int kOutputs = kMiddle + kConsumers * kShape.middle_bytes();
  static constexpr int kAffine = kOutputs + kPlaces * kPlaceBytes;
  static constexpr int kBarriers = kAffine + kShape.affine_bytes();
  static constexpr int kPanel = kStepBytes, kPanels = 1, kPanelColumns = kShape.columns;
  static_assert(kBarriers + 8 * kShape.barriers() + kSwizzleBytes <= kShape.shared_bytes());
  static_assert(kShape.stage_bytes() % kSwizzleBytes == 0 && kPlaceBytes % kSwizzleBytes == 0);
  static_assert(kShape.rows * kStepBytes % kSwizzleBytes == 0 && kBarriers % 8 == 0);
  static_assert(kPanelColumns * kPairSize == kPanel, "a part is one panel");

  __device__ __forceinline__ explicit PairShared(unsigned char* shared)
      : AlignedShared(shared), PairBarriers<kTile>{address + kBarriers} {}

  __device__ __forceinline__ uint32_t pixels(int stage) const {
    return address + stage * kShape.stage_bytes();
  }
  __device__ __forceinline__ uint32_t filters(int stage) const {
    return pixels(stage) + kShape.rows * kStepBytes;
  }
  // The second convolution's filters for a step over the tile between; they have a stage alone.
  __device__ __forceinline__ uint32_t part_filters(int stage, int block) const {
    return pixels(stage) + block * kShape.columns * kStepBytes;
  }
  // Where a consumer leaves what the first convolution made, in panels of a step.
  __device__ __forceinline__ unsigned char* middle(int consumer) const {
    return begin + kMiddle + consumer * kShape.middle_bytes();
  }
  __device__ __forceinline__ uint32_t middle_step(int consumer, int block) const {
    return address + kMiddle + consumer * kShape.middle_bytes() + block * kShape.rows * kStepBytes;
  }
  __device__ __forceinline__ uint32_t panel(int place, int) const {
    return address + kOutputs + place * kPlaceBytes;
  }
  __device__ __forceinline__ unsigned char* outputs(int place) const {
    return begin + kOutputs + place * kPlaceBytes;
  }
  __device__ __forceinline__ float* first_affine() const {
    return reinterpret_cast<float*>(begin + kAffine);
  }
  __device__ __forceinline__ float* last_affine() const {
    return first_affine() + 2 * kShape.middle;
  }
};

}  // namespace resnet_fused
