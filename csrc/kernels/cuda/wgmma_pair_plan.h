// SPDX-License-Identifier: BSD-3-Clause
// When two convolutions run as one on a Hopper GPU (wgmma_pair.h), on which tile, and the shape of
// the launch: pure functions as in wgmma_plan.h. A block makes tile after tile; its two consumers
// have a tile each and are half a tile apart: while one makes the first convolution, the other
// makes the second, part by part, and ends each part beside the products of the one before it.
#pragma once

#include "../wgmma_pair.h"
#include "wgmma_plan.h"

namespace resnet_fused {

constexpr int kPairSize = 2;           // bytes of an element: fp16 or bf16
constexpr int kMostPairColumns = 512;  // of the second convolution: their scales are all kept

struct WgmmaPairTile {
  int rows;
  int middle;   // columns of the first convolution, all that it has
  int columns;  // of a part of the second one
  int sources;  // of the second one
  int places;   // where parts of the outputs wait for the copy unit

  RESNET_FUSED_HOST_DEVICE constexpr int groups() const { return rows / 64; }
  // Of the convolution with more of them: the sums of one are gone before the other's begin.
  RESNET_FUSED_HOST_DEVICE constexpr int sums() const {
    return groups() / 2 * (middle > sources * columns ? middle : sources * columns);
  }
  // Steps of the second convolution over its first source; the filters of all of them for one part
  // come into one stage.
  RESNET_FUSED_HOST_DEVICE constexpr int blocks() const { return middle * kPairSize / kStepBytes; }
  RESNET_FUSED_HOST_DEVICE constexpr int step_bytes() const { return (rows + middle) * kStepBytes; }
  RESNET_FUSED_HOST_DEVICE constexpr int filter_bytes() const {
    return blocks() * columns * kStepBytes;
  }
  RESNET_FUSED_HOST_DEVICE constexpr int projection_bytes() const {
    return (rows + columns) * kStepBytes;
  }
  RESNET_FUSED_HOST_DEVICE constexpr int stage_bytes() const {
    return (rows + (middle > columns ? middle : columns)) * kStepBytes;
  }
  RESNET_FUSED_HOST_DEVICE constexpr int middle_bytes() const { return rows * middle * kPairSize; }
  RESNET_FUSED_HOST_DEVICE constexpr int place_bytes() const { return rows * columns * kPairSize; }
  RESNET_FUSED_HOST_DEVICE constexpr int affine_bytes() const {
    return (middle + sources * kMostPairColumns) * 8;
  }
  RESNET_FUSED_HOST_DEVICE constexpr int barriers() const {
    return 2 * kMostStages + 2 * places + kConsumers;
  }
  RESNET_FUSED_HOST_DEVICE constexpr int fixed_bytes() const {
    return kSwizzleBytes + kConsumers * middle_bytes() + places * place_bytes() + affine_bytes() +
           8 * barriers();
  }
  RESNET_FUSED_HOST_DEVICE constexpr int stages() const {
    const int fit = (static_cast<int>(kMostSharedHopper) - fixed_bytes()) / stage_bytes();
    return fit < kMostStages ? fit : kMostStages;
  }
  RESNET_FUSED_HOST_DEVICE constexpr int shared_bytes() const {
    return stages() * stage_bytes() + fixed_bytes();
  }
};

// Stage 1 and stage 2 of a ResNet with bottlenecks; the wider tensors of later stages do not fit.
constexpr WgmmaPairTile kWgmmaPairTiles[] = {
    {128, 64, 64, 1, 4},   // 0
    {128, 64, 64, 2, 4},   // 1: with a projection
    {128, 128, 64, 1, 3},  // 2
    {128, 128, 64, 2, 3},  // 3
};
constexpr int kWgmmaPairTileCount = sizeof(kWgmmaPairTiles) / sizeof(kWgmmaPairTiles[0]);

constexpr bool wgmma_pair_tiles_are_right() {
  for (const WgmmaPairTile& t : kWgmmaPairTiles) {
    if (t.rows % 64 != 0 || t.rows > 256 || t.middle * kPairSize % kStepBytes != 0) return false;
    if (t.columns * kPairSize != kStepBytes || t.middle > 256 || t.sums() > 128) return false;
    if (t.filter_bytes() > t.stage_bytes() || t.projection_bytes() > t.stage_bytes()) return false;
    // With one place, a consumer could look at its barrier two phases early.
    if (t.stages() < 3 || t.places < 2 || t.shared_bytes() > kMostSharedHopper) return false;
  }
  return true;
}
static_assert(wgmma_pair_tiles_are_right(),
              "a tile that wgmma, the copy unit or a block cannot do");

// Whether the second convolution takes what the first one makes, and nobody else does.
constexpr bool is_pair(const MmaConvParams& first, const MmaConvParams& last) {
  const ConvSource& s = last.source[0];
  return first.sources == 1 && first.residual == nullptr && first.dtype == last.dtype &&
         first.N == last.N && first.P == last.P && first.Q == last.Q && is_plain(s) &&
         s.H == first.P && s.W == first.Q && s.C == first.K;
}

inline bool wgmma_pair_tile_fits(const MmaConvParams& first, const MmaConvParams& last,
                                 const WgmmaPairTile& tile) {
  return first.dtype != DType::f32 && is_pair(first, last) && tile.middle == first.K &&
         tile.sources == last.sources && last.K <= kMostPairColumns && wgmma_conv_fits(first) &&
         wgmma_conv_fits(last);
}

inline bool wgmma_pair_fits(const WgmmaPairParams& p) {
  return p.tile >= 0 && p.tile < kWgmmaPairTileCount &&
         wgmma_pair_tile_fits(p.first, p.last, kWgmmaPairTiles[p.tile]);
}

constexpr int64_t wgmma_pair_tiles(const MmaConvParams& last, const WgmmaPairTile& tile) {
  return ceil_div(output_rows(last), tile.rows);
}
constexpr int64_t wgmma_pair_parts(const MmaConvParams& last, const WgmmaPairTile& tile) {
  return ceil_div(last.K, tile.columns);
}

constexpr int64_t image_bytes(const MmaConvParams& p, int source) {
  const ConvSource& s = p.source[source];
  return p.N * s.H * s.W * s.C * kPairSize;
}

// What is moved besides filters, each tensor once: into the first convolution; between the two, and
// back again; beside and out of the second one.
struct PairBytes {
  int64_t begin, middle, end;
  constexpr int64_t all() const { return begin + middle + end; }
};
constexpr PairBytes pair_bytes(const MmaConvParams& first, const MmaConvParams& last) {
  const int64_t outputs = output_rows(last) * last.K * kPairSize;
  return {image_bytes(first, 0), output_rows(first) * first.K * kPairSize,
          (last.residual != nullptr ? 2 : 1) * outputs +
              (last.sources == 2 ? image_bytes(last, 1) : 0)};
}

// Cycles that memory takes for so many bytes: 14 a cycle for each multiprocessor of an H100, or as
// many as the L2 cache moves if all that a block of the network touches stays there.
constexpr int64_t memory_cycles(int64_t bytes, int64_t all_bytes, int sms) {
  constexpr int64_t kMemoryBytes = 14, kCacheBytes = 23, kStaysInCache = int64_t{32} << 20;
  return bytes / (sms * (all_bytes <= kStaysInCache ? kCacheBytes : kMemoryBytes));
}

// The time of both in one kernel in cycles of one multiprocessor, as wgmma_plan_cycles; memory is
// counted too, which is what one kernel saves.
constexpr int64_t wgmma_pair_cycles(const MmaConvParams& first, const MmaConvParams& last,
                                    const WgmmaPairTile& tile, int sms) {
  constexpr int64_t kEndLatency = 1500;
  const int64_t begin =
      all_steps(first) * WgmmaTile{tile.rows, tile.middle, 1, false}.step_cycles();
  // A part of the second convolution: rows are read from shared memory, where they are already.
  const int64_t products = tile.rows * tile.columns / 32, l2 = tile.columns * kStepBytes / 40;
  const int64_t shared = tile.rows + tile.columns + tile.groups() * tile.columns;
  int64_t part = tile.blocks() * most(products, most(shared, l2));
  if (last.sources == 2) {
    part += source_steps(last.source[1], last.dtype) *
            WgmmaTile{tile.rows, tile.columns, 1, false}.step_cycles();
  }
  const int64_t parts = wgmma_pair_parts(last, tile);
  const int64_t end = kEndLatency + tile.place_bytes() * (last.residual != nullptr ? 4 : 2) / 128;
  // One consumer's first convolution and the other's second, each part of which is a chain.
  const int64_t both = most(begin + parts * part, parts * (part + end));
  const int64_t tiles = ceil_div(wgmma_pair_tiles(last, tile), sms);
  const int64_t cycles = begin + (tiles - 1) * both + parts * (part + end);
  const PairBytes bytes = pair_bytes(first, last);
  return most(cycles, memory_cycles(bytes.begin + bytes.end, bytes.all(), sms));
}

// Both ways' times; -1 for two kernels where one of them would split a sum, which changes its bits.
struct PairTimes {
  int64_t together, layerwise;
};
inline PairTimes wgmma_pair_times(MmaConvParams first, MmaConvParams last,
                                  const WgmmaPairTile& tile, int sms, bool invariant) {
  constexpr int64_t kLaunchCycles = 4000;  // of a second kernel, about 2 microseconds
  first.plan = plan_wgmma_conv(first, sms, invariant);
  last.plan = plan_wgmma_conv(last, sms, invariant);
  const PairBytes bytes = pair_bytes(first, last);
  const int64_t one_by_one = most(wgmma_plan_cycles(first, kWgmmaTiles[first.plan.tile], sms),
                                  memory_cycles(bytes.begin + bytes.middle, bytes.all(), sms)) +
                             most(wgmma_plan_cycles(last, kWgmmaTiles[last.plan.tile], sms),
                                  memory_cycles(bytes.middle + bytes.end, bytes.all(), sms)) +
                             kLaunchCycles;
  const bool split = first.plan.splits > 1 || last.plan.splits > 1;
  return {wgmma_pair_cycles(first, last, tile, sms), split ? -1 : one_by_one};
}

// The tile that both fit, or -1.
inline int wgmma_pair_tile(const MmaConvParams& first, const MmaConvParams& last) {
  for (int t = 0; t < kWgmmaPairTileCount; ++t) {
    if (wgmma_pair_tile_fits(first, last, kWgmmaPairTiles[t])) return t;
  }
  return -1;
}

// That, if one kernel is faster than two by a tenth, by that model; else -1.
inline int plan_wgmma_pair(const MmaConvParams& first, const MmaConvParams& last, int sms,
                           bool invariant) {
  const int tile = wgmma_pair_tile(first, last);
  if (tile < 0 || output_rows(last) == 0) return -1;
  const PairTimes times = wgmma_pair_times(first, last, kWgmmaPairTiles[tile], sms, invariant);
  return times.together * 10 < times.layerwise * 9 ? tile : -1;
}

// A block for each multiprocessor, if there is as much to do.
constexpr LaunchShape wgmma_pair_shape(const MmaConvParams& last, const WgmmaPairTile& tile,
                                       int sms, bool dependent) {
  const int64_t blocks = least(wgmma_pair_tiles(last, tile), sms);
  return {{blocks, 1, 1}, kWgmmaThreads, tile.shared_bytes(), true, dependent};
}

}  // namespace resnet_fused
