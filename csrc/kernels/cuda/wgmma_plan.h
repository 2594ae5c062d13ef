// SPDX-License-Identifier: BSD-3-Clause
// Which kernel makes a convolution on a Hopper GPU, and the shape of its launch: pure functions of
// the parameters, as in conv_plan.h, whose words they use. A block stays on its multiprocessor and
// makes tile after tile: one warpgroup brings operands, two consume them.
#pragma once

#include "conv_plan.h"

namespace resnet_fused {

// Registers move from the warpgroup that only copies to the two that hold the sums.
constexpr int kWarpgroup = 128, kConsumers = 2;
constexpr int kWgmmaThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kLaunchRegisters = 168, kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(kLaunchRegisters == 65536 / kWgmmaThreads / 8 * 8, "what ptxas deals out");
static_assert(kProducerRegisters * kWarpgroup + kConsumerRegisters * kConsumers * kWarpgroup <=
                  kLaunchRegisters * kWgmmaThreads,
              "nobody waits for registers that nobody gives back");

constexpr int kSwizzleBytes = 1024;  // the copy unit's pattern repeats: where its tiles begin
constexpr int kMostStages = 8;

struct WgmmaTile {
  int rows, columns;
  int sources;
  // Both consumers make a tile, half of the rows each. Else they take turns: the end of one tile
  // runs beside the products of the next.
  bool together;

  // Each consumer's rows in groups of 64, which is what wgmma multiplies.
  RESNET_FUSED_HOST_DEVICE constexpr int groups() const { return rows / (together ? 128 : 64); }
  RESNET_FUSED_HOST_DEVICE constexpr int sums() const { return sources * groups() * columns / 2; }
  RESNET_FUSED_HOST_DEVICE constexpr int stage_bytes() const {
    return (rows + columns) * kStepBytes;
  }
  // Outputs wait in shared memory for the copy unit, in panels of whole rows; the residual comes to
  // the same place before. `size`: bytes of an element.
  RESNET_FUSED_HOST_DEVICE constexpr int places() const { return together ? 1 : kConsumers; }
  RESNET_FUSED_HOST_DEVICE constexpr int place_bytes(int size) const {
    return rows * columns * size;
  }
  RESNET_FUSED_HOST_DEVICE constexpr int panel_bytes(int size) const {  // of a row
    return columns * size % 128 == 0 ? 128 : 64;
  }
  // A scale and a shift for each column and source, for each consumer.
  RESNET_FUSED_HOST_DEVICE constexpr int affine_bytes() const {
    return kConsumers * sources * columns * 8;
  }
  RESNET_FUSED_HOST_DEVICE constexpr int barriers() const {
    return 2 * kMostStages + 2 * places() + kConsumers;
  }
  // Everything but the ring, and what aligning to kSwizzleBytes may cost.
  RESNET_FUSED_HOST_DEVICE constexpr int fixed_bytes(int size) const {
    return kSwizzleBytes + places() * place_bytes(size) + affine_bytes() + 8 * barriers();
  }
  RESNET_FUSED_HOST_DEVICE constexpr int stages(int size) const {
    const int fit = (static_cast<int>(kMostSharedHopper) - fixed_bytes(size)) / stage_bytes();
    return fit < kMostStages ? fit : kMostStages;
  }
  RESNET_FUSED_HOST_DEVICE constexpr int ring_bytes(int size) const {
    return stages(size) * stage_bytes();
  }
  RESNET_FUSED_HOST_DEVICE constexpr int shared_bytes(int size) const {
    return ring_bytes(size) + fixed_bytes(size);
  }
  // Fewer than three stages do not hide a copy; fp32 outputs take room for some.
  RESNET_FUSED_HOST_DEVICE constexpr bool exists(int size) const { return stages(size) >= 3; }

  // Time of one step in cycles: products at 2048 a cycle for 16-bit types (half of that for TF32,
  // with half the channels in a step), shared memory at 128 bytes a cycle (a step is written, each
  // group reads its rows and all columns), L2 at about 40 bytes a cycle for each multiprocessor.
  constexpr int64_t step_cycles() const {
    const int64_t products = rows * columns / 32, l2 = stage_bytes() / 40;
    const int64_t shared = 2 * rows + columns + rows / 64 * columns;
    return most(products, most(shared, l2));
  }
};

constexpr WgmmaTile kWgmmaTiles[] = {
    {128, 256, 1, true},   // 0
    {256, 128, 1, true},   // 1
    {128, 192, 1, true},   // 2
    {128, 128, 1, false},  // 3
    {128, 96, 1, false},   // 4
    {128, 64, 1, false},   // 5: layers with 64 filters waste nothing
    {128, 32, 1, false},   // 6
    {64, 256, 1, false},   // 7
    {64, 128, 1, false},   // 8
    {64, 64, 1, false},    // 9: few rows
    {64, 32, 1, false},    // 10
    {256, 64, 1, true},    // 11
    {128, 128, 2, true},   // 12
    {128, 64, 2, false},   // 13
    {64, 128, 2, false},   // 14
    {64, 64, 2, false},    // 15
    {128, 128, 1, true},   // 16: float32, whose outputs leave no room for turns
    {128, 160, 1, true},   // 17: where the last round would be mostly empty
    {128, 224, 1, true},   // 18
};
constexpr int kWgmmaTileCount = sizeof(kWgmmaTiles) / sizeof(kWgmmaTiles[0]);

constexpr bool wgmma_tiles_are_right() {
  for (const WgmmaTile& t : kWgmmaTiles) {
    const bool shape = t.rows % (t.together ? 128 : 64) == 0 && t.columns % 32 == 0;
    if (!shape || t.rows > 256 || t.columns > 256 || t.sums() > 128 || !t.exists(2)) return false;
    if (t.shared_bytes(2) > kMostSharedHopper) return false;
    if (t.exists(4) && t.shared_bytes(4) > kMostSharedHopper) return false;
  }
  return true;
}
static_assert(wgmma_tiles_are_right(), "a tile that wgmma, the copy unit or a block cannot have");

// Whether the images of a source are a matrix of rows of channels, as they lie.
constexpr bool is_plain(const ConvSource& s) {
  return s.R == 1 && s.S == 1 && s.stride[0] == 1 && s.stride[1] == 1 && s.padding[0] == 0 &&
         s.padding[1] == 0;
}

// Pixels around the image that a window's first tap may meet, before its begin and behind its end:
// what the copy unit calls the corners of the bounding box.
constexpr int64_t lower_corner(const ConvSource& s, int d) { return -s.padding[d]; }
constexpr int64_t upper_corner(const ConvSource& s, int d) {
  return s.padding[d] - (d == 0 ? s.R - 1 : s.S - 1) * s.dilation[d];
}

// Whether the copy unit can bring the operands and take the outputs.
inline bool wgmma_conv_fits(const MmaConvParams& p) {
  if (!mma_conv_fits(p) || is_narrow(p)) return false;
  constexpr int64_t kBits = (int64_t{1} << 31) - 1, kMostStride = int64_t{1} << 40;
  const int64_t size = item_size(p.dtype), rows = output_rows(p);
  // Coordinates have 32 bits, also behind the last tile; and so have the parts of the work, also
  // those that a block looks for behind the last one.
  constexpr int64_t kMostItems = kBits - (int64_t{1} << 20);
  bool fits = rows <= kBits - 256;
  fits = fits && ceil_div(rows, 64) * ceil_div(p.K, 32) <= kMostItems / kMostSplits;
  fits = fits && p.K * size < kMostStride;
  for (int i = 0; fits && i < p.sources; ++i) {
    const ConvSource& s = p.source[i];
    const int64_t sizes[2] = {s.H, s.W}, taps[2] = {s.R, s.S}, outs[2] = {p.P, p.Q};
    fits = s.W * s.C * size < kMostStride / s.H && s.R * s.S * s.C * size < kMostStride;
    for (int d = 0; d < 2; ++d) {
      // The copy unit walks the image by itself: it must find as many outputs as there are.
      const int64_t walk = sizes[d] + upper_corner(s, d) - lower_corner(s, d);
      fits = fits && walk >= 1 && (walk - 1) / s.stride[d] + 1 == outs[d];
      if (is_plain(s)) continue;
      fits = fits && s.stride[d] <= 8 && lower_corner(s, d) >= -128 && upper_corner(s, d) >= -128 &&
             upper_corner(s, d) <= 127 && (taps[d] - 1) * s.dilation[d] <= 255;
    }
  }
  return fits;
}

constexpr int64_t wgmma_items(const MmaConvParams& p, const WgmmaTile& tile) {
  return ceil_div(output_rows(p), tile.rows) * ceil_div(p.K, tile.columns) * p.plan.splits;
}

// The time of p on a tile, in p.plan.splits, in cycles of one multiprocessor: that of the block
// with the most tiles. What ends a tile takes shared memory (the residual comes, is read; outputs
// are written, and go) and some latency; where consumers take turns, only what is longer than the
// products is seen of it.
constexpr int64_t wgmma_plan_cycles(const MmaConvParams& p, const WgmmaTile& tile, int sms) {
  constexpr int64_t kEndLatency = 1500, kSplitSumCycles = 4000, kCacheBytes = 23;
  const int64_t size = item_size(p.dtype), splits = p.plan.splits;
  const int64_t rounds = ceil_div(wgmma_items(p, tile), sms);
  const int64_t products = ceil_div(all_steps(p), splits) * tile.step_cycles();
  const int64_t moved =
      splits > 1 ? tile.place_bytes(4) * 128 / kCacheBytes
                 : tile.place_bytes(static_cast<int>(size)) * (p.residual != nullptr ? 4 : 2);
  const int64_t end = kEndLatency + moved / 128;
  const int64_t each = tile.together ? products + end : most(products, (products + end) / 2);
  const int64_t cycles = products + end + (rounds - 1) * each;
  if (splits == 1) return cycles;
  return cycles + kSplitSumCycles + 2 * workspace_bytes(p, p.plan.splits) / (kCacheBytes * sms);
}

// Whether a sum can be divided in so many splits, each with a step at least: its first product
// overwrites what the sums were.
constexpr bool wgmma_splits_fit(const MmaConvParams& p, int splits) {
  if (splits == 1) return true;
  if (splits < 1 || splits > kMostSplits) return false;
  const int64_t steps0 = source_steps(p.source[0], p.dtype), steps1 = all_steps(p) - steps0;
  const int first = first_source_splits(steps0, steps1, splits);
  return first <= steps0 && splits - first <= steps1;
}
// A split adds one source, so two sources are the business of one set of sums there.
constexpr bool wgmma_tile_fits(const MmaConvParams& p, const WgmmaTile& tile, int splits) {
  return tile.exists(static_cast<int>(item_size(p.dtype))) &&
         tile.sources == (splits == 1 ? p.sources : 1);
}

// Whether p.plan can make p, once p has a workspace.
inline bool wgmma_plan_fits(const MmaConvParams& p) {
  return p.plan.tile >= 0 && p.plan.tile < kWgmmaTileCount && wgmma_conv_fits(p) &&
         wgmma_splits_fit(p, p.plan.splits) &&
         wgmma_tile_fits(p, kWgmmaTiles[p.plan.tile], p.plan.splits);
}

// The fastest plan by that model, of those with these tiles; splits as in plan_mma_conv. A tile of
// -1 if p does not fit.
inline MmaConvPlan plan_wgmma_conv(MmaConvParams p, int sms, bool invariant,
                                   const WgmmaTile* tiles = kWgmmaTiles,
                                   int count = kWgmmaTileCount) {
  constexpr int64_t kFewestSteps = 4;
  MmaConvPlan whole{-1, 1}, split{-1, 1};
  if (!wgmma_conv_fits(p)) return whole;
  int64_t whole_cycles = -1, split_cycles = -1;
  const int64_t steps = all_steps(p);
  for (int t = 0; t < count; ++t) {
    const WgmmaTile& tile = tiles[t];
    p.plan = {t, 1};
    int64_t most_splits = 1;
    if (!invariant && wgmma_items(p, tile) < sms) {
      most_splits = most(1, least(kMostSplits, steps / kFewestSteps));
    }
    for (int splits = 1; splits <= most_splits; ++splits) {
      MmaConvPlan& best = splits == 1 ? whole : split;
      int64_t& best_cycles = splits == 1 ? whole_cycles : split_cycles;
      // Most candidates end here: the products alone take longer than the best one.
      if (best_cycles >= 0 && ceil_div(steps, splits) * tile.step_cycles() >= best_cycles) continue;
      if (!wgmma_tile_fits(p, tile, splits) || !wgmma_splits_fit(p, splits)) continue;
      p.plan.splits = splits;
      const int64_t cycles = wgmma_plan_cycles(p, tile, sms);
      if (best_cycles < 0 || cycles < best_cycles) {
        best = p.plan;
        best_cycles = cycles;
      }
    }
  }
  return split.tile >= 0 && split_cycles * 10 < whole_cycles * 9 ? split : whole;
}

// A block for each multiprocessor, if there is as much to do.
constexpr LaunchShape wgmma_conv_shape(const MmaConvParams& p, int sms, bool dependent) {
  const WgmmaTile& tile = kWgmmaTiles[p.plan.tile];
  const int64_t blocks = least(wgmma_items(p, tile), sms);
  const int size = static_cast<int>(item_size(p.dtype));
  return {{blocks, 1, 1}, kWgmmaThreads, tile.shared_bytes(size), true, dependent};
}

}  // namespace resnet_fused
