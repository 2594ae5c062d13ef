// SPDX-License-Identifier: BSD-3-Clause
// Which kernel makes a convolution, and the shape of its launch: pure functions of the parameters,
// without a GPU. The convolution is a GEMM with N * P * Q rows (output pixels), K columns (filters)
// and a sum over steps of 128 bytes of channels.
#pragma once

#include "../mma_conv.h"
#include "launch_shape.h"

// Kernels use some of these as well; elsewhere the words mean nothing.
#ifdef __CUDACC__
#define RESNET_FUSED_HOST_DEVICE __host__ __device__
#else
#define RESNET_FUSED_HOST_DEVICE
#endif

namespace resnet_fused {

constexpr int kStepBytes = 128;  // of each row and column that one step multiplies

// A kernel: the part of the output that a block makes, and how.
struct MmaTile {
  int rows, columns;
  int warps_down, warps_across;  // each makes (rows / down) x (columns / across)
  int stages;                    // of the ring of steps in shared memory
  int blocks;                    // per multiprocessor that registers are kept for
  int sources;
  bool narrow;  // element by element: any C, any K, any alignment

  RESNET_FUSED_HOST_DEVICE constexpr int threads() const { return 32 * warps_down * warps_across; }
  RESNET_FUSED_HOST_DEVICE constexpr int stage_bytes() const {
    return (rows + columns) * kStepBytes;
  }
  RESNET_FUSED_HOST_DEVICE constexpr int ring_bytes() const { return stages * stage_bytes(); }
  // Behind the ring: a scale and a shift for each column and source.
  RESNET_FUSED_HOST_DEVICE constexpr int shared_bytes() const {
    return ring_bytes() + sources * columns * 8;
  }
  // Time of one step in a multiprocessor's cycles. What limits a step is shared memory, at 128
  // bytes a cycle: every step writes (rows + columns) * 128 bytes, each warp reads the 128 bytes of
  // its rows and columns. The products, at 1024 a cycle for 16-bit types, are never slower.
  constexpr int64_t step_cycles() const {
    return rows + columns + warps_across * rows + warps_down * columns;
  }
};

// Warps of 64 x 32 where one accumulator set is enough: they read least for what they multiply.
constexpr MmaTile kMmaTiles[] = {
    {128, 128, 2, 4, 3, 2, 1, false},  // 0
    {128, 64, 2, 2, 3, 3, 1, false},   // 1: layers with 64 filters waste nothing
    {64, 128, 1, 4, 3, 3, 1, false},   // 2
    {64, 64, 2, 2, 4, 3, 1, false},    // 3: few rows; a deeper ring, as fewer blocks hide latency
    {64, 64, 2, 2, 3, 2, 1, true},     // 4
    {128, 64, 4, 2, 3, 2, 2, false},   // 5
    {64, 64, 2, 2, 4, 3, 2, false},    // 6
    {64, 64, 2, 2, 3, 2, 2, true},     // 7
};
constexpr int kMmaTileCount = sizeof(kMmaTiles) / sizeof(kMmaTiles[0]);
constexpr int kMostSplits = 16;

// The kernel that adds the partial sums of a split convolution: a block takes 16 rows of 64
// columns.
constexpr int kSplitSumRows = 16, kSplitSumColumns = 64, kSplitSumThreads = 256;

RESNET_FUSED_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
RESNET_FUSED_HOST_DEVICE constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
RESNET_FUSED_HOST_DEVICE constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr int64_t output_rows(const MmaConvParams& p) { return p.N * p.P * p.Q; }
constexpr int64_t output_tiles(const MmaConvParams& p, const MmaTile& tile) {
  return ceil_div(output_rows(p), tile.rows) * ceil_div(p.K, tile.columns);
}

// Channels of a tap as the sum counts them. A tap begins with a new step if its channels come in
// whole vectors of 16 bytes. Others are packed densely: 3 channels would fill little of a step.
// This depends on C and the `size` of an element alone, so the narrow kernels add in the order of
// the others where both can run.
RESNET_FUSED_HOST_DEVICE constexpr int64_t padded_channels(int64_t C, int64_t size) {
  const int64_t vector = 16 / size, step = kStepBytes / size;
  return C % vector == 0 ? ceil_div(C, step) * step : C;
}

constexpr int64_t source_steps(const ConvSource& s, DType dtype) {
  return ceil_div(s.R * s.S * padded_channels(s.C, item_size(dtype)),
                  kStepBytes / item_size(dtype));
}

constexpr int64_t all_steps(const MmaConvParams& p) {
  int64_t steps = 0;
  for (int i = 0; i < p.sources; ++i) steps += source_steps(p.source[i], p.dtype);
  return steps;
}

// The steps of one source that split `index` of `splits` adds.
struct StepRange {
  int source;
  int begin, end;
};

// Splits of the first source; partial sums from there on are the second one's. Each source has
// splits of its own, as many as its share of the steps, and one at least.
RESNET_FUSED_HOST_DEVICE constexpr int first_source_splits(int64_t steps0, int64_t steps1,
                                                           int splits) {
  if (steps1 == 0) return splits;
  const int64_t share = (2 * splits * steps0 + steps0 + steps1) / (2 * (steps0 + steps1));
  return static_cast<int>(least(most(share, 1), splits - 1));
}

RESNET_FUSED_HOST_DEVICE constexpr StepRange split_range(int64_t steps0, int64_t steps1, int splits,
                                                         int index) {
  int64_t first = first_source_splits(steps0, steps1, splits), steps = steps0, at = index;
  int source = 0;
  if (index >= first) {
    source = 1;
    at = index - first;
    first = splits - first;
    steps = steps1;
  }
  return {source, static_cast<int>(at * steps / first), static_cast<int>((at + 1) * steps / first)};
}

inline bool on_16_bytes(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Whether some row of an operand does not begin on 16 bytes: a narrow kernel's work.
inline bool is_narrow(const MmaConvParams& p) {
  const int64_t vector = 16 / item_size(p.dtype);
  bool wide = p.K % vector == 0 && on_16_bytes(p.out) && on_16_bytes(p.residual);
  for (int i = 0; i < p.sources; ++i) {
    const ConvSource& s = p.source[i];
    wide = wide && s.C % vector == 0 && on_16_bytes(s.x) && on_16_bytes(s.weight);
  }
  return !wide;
}

// Whether what the kernels count in 32 bits can be: positions in the images that a tile meets,
// padding included, and in the filters (in 16-byte chunks: 32 GB), steps, tiles.
constexpr bool mma_conv_fits(const MmaConvParams& p) {
  constexpr int64_t kMost = int64_t{1} << 28, kBits = (int64_t{1} << 31) - 1;
  bool fits = (p.sources == 1 || p.sources == 2) && p.N >= 0 && p.N <= kMost && p.P >= 1 &&
              p.Q >= 1 && p.P <= kMost && p.Q <= kMost && p.P * p.Q <= kMost && p.K >= 0 &&
              p.K <= kMost &&
              (p.dtype == DType::f32 || p.dtype == DType::bf16 || p.dtype == DType::f16);
  for (int i = 0; fits && i < p.sources; ++i) {
    const ConvSource& s = p.source[i];
    const int64_t sizes[2] = {s.H, s.W}, taps[2] = {s.R, s.S}, outs[2] = {p.P, p.Q};
    int64_t spans[2] = {};
    for (int d = 0; d < 2; ++d) {
      fits = fits && sizes[d] >= 1 && sizes[d] <= kMost && taps[d] >= 1 && taps[d] <= kMost &&
             s.stride[d] >= 1 && s.stride[d] <= kMost && s.padding[d] >= 0 &&
             s.padding[d] <= kMost && s.dilation[d] >= 1 && s.dilation[d] <= kMost &&
             taps[d] * s.dilation[d] <= kMost &&
             (outs[d] - 1) * s.stride[d] <= sizes[d] + 2 * s.padding[d];
      if (fits) spans[d] = sizes[d] + 2 * s.padding[d] + taps[d] * s.dilation[d];
    }
    fits = fits && s.C >= 1 && s.C <= kMost && s.R * s.S <= kMost && spans[0] * spans[1] <= kBits;
    if (!fits) return false;
    // What a tile meets: images of 128 pixels, and 127 filters behind the last one.
    const int64_t images = least(p.N, 128 / (p.P * p.Q) + 2);
    const int64_t in_chunk = 16 / item_size(p.dtype), chunks = ceil_div(s.C, in_chunk);
    // kBits / chunks first: the product may have more than 64 bits. The second limit keeps steps
    // and channels, counted through all taps, within 32 bits as well.
    fits =
        images * spans[0] * spans[1] <= kBits / chunks && (p.K + 128) * s.R * s.S <= kBits / chunks;
  }
  return fits && output_rows(p) <= int64_t{1} << 44 &&
         ceil_div(output_rows(p), kSplitSumRows) * ceil_div(p.K, kSplitSumColumns) <= kBits;
}

// Bytes of the partial sums.
constexpr int64_t workspace_bytes(const MmaConvParams& p, int splits) {
  return splits > 1 ? splits * output_rows(p) * p.K * 4 : 0;
}
// Bytes of p.workspace.
constexpr int64_t mma_conv_workspace(const MmaConvParams& p) {
  return workspace_bytes(p, p.plan.splits);
}

// The time of a plan, in cycles of one multiprocessor. Tiles of one multiprocessor share its shared
// memory, so two at once take as long as one after the other, and the last round may be mostly
// empty: what counts is the multiprocessor with the most tiles.
constexpr int64_t plan_cycles(const MmaConvParams& p, const MmaConvPlan& plan, int sms) {
  // A second launch behind the first: about 2 microseconds. Partial sums are written and read in
  // the L2 cache, which moves about 5 TB/s on an H100 at 1.7 GHz: 23 bytes a cycle for each of its
  // 132 multiprocessors.
  constexpr int64_t kSplitSumCycles = 4000, kCacheBytes = 23;
  const MmaTile& tile = kMmaTiles[plan.tile];
  const int64_t rounds = ceil_div(output_tiles(p, tile) * plan.splits, sms);
  const int64_t steps = ceil_div(all_steps(p), plan.splits);
  const int64_t cycles = rounds * steps * tile.step_cycles();
  if (plan.splits == 1) return cycles;
  return cycles + kSplitSumCycles + 2 * workspace_bytes(p, plan.splits) / (kCacheBytes * sms);
}

// The fastest plan by that model, for a GPU of `sms` multiprocessors; larger tiles win ties. A sum
// is split only where tiles leave multiprocessors idle, into at least 4 steps each, and where that
// saves a tenth of the time: the model is no better than that. The order of every sum is the same
// in all tiles; splits change it, and they follow from N. `invariant` allows none, which makes an
// image's result independent of the images beside it.
inline MmaConvPlan plan_mma_conv(const MmaConvParams& p, int sms, bool invariant) {
  constexpr int64_t kFewestSteps = 4;
  const bool narrow = is_narrow(p);
  const int64_t steps = all_steps(p);
  MmaConvPlan whole{0, 1}, split{0, 0};
  int64_t whole_cycles = -1, split_cycles = -1;
  for (int t = 0; t < kMmaTileCount; ++t) {
    const MmaTile& tile = kMmaTiles[t];
    if (tile.narrow != narrow) continue;
    // A split adds one source, so two sources are the business of one accumulator set there.
    if (tile.sources > p.sources) continue;
    const int fewest = tile.sources < p.sources ? 2 : 1;
    int64_t most_splits = 1;
    if (!invariant && tile.sources == 1 && output_tiles(p, tile) < sms) {
      most_splits = most(1, least(kMostSplits, steps / kFewestSteps));
    }
    for (int splits = fewest; splits <= most_splits; ++splits) {
      const MmaConvPlan plan{t, splits};
      const int64_t cycles = plan_cycles(p, plan, sms);
      MmaConvPlan& best = splits == 1 ? whole : split;
      int64_t& best_cycles = splits == 1 ? whole_cycles : split_cycles;
      if (best_cycles < 0 || cycles < best_cycles) {
        best = plan;
        best_cycles = cycles;
      }
    }
  }
  return split.splits > 0 && split_cycles * 10 < whole_cycles * 9 ? split : whole;
}

// Tiles of one group of rows are neighbours in the grid: they read the same pixels at about the
// same time, and the filters, a few MB at most, stay in the L2 cache as well.
constexpr LaunchShape mma_conv_shape(const MmaConvParams& p) {
  const MmaTile& tile = kMmaTiles[p.plan.tile];
  return {{output_tiles(p, tile), p.plan.splits, 1}, tile.threads(), tile.shared_bytes()};
}

constexpr LaunchShape split_sum_shape(const MmaConvParams& p) {
  const int64_t blocks = ceil_div(output_rows(p), kSplitSumRows) * ceil_div(p.K, kSplitSumColumns);
  return {{blocks, 1, 1}, kSplitSumThreads, 2 * 2 * kSplitSumColumns * 4};
}

// Whether p.plan can make p, once p has a workspace.
inline bool plan_fits(const MmaConvParams& p) {
  if (p.plan.tile < 0 || p.plan.tile >= kMmaTileCount || !mma_conv_fits(p)) return false;
  const MmaTile& tile = kMmaTiles[p.plan.tile];
  if (!tile.narrow && is_narrow(p)) return false;
  if (p.plan.splits == 1) return tile.sources == p.sources;
  return tile.sources == 1 && p.plan.splits >= 2 && p.plan.splits <= kMostSplits;
}

// Whether p can be launched as it is.
inline bool plan_is_valid(const MmaConvParams& p) {
  return plan_fits(p) &&
         (p.plan.splits == 1 || (p.workspace != nullptr && on_16_bytes(p.workspace)));
}

}  // namespace resnet_fused
